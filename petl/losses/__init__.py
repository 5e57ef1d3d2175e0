"""Extra terms of the training loss that suit any method: one module each, found by import.

loss = petl.losses.read(cfg.loss)       # checked, before a model is loaded; None without one
model = petl.wrap(base, "mola")
petl.losses.attach(model, loss)         # before the loop asks for `petl.lifecycle(model)`
petl.lifecycle(model).report(batches)   # figures on held-out batches, before and after training
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from peft import PeftModel

from petl.core.spec.config import require
from petl.core.spec.losses import (
    WRAP_ONLY,
    Loss,
    LossConfig,
    build_loss,
    list_losses,
    loss,
    require_hooks,
)

__all__ = ["Loss", "LossConfig", "attach", "build_loss", "list_losses", "loss", "read"]


def read(settings: Mapping[str, Any] | None) -> LossConfig | None:
    """The config behind `cfg.loss` (a name and fields); None if there is no extra loss.

    Raises:
        InputError: an unknown loss or field, a value that it cannot use, or a field that names the
            method, which a run has already.
    """
    if settings is None:
        return None
    fields = {str(key): value for key, value in settings.items()}
    for key in WRAP_ONLY:
        require(
            key not in fields,
            f"loss.{key} is for petl.wrap; here the method is that of +method=NAME: leave it out",
        )
    config = build_loss(fields.pop("name", ""), **fields)
    config.check_driven()
    return config


def attach(model: PeftModel, config: LossConfig | None) -> Any:
    """Put the loss of `config` on a finished PeftModel and hand out its controller.

    Raises:
        InputError: the model lacks what the loss is about, has such a loss already, or is called
            in a way that a loss cannot follow.
    """
    if config is None:
        return None
    require_hooks(type(model.base_model), config.name)
    return loss(config.name).controller_cls(model, config)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
