"""Checks that each field of a method's config does something, and dropout in training alone.

A field is set to values other than its default, which follow from its annotation and rule. One that
acts only beside others, or whose values follow from neither, has them in `Case.acts_with`; one that
cannot act on the case's model is in `Case.idle`, with why.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, get_args, get_origin

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from petl.core.model.linear import linear_names
from petl.core.spec.checks import BLOCKS
from petl.core.spec.config import MethodConfig
from petl.core.types import Fields
from petl.errors import InputError
from petl.system.values import hints_of, rule_of, type_problem
from petl.testing.case import Case, gradients, logits, stir, trainable, tuner_layers
from petl.testing.catalog import check, on_llama, own_on_llama
from petl.testing.models import Batch
from petl.testing.training import train

STEPS = 8  # of a training in which a field may act
DROPOUT = 0.5
OF_PEFT = {field.name for field in dataclasses.fields(PeftConfig)}
SHARED = {field.name for field in dataclasses.fields(MethodConfig)}
# values that follow neither from an annotation nor from a rule
VALUES: dict[str, list[object]] = {
    "non_linearity": ["relu"],
    "layers_pattern": ["no_such_list"],
    "blocks": ["no_such_list"],
    "target_parameters": [["no_such_parameter"]],
    "trainable_token_indices": [[1, 2]],
}
BESIDE: dict[str, dict[str, object]] = {"layers_pattern": {BLOCKS: [0]}}


@check(lambda case: on_llama(case) and bool(dropouts(case)))
def dropout_acts_in_training_alone(case: Case) -> None:
    """Each dropout changes a pass in training mode, and none in evaluation mode."""
    batch = case.batch()
    for name in dropouts(case):
        beside = acts_with(case, name)
        without = varied(case, {**beside, name: 0.0}).wrap_stirred()
        model = varied(case, {**beside, name: DROPOUT}).wrap_stirred()
        copy_tensors(without, model)
        expected = logits(without, batch)
        assert torch.equal(logits(model, batch), expected), f"{name} acts in evaluation mode"
        # draws differ between passes; of a method of PEFT it may drop a whole adapter or none
        passes = [model.train()(**batch).logits for _ in range(6)]
        plain = without.train()(**batch).logits
        is_dropped = any(not torch.equal(values, plain) for values in passes)
        assert is_dropped or name in case.idle, f"{name}={DROPOUT} changes no pass in training mode"
        assert torch.equal(logits(model, batch), expected), f"{name} acts after training"


def dropouts(case: Case) -> list[str]:
    """Return the fields of a case's config that are probabilities of dropout."""
    fields = dataclasses.fields(case.entry.config_cls)
    return [f.name for f in fields if f.name.endswith("dropout") and f.name not in case.idle]


def copy_tensors(model: PeftModel, to: PeftModel) -> None:
    """Give a model the tensors of another one that is built alike."""
    to.load_state_dict(model.state_dict())


@check(lambda case: own_on_llama(case) and not case.name)
def every_field_acts(case: Case) -> None:
    """Off its default, each field changes shapes, values, outputs, training or the file.

    A field that is not supported is refused.
    """
    known = {field.name for field in dataclasses.fields(case.entry.config_cls) if field.init}
    for name in (*_names(case), *case.idle):
        assert name in known, f"the case has an entry for {name}, which is no field"
    references: dict[str, Trace] = {}  # by the fields that differ from the case's
    found = [_fault(case, name, references) for name in sorted(known - OF_PEFT)]
    faults = [fault for fault in found if fault]
    assert not faults, "; ".join(faults)


def _fault(case: Case, name: str, references: dict[str, "Trace"]) -> str | None:
    """Return why a field does not do what its case says, or None."""
    beside, own = acts_with(case, name), _given(case, name)
    values = [own[name]] if name in own else list(candidates(case, name, beside))
    if not values and name not in case.idle:
        return f"{name}: no other value follows from its annotation; give one in Case.acts_with"
    refusals = list[str]()
    reference = references.setdefault(repr(beside), Trace(varied(case, beside)))
    for value in values:
        changed = Trace(varied(case, {**beside, name: value}))
        try:
            acts = changed.differs(reference)
        except InputError as error:
            refusals.append(str(error))
            continue
        if acts:
            return (
                f"{name}={value!r} acts, and the case calls it idle" if name in case.idle else None
            )
    if name in case.idle or _is_without_effect(case, name):
        return None
    if refusals and _may_be_refused(case, name):
        return None
    last = f", refused: {refusals[-1]}" if refusals else ""
    return f"{name} changes nothing with {', '.join(map(repr, values))}{last}"


def _may_be_refused(case: Case, name: str) -> bool:
    """Return True for fields that name modules, and for those of PEFT's with one value."""
    return name in (*SHARED, "blocks") or len(rule_of(_declared(case, name)).options) == 1


def _is_without_effect(case: Case, name: str) -> bool:
    """Return True for a field that other libraries read, which says so."""
    return "without effect" in _declared(case, name).metadata.get("help", "")


def _declared(case: Case, name: str) -> dataclasses.Field:
    kind = case.entry.config_cls
    return next(field for field in dataclasses.fields(kind) if field.name == name)


def acts_with(case: Case, name: str) -> Fields:
    """Return the further fields beside which a field acts."""
    given = _given(case, name) or BESIDE.get(name, {})
    return {k: v for k, v in given.items() if k != name}


def _names(case: Case) -> list[str]:
    keys = ((key,) if isinstance(key, str) else key for key in case.acts_with)
    return [name for key in keys for name in key]


def _given(case: Case, name: str) -> Mapping[str, object]:
    """Return the entry of `Case.acts_with` for a field."""
    found = (
        v for k, v in case.acts_with.items() if name == k or (not isinstance(k, str) and name in k)
    )
    return next(found, {})


def varied(case: Case, fields: Mapping[str, object]) -> Case:
    """Return a case with other fields."""
    return dataclasses.replace(case, fields={**case.fields, **fields})


class Trace:
    """What can be seen of a case, one stage after the other, the cheapest first."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.stages: list[object] = []
        self.refusal: InputError | None = None
        self._more = self._run()

    def differs(self, other: "Trace") -> bool:
        """Return True if a stage differs from that of another case, which may be refused."""
        index, same = 0, True
        while same:
            mine = self.stage(index)
            try:
                others = other.stage(index)
            except InputError:
                return True
            if mine is None or others is None:
                return False
            index, same = index + 1, _equal(mine, others)
        return True

    def stage(self, index: int) -> Any:
        """Return a stage; None behind the last one.

        Raises:
            InputError: the case is refused.
        """
        if index == len(self.stages) and self.refusal is None:
            try:
                self.stages.append(next(self._more, None))
            except InputError as error:
                self.refusal = error
        if index == len(self.stages) and self.refusal is not None:
            raise self.refusal
        return self.stages[index]

    def _run(self) -> Iterator[Mapping[str, object]]:
        model, batch = self.case.wrap(), self.case.batch()
        yield {name: (p.shape, p.dtype) for name, p in trainable(model).items()}
        yield _copied(model.state_dict())
        stir(model)
        yield {"logits": logits(model, batch)}
        torch.manual_seed(3)
        yield gradients(model, batch)
        yield from self._trained(model, batch)

    def _trained(self, model: PeftModel, batch: Batch) -> Iterator[Mapping[str, object]]:
        torch.manual_seed(4)
        losses = train(model.train(), batch, steps=STEPS, lr=self.case.lr).losses
        yield {"losses": torch.tensor(losses)}
        yield _copied(model.state_dict())
        yield _copied(get_peft_model_state_dict(model))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # a later stage changes the tensors in place
    return {name: tensor.clone() for name, tensor in state.items()}


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    pairs = ((a[name], b[name]) for name in a)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


# Values


def candidates(case: Case, name: str, beside: Mapping[str, object]) -> Iterator[object]:
    """Yield values of a field other than the one that it has in a case."""
    try:
        now = getattr(varied(case, beside).config(), name)
    except InputError:  # which needs the field
        now = _declared(case, name).default
    hint, rule = hints_of(case.entry.config_cls)[name], rule_of(_declared(case, name))
    if hint is NoneType or len(rule.options) == 1:
        yield "anything"
        return
    found = VALUES.get(name) or [
        *_of_targets(case, name, beside),
        *_of_type(now, hint, rule.options),
    ]
    for value in found:
        is_new = value != now and not type_problem(value, hint)
        if is_new and (value is None or rule.holds(value)):
            yield value


def _of_targets(case: Case, name: str, beside: Mapping[str, object]) -> Iterator[object]:
    """Yield values that name modules of the case's model."""
    if name in (BLOCKS, "layers"):
        yield [0]
    if name not in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern"):
        return
    model = varied(case, beside).wrap()
    # an adapter of a whole block stands inside it
    layers = (path.partition(".petl_")[0] for path in tuner_layers(model))
    paths = [path.removeprefix("base_model.model.") for path in layers]
    if name == "target_modules":
        yield paths[:1]
        yield linear_names(case.base())[:1]
    elif name == "exclude_modules":
        yield paths[-1:]
    elif name == "rank_pattern":
        yield {paths[0]: 2}
    else:
        adapted = tuple(paths)
        outside = [n for n, m in case.base().named_children() if not n.startswith(adapted)]
        yield from ([name] for name in reversed(outside))


def _of_type(now: object, hint: object, options: tuple[object, ...]) -> Iterator[object]:
    """Yield values of an annotation other than `now`."""
    hints = get_args(hint) if NoneType in get_args(hint) or get_origin(hint) is None else (hint,)
    collection = any(get_origin(each) is list for each in (hint, *get_args(hint)))
    yield from ([option] if collection else option for option in options)
    if options:
        return
    numbers = {int, float} & {hint, *hints, *get_args(hint)}
    if isinstance(now, bool) or bool in (hint, *hints):
        yield from (True, False)
    elif numbers:
        start = now if isinstance(now, int | float) else 2
        for value in (start + 1, 2 * start, start / 2, start - 1, (1 + start) / 2, 1):
            yield math.ceil(value) if float not in numbers else value
