"""Start a run from a saved adapter (`train.init_from`): its tensors, and its task head if it fits.

The method and its fields are those of `petl.runs.init_from`. The model is wrapped as for a new
adapter, whose values are then replaced: strictly, by every tensor of the file. Only a task head may
be new instead, if its labels are others.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from petl.core.adapter_file import PREFIX, trained_modules
from petl.core.adapter_folder import adapter_files
from petl.core.auto_classes import read_labels
from petl.core.fingerprint import check_base, known_fingerprint
from petl.core.fingerprint import read as read_fingerprint
from petl.core.loading import check_file
from petl.errors import InputError, shortened
from petl.files.tensor_file import Shapes, read_shapes
from petl.models.loading import new_modules
from petl.runs.checkpoint import load_adapter
from petl.runs.init_from import HEADS, Start, find_start
from petl.runs.settings import TrainConfig
from petl.tasks.base import Task

logger = logging.getLogger(__name__)


def load_start(model: PeftModel, task: Task, settings: TrainConfig) -> None:
    """Give the adapter of a wrapped model the values of the one that `train.init_from` names.

    Raises:
        InputError: the file does not fit the model, the base model is another one, or nothing says
            whether the task head fits.
    """
    if settings.init_from is None:
        return
    start = find_start(settings.init_from)
    config = model.active_peft_config
    # head and file are checked before a tensor is read: a refusal leaves the model as it was
    file = adapter_files(start.place, config, **start.where)
    new, reason = choose_head(start, file, model, task, settings.init_head)
    check_file(model, config, file, left_out=new)
    check_base(
        read_fingerprint(start.place, **start.where),
        known_fingerprint(model),
        read_shapes(file),
        other_base="warn" if settings.other_base else "refuse",
        action=f"starting from {start.given}",
        insist="train.other_base=true",
    )
    load_adapter(model, file.parent, left_out=new)
    logger.info("starting from the adapter in %s; %s", start.place, reason)


def choose_head(
    start: Start, file: Path, model: PeftModel, task: Task, choice: str | None
) -> tuple[tuple[str, ...], str]:
    """Return prefixes of the tensors that are not read from the file, and a line that says why.

    Those are the tensors of a head that is new, or that this task does not have, and of other
    modules without pretrained weights that the file does not have.

    Args:
        file: of the adapter's weights.
        choice: `train.init_head`.

    Raises:
        InputError: nothing says whether the head fits, or it does not and should be kept.
    """
    saved, own = read_shapes(file), shapes_of(trained_modules(model))
    there, here = heads_in(saved), heads_in(own)
    # a model class may add modules that its pretrained checkpoint lacks, not only a task head
    base: Any = model.get_base_model()
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
    # an explicit choice needs no labels, which older adapters did not save
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


def labels_of(fields: Mapping[str, Any]) -> list[Any]:
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
