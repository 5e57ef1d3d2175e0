"""The adapter that a run starts from (`train.init_from`): its method, fields, tensors and head.

The model is wrapped as for a new adapter, whose values are then replaced: strictly, by every tensor
of the file. Only a task head may be new, if its labels are others.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig, PeftModel
from torch import Tensor

from petl.core.adapter_file import PREFIX, trained_modules
from petl.core.adapter_folder import CONFIG as ADAPTER_CONFIG
from petl.core.adapter_folder import Folder
from petl.core.auto_classes import read_labels
from petl.core.compat import SEQ_CLS_HEAD_NAMES
from petl.core.fingerprint import check_base, known_fingerprint
from petl.core.loading import check_file, check_header
from petl.core.registry import method_of
from petl.core.spec.facts import facts_of, modifies_base_weights
from petl.core.support import Capability
from petl.core.types import Arguments, Fields, Groups, Settings, base_of
from petl.data.models.loading import new_modules
from petl.data.tasks.base import Task
from petl.errors import InputError, shortened
from petl.system.files import hub
from petl.system.files.disk import check_links
from petl.system.files.paths import method_preset
from petl.system.files.tensor_file import Shapes, read_shapes
from petl.training.features import RunFeature, Setup
from petl.training.runs.checkpoint import load_adapter
from petl.training.runs.config import with_inner
from petl.training.runs.records import ADAPTER, CONFIG, read_stored
from petl.training.runs.settings import TrainConfig

logger = logging.getLogger(__name__)
# fields that are no settings of a method, or that a run sets itself
NOT_CHOSEN = {field.name for field in dataclasses.fields(PeftConfig)} | {
    "runtime_config",
}
# fields of the schedule of a training, which a new one may choose, as well as dropout
SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT")
HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")  # modules that PEFT trains by the type of the task


@dataclasses.dataclass(frozen=True)
class Start:
    """A saved adapter.

    Attributes:
        given: the value of `train.init_from`.
        place: the adapter's folder, or its name on the hub.
        run: the folder of its run; None without one.
        where: arguments of `petl.core.adapter_folder.ON_THE_HUB`.
    """

    given: str
    place: str
    run: Path | None
    where: Arguments

    @functools.cached_property
    def saved(self) -> Folder:
        """The files of the adapter."""
        return Folder(self.place, **self.where)

    def config(self) -> PeftConfig:
        """Read the adapter's config.

        Raises:
            InputError: there is no adapter, its method is unknown, or its tensors belong to base
                weights that its initialization changed.
        """
        config = self.saved.config
        start = facts_of(config).init_lora_weights
        if modifies_base_weights(config):
            raise InputError(
                f"train.init_from={self.given}: init_lora_weights={start!r} "
                "changed the base weights, and this file is relative to them; name the finished "
                f"run, whose {ADAPTER}/ fits the original base model"
            )
        return config


class InitFrom(RunFeature):
    """Gives the adapter of a new run the method, the fields and the values of a saved one."""

    lacks = {Capability.SIZE: "the saved adapter has its size: leave train.budget null"}

    def settle(self, settings: Groups) -> Groups:
        """Return the settings with the method of the saved adapter.

        Raises:
            InputError: as `find_start`, `check_model` or `method_settings`.
        """
        start = find_start(self.settings)
        other_base = settings["train"].get("other_base")
        check_model(start, settings["model"], other_base=bool(other_base))
        return settings | {"method": method_settings(start, settings.get("method"))}

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Load the saved values into the wrapped model of a new run."""
        run = setup.run
        if run is None:
            return fields
        start = find_start(self.settings)
        run.environment["init_from"] = start.place
        if run.resume is None:  # a checkpoint brings its own weights
            task, settings = setup.splits.task, setup.config.train
            setup.when_wrapped.append(lambda model: load_start(model, start, task, settings))
        return fields


def find_start(given: str) -> Start:
    """Find the adapter of `train.init_from`: in the folder of a run, in its own, or on the hub.

    Raises:
        InputError: there is none, or a link in the folder leads out of it.
    """
    folder = Path(given)
    if not folder.is_dir():
        return Start(given, given, None, hub.arguments_of(given, ADAPTER_CONFIG, {}))
    inside = folder / ADAPTER
    adapter = inside if inside.is_dir() else folder
    if not (adapter / ADAPTER_CONFIG).is_file():
        is_run = (folder / CONFIG).is_file()
        raise InputError(
            f"train.init_from={given} "
            + (
                "is a run that has saved no adapter yet: finish it with train.resume, or name the "
                "folder adapter/ of one of its checkpoints"
                if is_run
                else "contains no adapter: name the folder of a run, or of an adapter"
            )
        )
    check_links(adapter)
    run = adapter.absolute().parent  # also of a path to RUN/adapter
    return Start(given, str(adapter), run if (run / CONFIG).is_file() else None, {})


def method_settings(start: Start, given: Settings | None) -> Fields:
    """Return the settings under `method` of a run that starts from an adapter.

    Args:
        given: those that +method and further words give, which must not contradict the adapter; a
            value as in the method's file of configs/method is no choice of the user.

    Raises:
        InputError: they contradict it, no method has such an adapter, or it has a field that no
            setting can hold.
    """
    config = start.config()
    entry = method_of(config)
    if entry is None:
        raise InputError(
            f"train.init_from={start.given} is an adapter of type {config.peft_type}, with which "
            "petl does not train"
        )
    saved = {"name": entry.name, **_fields(config, start.given)}
    chosen = dict(given or {"name": entry.name})
    if chosen.get("name") != entry.name:
        raise InputError(
            f"train.init_from={start.given} is an adapter of method {entry.name}, and method "
            f"{chosen.get('name')} is given: leave out +method, or train.init_from"
        )
    preset = {**with_inner(saved), **method_preset(entry.name)}
    changed = {k: v for k, v in chosen.items() if v is not None and v != preset.get(k)}
    for name, value in changed.items():
        is_free = name in SCHEDULE or name.endswith("dropout")
        # a field that is not known is refused as always
        if name not in saved or is_free or _plain(value) == saved[name]:
            continue
        raise InputError(
            f"train.init_from={start.given} has {name}={saved[name]!r}, and method.{name}="
            f"{value!r} is given: an adapter keeps its fields; leave that out"
        )
    return {**{k: v for k, v in saved.items() if k in preset or v is not None}, **changed}


def _fields(config: PeftConfig, given: str) -> Fields:
    """Return the fields of a saved config that are settings of its method, as plain values."""
    fields: Fields = {}
    for field in dataclasses.fields(config):
        if not field.init or field.name in NOT_CHOSEN:
            continue
        value = _plain(getattr(config, field.name))
        if field.name == "modules_to_save":  # heads depend on the task of the new run
            saved = facts_of(config).modules_to_save or ()
            value = [name for name in saved if name not in HEADS] or None
        if dataclasses.is_dataclass(value):
            raise InputError(
                f"train.init_from={given} has {field.name}, which cannot be set for a new run"
            )
        # an initialization from data or weights: the tensors come from the file
        is_start = field.name == "init_lora_weights" and isinstance(value, str)
        fields[field.name] = True if is_start else value
    if "total_step" in fields:
        fields["total_step"] = None  # that of the new run
    return fields


def _plain(value: object) -> object:
    """Return a value as YAML has it."""
    return sorted(value) if isinstance(value, set | tuple) else value


def check_model(start: Start, model: Settings, *, other_base: bool) -> None:
    """Raise InputError if the adapter's run had another model, unless `other_base` allows it."""
    if start.run is None or other_base:
        return
    then = read_stored(start.run / CONFIG)["model"]["name"]
    if then != model["name"]:
        raise InputError(
            f"train.init_from={start.given} was trained on model {then}, and this run has model "
            f"{model['name']}: choose model={then}, or insist with train.other_base=true"
        )


def load_start(model: PeftModel, start: Start, task: Task, settings: TrainConfig) -> None:
    """Give the adapter of a wrapped model the values of the one that `train.init_from` names.

    Raises:
        InputError: the file does not fit the model, the base model is another one, or nothing says
            whether the task head fits.
    """
    config = model.active_peft_config
    # head and file are checked before a tensor is read: a refusal leaves the model as it was

    def fits(shapes: Shapes, file: str) -> None:
        new, _ = choose_head(start, shapes, model, task, settings.init_head)
        check_header(model, config, shapes, file, new)

    with start.saved.plain(fits) as plain:
        file = plain.weights
        shapes = read_shapes(file)
        new, reason = choose_head(start, shapes, model, task, settings.init_head)
        check_file(model, config, file, left_out=new)
        check_base(
            start.saved.base,
            known_fingerprint(model),
            shapes,
            other_base=settings.other_base,
            action=f"starting from {start.given}",
            insist="train.other_base=true",
        )
        load_adapter(model, file.parent, left_out=new)
    logger.info("starting from the adapter in %s; %s", start.place, reason)


def choose_head(
    start: Start, saved: Shapes, model: PeftModel, task: Task, choice: str | None
) -> tuple[tuple[str, ...], str]:
    """Return prefixes of the tensors that are not read from a file, and a line that says why.

    Those are the tensors of a head that is new, or that this task does not have, and of other
    modules without pretrained weights that the file does not have.

    Args:
        saved: the tensors of the file.
        choice: `train.init_head`.

    Raises:
        InputError: nothing says whether the head fits, or it does not and should be kept.
    """
    if facts_of(model.active_peft_config).replaces_head:
        return (), "the adapter takes the place of the task head"
    own = shapes_of(trained_modules(model))
    there, here = heads_in(saved), heads_in(own)
    # a model class may add modules that its pretrained checkpoint lacks, not only a task head
    base = base_of(model)
    modules = (f"{PREFIX}{name}." for name in new_modules(base))
    absent = {prefix for prefix in modules if not any(name.startswith(prefix) for name in saved)}
    reason = reason_for_new_head(start, task, choice, there, here)
    if reason is None:
        return tuple(absent), "the task head is kept"
    # names that this model does not have match no tensor, so all of HEADS can be listed
    return tuple({f"{PREFIX}{name}." for name in HEADS} | absent), reason


def reason_for_new_head(
    start: Start, task: Task, choice: str | None, there: Shapes, here: Shapes
) -> str | None:
    """Return why the task head of a run is not that of the saved adapter; None if it is.

    Args:
        there, here: the tensors of the saved head, and of the run's own.

    Raises:
        InputError: as `choose_head`.
    """
    if not here:
        return "its task head is left out, this task has none" if there else None
    fits = shapes_alike(there, here)
    if choice == "keep" and not fits:
        raise InputError(
            f"train.init_head=keep is not possible: the task head of {start.given} has "
            f"{in_words(there) or 'no tensors'}, and this task needs {in_words(here)}"
        )
    # an explicit choice needs no labels
    if choice is not None:
        return "the task head is new (train.init_head=new)" if choice == "new" else None
    then, now = labels_of(read_labels(start.place, **start.where)), labels_of(task.model_kwargs())
    # equal shapes do not show equal classes: two classes in another order fit as well
    if fits and bool(then) != bool(now):
        raise InputError(
            f"the labels of the task head of {start.given} are not known, so it may or may not be "
            "one of this task: set train.init_head=keep, or train.init_head=new"
        )
    if fits and then == now:
        return None
    if not there:
        return "the task head is new, since that adapter has none"
    if not fits and then == now:
        return "the task head is new, since that of the adapter has other shapes"
    return (
        f"the task head is new, since the labels are {shortened(', '.join(map(str, now)))}, and "
        f"there {shortened(', '.join(map(str, then)))}"
    )


def labels_of(fields: Settings) -> list[str]:
    """Return the labels in fields of a model's config, in order, and the type of problem."""
    # `read_labels` puts them in the order of the class numbers
    names = list(fields.get("id2label", {}).values())
    kind = fields.get("problem_type")
    # regression names its one output "number": the type tells it from a class of that name
    return [*names, f"({kind})"] if names and kind == "regression" else names


def heads_in(shapes: Shapes) -> Shapes:
    """Return the tensors of task heads among those of an adapter's file."""
    # a head is a direct child of the base model: its name is the first part of the key
    return {k: v for k, v in shapes.items() if k.removeprefix(PREFIX).split(".")[0] in HEADS}


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return dtype and shape of tensors by name."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def shapes_alike(one: Shapes, other: Shapes) -> bool:
    """Return True if tensors have the same names and shapes; their dtypes may differ."""
    return {k: shape for k, (_, shape) in one.items()} == {k: s for k, (_, s) in other.items()}


def in_words(shapes: Shapes) -> str:
    """Return names and shapes of tensors."""
    return ", ".join(f"{k.removeprefix(PREFIX)} {list(s)}" for k, (_, s) in shapes.items())
