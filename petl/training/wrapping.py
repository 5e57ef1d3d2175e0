"""The model that a run trains: base with adapter, checked, in training mode.

`train.init_from` starts from a saved adapter. The method and its fields are those of
`petl.training.runs.init_from`. The model is wrapped as for a new adapter, whose values are then
replaced: strictly, by every tensor of the file. Only a task head may be new, if its labels are
others.
"""

import logging
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from petl.core.adapter_file import PREFIX, trained_modules
from petl.core.adapter_folder import adapter_files
from petl.core.auto_classes import read_labels
from petl.core.compat import SEQ_CLS_HEAD_NAMES
from petl.core.compressed import plain_folder
from petl.core.fingerprint import check_base, known_fingerprint
from petl.core.fingerprint import read as read_fingerprint
from petl.core.lifecycle import extra_losses
from petl.core.loading import check_file, check_header
from petl.core.registry import (
    build_config,
    check_on_shapes,
    is_computed,
    method,
    needs_calibration,
    wrap,
)
from petl.data.models.loading import load_base, new_modules
from petl.data.tasks.base import Task, packs
from petl.data.tasks.packing import check_packed_texts_isolated
from petl.errors import InputError, shortened
from petl.system.files.tensor_file import Shapes, read_shapes
from petl.system.progress import Shown
from petl.training.budget import within_budget
from petl.training.calibration import calibration_batches
from petl.training.dataloader import FirstBatches, Splits
from petl.training.distributed.launch import refuse_sharding
from petl.training.optimizer import groups
from petl.training.ranks.targets import rank_targets
from petl.training.runs.checkpoint import load_adapter
from petl.training.runs.init_from import HEADS, Start, find_start
from petl.training.runs.run_config import RunConfig
from petl.training.runs.settings import TrainConfig, method_fields

logger = logging.getLogger(__name__)
CALIBRATING = "calibrating the initial values of the adapter"
# by PEFT's task type: names of heads that PEFT trains and saves by itself
HEADS_OF_TASK = {
    "SEQ_CLS": SEQ_CLS_HEAD_NAMES,
    "TOKEN_CLS": SEQ_CLS_HEAD_NAMES,
    "QUESTION_ANS": ["qa_outputs"],
}


def sized_fields(config: RunConfig, task: Task, total_steps: int) -> dict[str, Any]:
    """Return `method_fields` of a run, at the size that `train.budget` allows.

    Raises:
        InputError: as `method_fields`; the method has no size or the budget is too small.
    """
    # fields are checked here for the first time with task type and number of steps
    fields = method_fields(config.method, task.peft_task_type, total_steps)
    if config.train.budget is None:
        return fields
    return within_budget(
        fields, lambda: load_base(config.model, task, meta=True), config.train.budget
    )


def train_new_modules(fields: Mapping[str, Any], base: PreTrainedModel) -> dict[str, Any]:
    """Return `fields` that also train and save modules without pretrained weights.

    PEFT does so for the heads that it recognizes. Other heads, or a pooler that a masked language
    model lacks, would keep random weights that are not saved. A method that replaces the head
    trains none of them.

    Raises:
        InputError: the method would read the output of such a module.
    """
    config_cls: Any = method(fields["name"]).config_cls
    if getattr(config_cls, "replaces_head", False):
        config: Any = build_config(**{k: v for k, v in fields.items() if k != "calibration"})
        config.check_new_modules(new_modules(base))
        return dict(fields)
    chosen = fields.get("modules_to_save") or []
    by_peft = HEADS_OF_TASK.get(str(fields["task_type"]), ())
    new = [name for name in new_modules(base) if name not in (*chosen, *by_peft)]
    completed = {**fields, "modules_to_save": [*chosen, *new]} if new else dict(fields)
    excluded = fields.get("exclude_modules") or []
    if takes_every_linear(fields) and not isinstance(excluded, str):
        completed["exclude_modules"] = [*excluded, *new_modules(base)]
    return completed


def takes_every_linear(fields: Mapping[str, Any]) -> bool:
    """Return True if PEFT would target the head: it excludes only that of a text classifier."""
    everywhere = fields.get("target_modules") == "all-linear" and not method(fields["name"]).own
    return everywhere and str(fields["task_type"]) not in ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")


def wrap_for_run(base: PreTrainedModel, arguments: Mapping[str, Any]) -> PeftModel:
    """Return `base` with an adapter and trainable new modules.

    Args:
        arguments: of `petl.wrap`, from `wrap_arguments`.
    """
    # new modules are known only once the weights are loaded
    model = wrap(base, **train_new_modules(arguments, base))
    # of a model of the Hub: the commit that was loaded, whatever its branch may be later
    model.active_peft_config.revision = getattr(base, "petl_commit", None)
    return model


def wrap_arguments(run: RunConfig, splits: Splits, accelerator: Accelerator) -> dict[str, Any]:
    """Return the arguments of `petl.wrap`: method fields, and batches for calibration if needed.

    Those are pairs of texts, if the method takes such; else of `method.calibration_data`, if it has
    that field, or of the train rows.

    Raises:
        InputError: as `sized_fields`, or `rank_targets`; the method does not train a sharded model.
    """
    fields = sized_fields(run, splits.task, splits.sampler(run.train).steps)
    config: Any = build_config(**fields)
    refuse_sharding(config, run.model.quantization, accelerator)

    def build() -> PreTrainedModel:
        return load_base(run.model, splits.task, meta=True)

    # before weights are loaded
    check_on_shapes(build, train_new_modules(fields, build()))
    if run.ranks is not None:
        rank_targets(run.ranks, build, fields)
    if not needs_calibration(config):
        return fields
    source = getattr(config, "calibration_source", "")
    if source:
        batches = resolve_name(source)(config, run, splits)
    elif hasattr(config, "calibration_data"):
        batches = calibration_batches(config.calibration_data, run.model, splits)
    else:
        parts = accelerator.num_processes if getattr(config, "divides_calibration", False) else 1
        rank = accelerator.process_index if parts > 1 else 0
        batches = FirstBatches(splits, run.train, accelerator.device, rank, parts)
    return {**fields, "calibration": Shown(batches, CALIBRATING)}


def check_model(model: PeftModel, settings: TrainConfig) -> None:
    """Raise InputError if settings or data do not fit this model, or if nothing is trainable."""
    if not is_computed(model.active_peft_config):
        groups(model, settings)  # raises if nothing is trainable
    base: Any = model.get_base_model()
    kind = settings.gradient_checkpointing
    if kind and not base.supports_gradient_checkpointing:
        raise InputError(
            f"train.gradient_checkpointing={str(kind).lower()} is not possible: "
            f"{type(base).__name__} does not support it"
        )
    if packs(base):
        check_packed_texts_isolated(model, base)
    for loss in extra_losses(model):
        if kind == "reentrant" and not loss.allows_reentrant:
            raise InputError(
                f"train.gradient_checkpointing=reentrant leaves the loss {loss.config.name!r} "
                "without a gradient; set train.gradient_checkpointing=true"
            )


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

    def fits(shapes: Shapes, file: str) -> None:
        new, _ = choose_head(start, shapes, model, task, settings.init_head)
        check_header(model, config, shapes, file, new)

    with plain_folder(start.place, config, start.where, fits) as (place, where):
        file = adapter_files(place, config, **where)
        shapes = read_shapes(file)
        new, reason = choose_head(start, shapes, model, task, settings.init_head)
        check_file(model, config, file, left_out=new)
        check_base(
            read_fingerprint(start.place, **start.where),
            known_fingerprint(model),
            shapes,
            other_base="warn" if settings.other_base else "refuse",
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
    if getattr(model.active_peft_config, "replaces_head", False):
        return (), "the adapter takes the place of the task head"
    own = shapes_of(trained_modules(model))
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
