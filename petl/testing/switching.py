"""Checks of several adapters in one model, of disabling and of merging adapters."""

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.loading import load
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.errors import InputError
from petl.testing.case import (
    Case,
    assert_close,
    difference,
    first_call,
    first_output,
    logits,
    stir,
    trainable,
    tuner_layers,
)
from petl.testing.catalog import check, merging, own
from petl.testing.training import rows_of


def wrap_two(case: Case) -> PeftModel:
    """Return a model with adapters "first" (active) and "second", which both have an effect."""
    model = stir(case.wrap(adapter_name="first"), "first", seed=2)
    add_second(case, model)
    # `stir` changes trainable tensors only, so each adapter is activated first
    model.set_adapter("second")
    stir(model, "second", seed=3)
    model.set_adapter("first")
    return model.eval()


def add_second(case: Case, model: PeftModel) -> None:
    """Add an adapter called "second" with the case's config."""
    config: Any = case.config()
    if not case.promises.own:  # PEFT does not know petl's presets of targets
        first: Any = next(iter(model.peft_config.values()))
        config.target_modules = first.target_modules
    model.add_adapter("second", config)


@check()
def switching_changes_outputs_and_what_trains(case: Case) -> None:
    """Only the active adapter computes and trains; switched back, the first computes as before."""
    model, batch = wrap_two(case), case.batch()
    first = logits(model, batch)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        others = [n for n in trainable(model) if name not in n.split(".")]
        assert not others, f"{name} is active, but these train: {others}"
        assert trainable(model), f"{name} is active, but nothing trains"
        same = torch.equal(logits(model, batch), first)
        relation = "the same as" if same else "other than"
        assert same == (name == "first"), f"outputs with {name} active are {relation} the first's"


@check()
def adapters_do_not_disturb_each_other(case: Case) -> None:
    """Saved from a model with two adapters and loaded alone, an adapter computes the same."""
    model, batch = wrap_two(case), case.batch()
    expected = {}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ("first", "second"):
            model.set_adapter(name)
            expected[name] = logits(model, batch)
            alone = load(case.base(), Path(folder) / name)
            assert_close(
                logits(alone, batch),
                expected[name],
                1e-6,
                f"logits of {name} with the other, and alone,",
            )
        model.load_adapter(str(Path(folder) / "second"), "third")
    model.set_adapter("third")
    what = "logits of second, and of its file loaded as third,"
    assert_close(logits(model, batch), expected["second"], 1e-6, what)
    model.set_adapter("first")
    assert torch.equal(logits(model, batch), expected["first"]), "loading changed the first"


@check(own)
def both_adapters_can_be_active(case: Case) -> None:
    """With two active adapters a layer adds both updates, if the method is additive."""
    model, batch = wrap_two(case.without_head()), case.batch()  # PEFT allows one active head
    tuner: Any = model.base_model
    alone = []
    for name in ("first", "second"):
        tuner.set_adapter(name)
        alone.append(logits(model, batch))
    # one layer: through the model, updates of several layers do not add up
    call, args, kwargs = first_call(model, batch)

    @torch.no_grad()
    def output_of(names: list[str]) -> Tensor:
        call.layer.set_adapter(names)
        return first_output(call(*args, **kwargs))

    base, *single = (output_of(names) for names in ([], ["first"], ["second"]))
    if case.promises.merges:
        output = output_of(["first", "second"])
        assert_close(output, sum(single) - base, 1e-4, "outputs with both, and the sum of both,")
    tuner.set_adapter(["first", "second"])
    both = logits(model, batch)
    assert both.isfinite().all(), "logits with both adapters active are not finite"
    gap = min(difference(both, one) for one in alone)
    assert gap > 1e-5, f"both active differ from one alone by {gap:.2e}, not above 1e-5"


@check()
def deleted_adapters_leave_no_tensor(case: Case) -> None:
    """Deleting an adapter removes all its tensors, shared ones included, and no others."""
    model, batch = wrap_two(case), case.batch()
    expected = logits(model, batch)
    remaining = {key for key in model.state_dict() if "second" not in key.split(".")}
    model.delete_adapter("second")
    keys = set(model.state_dict())
    assert keys == remaining, f"tensors after the deletion: {sorted(keys ^ remaining)} differ"
    assert "second" not in model.peft_config
    assert torch.equal(logits(model, batch), expected), "deleting the second changed the first"
    add_second(case, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it activates another adapter
        model.delete_adapter("first")
    left = [key for key in model.state_dict() if "first" in key.split(".")]
    assert not left, f"tensors of the deleted adapter are left: {left}"
    assert model.active_adapters == ["second"]


@check()
def disabled_adapters_give_the_base_model(case: Case) -> None:
    """In `disable_adapter` the outputs are the base model's; after it, the same as before."""
    model, batch = case.wrap_stirred(), case.batch()
    base, adapted = logits(case.base(), batch), logits(model, batch)
    effect = difference(adapted, base)
    assert effect > 1e-3, f"the adapter changes logits by {effect:.2e}, not above 1e-3"
    with model.disable_adapter():
        what = "logits with the adapter disabled and of the base model"
        assert_close(logits(model, batch), base, 1e-6, what)
    assert torch.equal(logits(model, batch), adapted), "enabled again, it computes other logits"


@check(merging)
def merging_and_unmerging_change_nothing(case: Case) -> None:
    """Merged, unmerged, or merged and unloaded, the model computes the same."""
    model, batch = case.wrap_stirred(), case.batch()
    base_weights = _base_weights(model)
    expected = logits(model, batch)
    allowed = 1e-4 * max(1.0, float(expected.abs().max()))
    model.merge_adapter()
    assert_close(logits(model, batch), expected, allowed, "logits before and after merging")
    with model.disable_adapter():
        what = "logits, merged and disabled, and of the base model"
        assert_close(logits(model, batch), logits(case.base(), batch), allowed, what)
    model.unmerge_adapter()
    assert_close(logits(model, batch), expected, allowed, "logits before and after unmerging")
    for name, weight in _base_weights(model).items():
        what = f"values of {name} before merging and after unmerging"
        assert_close(weight, base_weights[name], 1e-4, what)
    model.merge_adapter(adapter_names=["default"], safe_merge=True)
    plain = model.merge_and_unload()
    assert type(plain) is type(case.base())
    assert not tuner_layers(plain), f"adapted layers are left: {sorted(tuner_layers(plain))}"
    what = "logits before and after merge_and_unload"
    assert_close(logits(plain, batch), expected, allowed, what)


@check(merging, of=Capability.MERGE)
def merged_model_computes_the_same(case: Case) -> None:
    """Merged into the base weights, the adapter is gone and the outputs are the same."""
    model, batch = case.wrap_stirred(), case.batch()
    expected, base = logits(model, batch), logits(case.base(), batch)
    allowed = 1e-4 * max(1.0, float(expected.abs().max()))
    effect = difference(expected, base)
    assert effect > 10 * allowed, f"the adapter changes logits by {effect:.2e} only"
    plain = model.merge_and_unload()
    assert not tuner_layers(plain), f"adapted layers are left: {sorted(tuner_layers(plain))}"
    assert_close(logits(plain, batch), expected, allowed, "logits before and after merging")


@check(lambda case: own(case) and merging(case))
def safe_merge_refuses_what_is_not_finite(case: Case) -> None:
    """A safe merge that would write NaN raises ValueError, and the base weights are unchanged."""
    model = case.wrap_stirred()
    before = _base_weights(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(torch.nan)
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError:
        after = _base_weights(model)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert not changed, f"a merge that raised has changed {changed}"
        return
    raise AssertionError("safe_merge wrote weights that are not finite")


@check(lambda case: not merging(case), of=Capability.MERGE, refuses=True)
def merging_is_refused_before_anything_changes(case: Case) -> None:
    """A method that cannot merge raises with a reason, and the model is unchanged."""
    model, batch = case.wrap_stirred(), case.batch()
    expected, keys = logits(model, batch), set(model.state_dict())
    for attempt in (model.merge_adapter, model.merge_and_unload):
        reason = _refusal(attempt)
        assert reason, f"{attempt.__name__} raised no NotImplementedError with a reason"
        assert set(model.state_dict()) == keys, f"{attempt.__name__} changed the state dict"
        assert torch.equal(logits(model, batch), expected), f"{attempt.__name__} changed logits"


@check()
def unloading_gives_the_plain_model(case: Case) -> None:
    """`unload` returns the base model: its class, tensors and loss, without hooks of petl."""
    plain = case.without_head().wrap_stirred().unload()  # PEFT would keep a trained head
    fresh = case.base()
    assert type(plain) is type(fresh)
    expected = fresh.state_dict()
    assert set(plain.state_dict()) == set(expected)
    changed = [name for name, t in plain.state_dict().items() if not torch.equal(t, expected[name])]
    assert not changed, f"after unload, values of {changed} are not the base model's"
    left = hooks_of(plain).items() - hooks_of(fresh).items()
    assert hooks_of(plain) == hooks_of(fresh), f"after unload, hooks are left: {dict(left)}"
    batch = case.batch()
    # PEFT leaves the base frozen, and torch may choose another kernel for attention with gradients
    with torch.no_grad():
        assert torch.equal(plain.train()(**batch).loss, fresh.train()(**batch).loss)


@check(of=Capability.MIXED_BATCH)
def mixed_batch_equals_single_runs(case: Case) -> None:
    """With `adapter_names` each row goes through its own adapter, or none; for inference only."""
    batch = case.batch()
    # must raise; `run` compares the reason
    if refusal(case.config(), Capability.MIXED_BATCH):
        logits(case.wrap(), batch, adapter_names=["default"] * 4)
        return
    model = wrap_two(case)
    names = ["first", "second", "__base__", "first"]
    mixed = logits(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        single = rows_of(batch, [row])
        # PEFT's name for no adapter
        if name == "__base__":
            expected = logits(case.base(), single)
        else:
            model.set_adapter(name)
            expected = logits(model, single)
        what = f"logits of row {row} ({name}) in the mixed batch and alone"
        assert_close(mixed[row], expected[0], 1e-5, what)
    if not case.promises.own:  # PEFT raises other errors
        return
    _assert_input_error(lambda: model.eval()(**batch, adapter_names=["third"] * 4), "unknown name")
    _assert_input_error(lambda: model.eval()(**batch, adapter_names=["first"]), "too few names")
    _assert_input_error(lambda: model.train()(**batch, adapter_names=names), "train mode")


def _refusal(attempt: Callable[[], object]) -> str:
    """Return the message of the NotImplementedError that a call raises, or ""."""
    try:
        attempt()
    except NotImplementedError as error:
        return str(error)
    return ""


def _assert_input_error(attempt: Callable[[], object], what: str) -> None:
    try:
        attempt()
    except InputError:
        return
    raise AssertionError(f"adapter_names with {what} raised no InputError")


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "base_layer" in name}


def hooks_of(model: nn.Module) -> dict[str, int]:
    """Return the number of hooks of each module that has any, by name."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    counts = {n: sum(len(getattr(m, k)) for k in kinds) for n, m in model.named_modules()}
    return {name: count for name, count in counts.items() if count}
