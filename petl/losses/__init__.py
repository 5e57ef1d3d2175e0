"""Extra loss terms that work with any method: one module each, registered on import.

loss = petl.losses.read(cfg.loss)       # checks the config before a model is loaded; None without
model = petl.wrap(base, "mola")
petl.losses.attach(model, loss)         # before the first call of `petl.lifecycle(model)`
petl.lifecycle(model).report(batches)   # metrics on validation batches, before and after training
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from peft import PeftModel

from petl.core.spec.config import require
from petl.core.spec.method import (
    WRAP_ONLY,
    Loss,
    LossConfig,
    build_loss,
    list_losses,
    loss,
    require_effect,
)

__all__ = ["Loss", "LossConfig", "attach", "build_loss", "list_losses", "loss", "read"]


def read(settings: Mapping[str, Any] | None) -> LossConfig | None:
    """Build the loss config from `cfg.loss` (a name and fields); None if there is no extra loss.

    Raises:
        InputError: an unknown loss or field, an invalid value, or a field that sets the method,
            which a run sets by `+method=`.
    """
    if settings is None:
        return None
    fields = {str(key): value for key, value in settings.items()}
    for key in WRAP_ONLY:
        require(
            key not in fields,
            f"loss.{key}={fields.get(key)!r} is for petl.wrap only; here +method=NAME sets the "
            "method: leave it out",
        )
    config = build_loss(fields.pop("name", ""), **fields)
    config.check_driven()
    return config


def attach(model: PeftModel, config: LossConfig | None) -> Any:
    """Attach the loss of `config` to a PeftModel and return its controller; None without one.

    Raises:
        InputError: the model lacks the modules that the loss needs, has such a loss already, or has
            a method with which the loss has no effect.
    """
    if config is None:
        return None
    require_effect(config, type(model.base_model), type(model.active_peft_config))
    return loss(config.name).controller_cls(model, config)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
