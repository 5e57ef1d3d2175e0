"""Groups of settings as plain dictionaries; `petl.system.values` makes dataclasses of them."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from petl.errors import InputError, first_line


def plain(cfg: DictConfig | Mapping[str, object]) -> dict[str, Any]:
    """Convert settings to a plain dictionary with interpolations resolved.

    Raises:
        InputError: an interpolation refers to a missing key, or a value is still `???`.
    """
    if not isinstance(cfg, DictConfig | Mapping):
        raise InputError(f"{cfg!r} is not a group of settings: write GROUP.SETTING=VALUE")
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to one dictionary with dotted names."""
    entries: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            entries |= flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries
