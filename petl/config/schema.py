"""Typed settings: what a YAML or a command line gave, checked against a dataclass.

`read_fields(Files, cfg.data, "data")` is an instance of `Files`, or an `InputError` that names the
setting as the reader wrote it (`data.test_share=often`).
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from petl.errors import InputError, UnknownNameError, did_you_mean, first_line

T = TypeVar("T")


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a plain dictionary, interpolations resolved.

    Raises:
        InputError: an interpolation points nowhere, or a value is still `???`.
    """
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def read_fields(kind: type[T], settings: Mapping[str, Any], group: str) -> T:
    """An instance of the dataclass `kind` with `settings`; `group` is the word before the dot.

    Null counts as not given, except where the field's type allows it.

    Raises:
        InputError: an unknown setting, one that is lacking, or a value of another type.
    """
    assert is_dataclass(kind)
    known = {field.name: field for field in fields(kind) if field.init}
    for key in settings:
        if key not in known:
            raise UnknownNameError(f"no setting {group}.{key}{did_you_mean(key, known)}")
    given = {
        key: value
        for key, value in settings.items()
        if value is not None or NoneType in get_args(known[key].type)
    }
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{group}.{name} is not given: say {group}.{name}=...")
    return kind(**typed(kind, given, group))


def typed(kind: type[Any], given: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Values as the types of their fields: `"4"` for an int is 4, `4.5` is an error."""
    schema, key = OmegaConf.structured(kind), ""
    OmegaConf.set_readonly(schema, False)  # as those of frozen dataclasses are
    try:
        for key, value in given.items():
            schema[key] = value
    except OmegaConfBaseException as error:
        wanted = next(field.type for field in fields(kind) if field.name == key)
        name = getattr(wanted, "__name__", str(wanted).replace("None", "null"))
        raise InputError(f"{group}.{key}={given[key]!r} is not of type {name}") from error
    container = OmegaConf.to_container(schema)
    assert isinstance(container, dict)
    return {key: container[key] for key in given}
