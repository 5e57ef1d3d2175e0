"""The switches of a model that training sets, and puts back."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from petl.core.lifecycle import extra_losses
from petl.errors import InputError
from petl.runs.settings import TrainConfig
from petl.tasks.packing import check_texts_apart, packs
from petl.training.optimizer import groups


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
        check_texts_apart(model, base)
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
