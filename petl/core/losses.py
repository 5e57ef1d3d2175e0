"""Extra loss terms: read from the settings of a run, attached to a wrapped model."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel

from petl.core.spec.config import require
from petl.core.spec.method import WRAP_ONLY, LossConfig, build_loss, loss, require_effect


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
