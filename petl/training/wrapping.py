"""The model that a run trains: base with adapter, checked, in training mode."""

import logging
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.compat import SEQ_CLS_HEAD_NAMES, check_target_module_exists
from petl.core.registry import (
    attach,
    build_config,
    check_on_shapes,
    is_computed,
    method,
    needs_calibration,
    wrap,
)
from petl.core.spec.facts import facts_of
from petl.core.types import Arguments, Fields, base_of
from petl.data.models.loading import new_modules
from petl.data.tasks.encoding_cache import sizes_of
from petl.efficiency.rewrite import apply_rewrites, rewrite, rewrites_of
from petl.errors import InputError
from petl.system.progress import ProgressItems
from petl.training.dataloader import FirstBatches, Splits
from petl.training.features import Setup
from petl.training.optimizer import groups
from petl.training.runs.settings import TrainConfig

Bases = dict[str, nn.Parameter]  # frozen weights by place, see `share_base`
WRAPPED = ("base_layer", "original_module")  # names of PEFT's for what an adapter wraps
logger = logging.getLogger(__name__)
CALIBRATING = "calibrating the initial values of the adapter"
# by PEFT's task type: names of heads that PEFT trains and saves by itself
HEADS_OF_TASK = {
    "SEQ_CLS": SEQ_CLS_HEAD_NAMES,
    "TOKEN_CLS": SEQ_CLS_HEAD_NAMES,
    "QUESTION_ANS": ["qa_outputs"],
}


def wrapped(setup: Setup, bases: Bases | None = None) -> PeftModel:
    """Return the run's base model with its adapter, started and checked, on the accelerator.

    Args:
        bases: the weights that runs of this process share; None: it has one run.
    """
    config, settings = setup.config, setup.config.train
    arguments = wrap_arguments(setup)
    own = [*setup.base.parameters()]
    model = wrap_for_run(setup.base, arguments)
    if bases is not None:
        share_base(model.get_base_model(), own, bases)
    for finish_wrapping in setup.when_wrapped:
        finish_wrapping(model)
    if config.loss is not None:
        attach(model, config.loss)
    check_model(model, settings)
    setup.splits.task.check_model(model)
    check_prompts(model, setup.splits, settings)
    applied = apply_rewrites(model, rewrites_of(settings))
    names = [f"train.{name}" for name in applied if not rewrite(name).exact]
    if names:
        text = "in less time or memory, the same but for rounding and the masks of dropout: %s"
        logger.info(text, ", ".join(names))
    return model


def train_new_modules(fields: Fields, base: PreTrainedModel) -> Fields:
    """Return `fields` that also train and save modules without pretrained weights.

    PEFT does so for the heads that it recognizes. Other heads, or a pooler that a masked language
    model lacks, would keep random weights that are not saved. A method that replaces the head
    trains none of them.

    Raises:
        InputError: the method would read the output of such a module.
    """
    config_cls = method(fields["name"]).config_cls
    if facts_of(config_cls).replaces_head:
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


def takes_every_linear(fields: Fields) -> bool:
    """Return True if PEFT would target the head: it excludes only that of a text classifier."""
    everywhere = fields.get("target_modules") == "all-linear" and not method(fields["name"]).own
    return everywhere and str(fields["task_type"]) not in ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")


def wrap_for_run(base: PreTrainedModel, arguments: Arguments) -> PeftModel:
    """Return `base` with an adapter and trainable new modules.

    Args:
        arguments: of `petl.wrap`, from `wrap_arguments`.
    """
    # new modules are known only once the weights are loaded
    model = wrap(base, **train_new_modules(arguments, base))
    # of a model of the Hub: the commit that was loaded, whatever its branch may be later
    model.active_peft_config.revision = getattr(base, "petl_commit", None)
    exclude_removed(model.active_peft_config, getattr(base, "petl_removed_modules", ()))
    return model


def exclude_removed(config: PeftConfig, removed: Sequence[str]) -> None:
    """Exclude the modules that the task has removed from the base, where a target names them.

    The adapter then fits the base with and without them.
    """
    if not facts_of(config).target_modules:
        return
    # not before wrapping: patterns that match nothing are warned of
    names = sorted(name for name in removed if check_target_module_exists(config, name))
    excluded = facts_of(config).exclude_modules
    if not names:
        return
    if isinstance(excluded, str):
        chosen = "|".join([f"(?:{excluded})", *map(re.escape, names)])
    else:
        chosen = {*(excluded or ()), *names}
    vars(config)["exclude_modules"] = chosen


def wrap_arguments(setup: Setup) -> Arguments:
    """Return the arguments of `petl.wrap`: method fields, and batches for calibration if needed.

    Those are what a feature has chosen; else of `method.calibration_data`, if the method has that
    field, or of the train rows.

    Raises:
        InputError: as `Setup.fields`; the method does not train a sharded model.
    """
    run, splits, accelerator = setup.config, setup.splits, setup.accelerator
    assert accelerator is not None
    fields = setup.fields()
    config = build_config(**fields)
    # before weights are loaded
    check_on_shapes(setup.shapes, train_new_modules(fields, setup.shapes()))
    if not needs_calibration(config):
        return fields
    if setup.calibration is not None:
        batches = setup.calibration
    elif hasattr(config, "calibration_data"):
        calibration = import_module("petl.training.calibration")  # for a method that needs it
        chosen = calibration.read_calibration(vars(config)["calibration_data"])
        batches = calibration.calibration_batches(chosen, run.model, splits)
    else:
        parts = accelerator.num_processes if facts_of(config).divides_calibration else 1
        rank = accelerator.process_index if parts > 1 else 0
        batches = FirstBatches(splits, run.train, accelerator.device, rank, parts)
    return {**fields, "calibration": ProgressItems(batches, CALIBRATING)}


def check_prompts(model: PeftModel, splits: Splits, settings: TrainConfig) -> None:
    """Raise InputError if a test row that is answered leaves the model no position for an answer.

    Else a run would find it when it has trained. The prompt of a chat is its own, not that within
    `data.max_length`.
    """
    task, base = splits.task, base_of(model)
    if task.generate is None or not settings.test or base.config.is_encoder_decoder:
        return
    longest = max(sizes_of(splits.test, task.prompt_columns[0]))
    import_module("petl.training.generation").positions_behind(base, longest)


def check_model(model: PeftModel, settings: TrainConfig) -> None:
    """Raise InputError if settings do not fit this model, or if nothing is trainable."""
    if not is_computed(model.active_peft_config):
        groups(model, settings)  # raises if nothing is trainable
    base = base_of(model)
    kind = settings.gradient_checkpointing
    if kind and not base.supports_gradient_checkpointing:
        raise InputError(
            f"train.gradient_checkpointing={str(kind).lower()} is not possible: "
            f"{type(base).__name__} does not support it"
        )


# The frozen weights that runs of one process share


def share_base(base: nn.Module, own: Sequence[nn.Parameter], known: Bases) -> None:
    """Let a wrapped model use the frozen weights of an earlier one, where equal.

    Call it when the adapter has its initial values, which some methods take out of the weights.
    Weights that train stay the run's own, as do new modules, such as a head that each run draws.

    Args:
        base: the transformers model.
        own: its parameters before it was wrapped; an adapter may change others that are frozen.
        known: the weights of earlier ones, to which those of this one are added.
    """
    ids = {id(parameter) for parameter in own}
    for path, module in base.named_modules():
        # adapters are on other modules in another run
        place = ".".join(part for part in path.split(".") if part not in WRAPPED)
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.requires_grad or id(parameter) not in ids:
                continue
            earlier = known.setdefault(f"{place}.{name}", parameter)
            if earlier is not parameter and _equal(earlier, parameter):
                module._parameters[name] = earlier


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and type(one) is type(other) and torch.equal(one, other)
