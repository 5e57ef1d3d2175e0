"""The model that a run trains: base with adapter, checked, in training mode."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from petl.config.method_fields import method_fields
from petl.core.compat import SEQ_CLS_HEAD_NAMES, LoraModel
from petl.core.dry_run import check_on_shapes
from petl.core.layers.recompute import recompute_mlp
from petl.core.layers.segment_loss import TOKENS, has_frozen_head, refusal, segment_loss
from petl.core.lifecycle import extra_losses
from petl.core.registry import build_config, method, needs_calibration, wrap
from petl.core.switching.lora import fuse_lora
from petl.distributed.launch import refuse_sharding
from petl.errors import InputError
from petl.models.loading import load_base, new_modules
from petl.runs.run_config import RunConfig
from petl.runs.settings import TrainConfig
from petl.tasks.base import Task, packs
from petl.tasks.packing import check_packed_texts_isolated
from petl.training.budget import within_budget
from petl.training.calibration import calibration_batches
from petl.training.dataloader import FirstBatches, Splits
from petl.training.optimizer import groups

# by PEFT's task type: names of heads that PEFT trains and saves by itself
HEADS = {
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
    model lacks, would keep random weights that are not saved.
    """
    chosen = fields.get("modules_to_save") or []
    by_peft = HEADS.get(str(fields["task_type"]), ())
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


def wrap_for_run(
    base: PreTrainedModel, arguments: Mapping[str, Any], settings: TrainConfig
) -> PeftModel:
    """Return `base` with an adapter and trainable new modules.

    Args:
        arguments: of `petl.wrap`, from `wrap_arguments`.
    """
    # new modules are known only once the weights are loaded
    model = wrap(base, **train_new_modules(arguments, base))
    # of a model of the Hub: the commit that was loaded, whatever its branch may be later
    model.active_peft_config.revision = getattr(base, "petl_commit", None)
    apply_memory_options(model, settings)
    return model


def apply_memory_options(model: PeftModel, settings: TrainConfig) -> None:
    """Fuse LoRA layers, recompute MLP activations and segment the loss as `settings` ask for.

    Raises:
        UnsupportedError: the model has no MLP block that could recompute, or is no causal LM whose
            loss could be computed in segments.
    """
    # the tuner of PEFT's LoRA, of which DoRA and others are variants
    if settings.fuse_lora and isinstance(model.base_model, LoraModel):
        fuse_lora(model)
    if settings.recompute_mlp:
        recompute_mlp(model)
    tokens, base = settings.loss_segment, model.get_base_model()
    if tokens == "auto":
        tokens = TOKENS if refusal(base) is None and has_frozen_head(base) else None
    if tokens is not None:
        segment_loss(model, int(tokens))


def wrap_arguments(run: RunConfig, splits: Splits, accelerator: Accelerator) -> dict[str, Any]:
    """Return the arguments of `petl.wrap`: method fields, and batches for calibration if needed.

    Those are of `method.calibration_data`, if the method has that field, else of the train rows.

    Raises:
        InputError: as `sized_fields`; the method does not train a sharded model.
    """
    fields = sized_fields(run, splits.task, splits.sampler(run.train).steps)
    config: Any = build_config(**fields)
    refuse_sharding(config, run.model.quantization, accelerator)

    def build() -> PreTrainedModel:
        return load_base(run.model, splits.task, meta=True)

    check_on_shapes(build, train_new_modules(fields, build()))  # before weights are loaded
    if hasattr(config, "calibration_data"):
        fields["calibration"] = calibration_batches(config.calibration_data, run.model, splits)
    elif needs_calibration(config):
        fields["calibration"] = FirstBatches(splits, run.train, accelerator.device)
    return fields


def check_model(model: PeftModel, settings: TrainConfig) -> None:
    """Raise InputError if settings or data do not fit this model, or if nothing is trainable."""
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


@contextmanager
def for_training(model: PeftModel, settings: TrainConfig) -> Generator[None]:
    """Inside the block: training mode, no KV cache, gradient checkpointing as configured."""
    base: Any = model.get_base_model()
    use_cache = getattr(base.config, "use_cache", None)
    if use_cache is not None:
        base.config.use_cache = False
    kind = settings.gradient_checkpointing
    if kind:
        if kind == "reentrant":  # it needs an input that requires a gradient
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
        # undo both: evaluation and saving expect the model as it was
        if kind == "reentrant":
            base.disable_input_require_grads()
        if use_cache is not None:
            base.config.use_cache = use_cache
