"""From the configuration to the model that a run trains: wrapped, checked, in training mode."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedModel

from petl.config.method_fields import method_fields
from petl.core.compat import SEQ_CLS_HEAD_NAMES, LoraModel
from petl.core.layers.recompute import recompute_mlp
from petl.core.lifecycle import extra_losses
from petl.core.registry import build_config, method, needs_calibration, wrap
from petl.core.switching.lora import fuse_lora
from petl.distributed.launch import refuse_sharding
from petl.errors import InputError
from petl.models.loading import load_base, new_modules
from petl.runs.settings import TrainConfig
from petl.tasks.base import Task, packs
from petl.tasks.packing import check_packed_texts_isolated
from petl.training.budget import within_budget
from petl.training.calibration import calibration_batches
from petl.training.dataloader import FirstBatches, Splits
from petl.training.optimizer import groups

# by PEFT's type of task, the heads that it trains and saves by itself
HEADS = {
    "SEQ_CLS": SEQ_CLS_HEAD_NAMES,
    "TOKEN_CLS": SEQ_CLS_HEAD_NAMES,
    "QUESTION_ANS": ["qa_outputs"],
}


def sized_fields(
    cfg: DictConfig, task: Task, settings: TrainConfig, total_steps: int
) -> dict[str, Any]:
    """`method_fields` of a run, with the size that `train.budget` leaves room for.

    Raises:
        InputError: as `method_fields`; the method has no size or the budget is too small.
    """
    fields = method_fields(cfg.method, task.peft_task_type, total_steps)
    if settings.budget is None:
        return fields
    return within_budget(fields, lambda: load_base(cfg.model, task, meta=True), settings.budget)


def train_new_modules(fields: Mapping[str, Any], base: PreTrainedModel) -> dict[str, Any]:
    """`fields` that also train and save what no pretrained weights were found for.

    PEFT does so for the heads that it knows; that of others, or a pooler that a masked language
    model lacks, would stay random and would not be in the file.
    """
    given = fields.get("modules_to_save") or []
    by_peft = HEADS.get(str(fields["task_type"]), ())
    new = [name for name in new_modules(base) if name not in (*given, *by_peft)]
    made = {**fields, "modules_to_save": [*given, *new]} if new else dict(fields)
    excluded = fields.get("exclude_modules") or []
    if takes_every_linear(fields) and not isinstance(excluded, str):
        made["exclude_modules"] = [*excluded, *new_modules(base)]
    return made


def takes_every_linear(fields: Mapping[str, Any]) -> bool:
    """Whether PEFT would target the head as well: it knows only that of a text classifier."""
    everywhere = fields.get("target_modules") == "all-linear" and not method(fields["name"]).own
    return everywhere and str(fields["task_type"]) not in ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")


def wrap_for_run(
    base: PreTrainedModel, arguments: Mapping[str, Any], settings: TrainConfig
) -> PeftModel:
    """`base` with an adapter and new modules that train as well, made as `settings` say.

    Args:
        arguments: of `petl.wrap`, from `wrap_arguments`.
    """
    model = wrap(base, **train_new_modules(arguments, base))
    apply_memory_options(model, settings)
    return model


def apply_memory_options(model: PeftModel, settings: TrainConfig) -> None:
    """Let the layers of a model compute in fewer passes, or keep less, as `settings` say.

    Raises:
        UnsupportedError: the model has no MLP that could keep less.
    """
    if settings.fuse_lora and isinstance(model.base_model, LoraModel):
        fuse_lora(model)
    if settings.recompute_mlp:
        recompute_mlp(model)


def wrap_arguments(
    cfg: DictConfig, splits: Splits, settings: TrainConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """`method_fields`, and batches for a method that looks at data before it begins.

    Those are of `method.calibration_data`, if the method has that field, else of the train rows.

    Raises:
        InputError: as `sized_fields`; the method does not train a sharded model.
    """
    fields = sized_fields(cfg, splits.task, settings, splits.plan(settings).steps)
    config: Any = build_config(**fields)
    refuse_sharding(config, cfg.model.get("quantization"), accelerator)
    if hasattr(config, "calibration_data"):
        fields["calibration"] = calibration_batches(config.calibration_data, cfg.model, splits)
    elif needs_calibration(config):
        fields["calibration"] = FirstBatches(splits, settings, accelerator.device)
    return fields


def check_model(model: PeftModel, settings: TrainConfig) -> None:
    """Raise InputError for settings or data that do not suit this model, or if nothing trains."""
    groups(model, settings)
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
                "without a gradient; say train.gradient_checkpointing=true"
            )


@contextmanager
def for_training(model: PeftModel, settings: TrainConfig) -> Generator[None]:
    """The model in training mode, without a cache of keys, with checkpointing if asked for."""
    base: Any = model.get_base_model()
    kept = getattr(base.config, "use_cache", None)
    if kept is not None:
        base.config.use_cache = False
    kind = settings.gradient_checkpointing
    if kind:
        if kind == "reentrant":  # it follows gradients only from an input that requires one
            base.enable_input_require_grads()
        options = {"use_reentrant": kind == "reentrant"}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
    try:
        yield
    finally:
        model.eval()
        if kind:
            base.gradient_checkpointing_disable()
        if kind == "reentrant":
            base.disable_input_require_grads()
        if kept is not None:
            base.config.use_cache = kept
