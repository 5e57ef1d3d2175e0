"""Check that a value has the type that a config field is annotated with."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Literal, Union

COLLECTIONS = (list, set, tuple, range)  # JSON has lists only; a user may give any of them


@cache
def hints_of(config_cls: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a config class."""
    try:
        return typing.get_type_hints(config_cls)
    except NameError:  # annotations of another package, imported under TYPE_CHECKING only
        return {field.name: Any for field in dataclasses.fields(config_cls)}


def conforms(value: Any, hint: Any) -> bool:
    """Return True if a value, also one read from JSON, has the type `hint`.

    A bool is no number, a number is finite, any collection stands for a list, set or tuple, and a
    dict for a dataclass. Of a Literal only the types are compared: PEFT's lists are incomplete.

    >>> conforms(2, float), conforms(True, int), conforms(float("nan"), float)
    (True, False, False)
    >>> conforms(["q", "k"], set[str] | str | None), conforms([1], list[str])
    (True, False)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return is_finite(value)
    if origin in (Union, UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) for choice in arguments)
    cls = origin or (type(None) if hint is None else hint)
    if cls in COLLECTIONS:
        return isinstance(value, COLLECTIONS) and _entries_conform(value, cls, arguments)
    if dataclasses.is_dataclass(cls) and isinstance(value, Mapping):
        inner = hints_of(cls)
        return all(key in inner and conforms(v, inner[key]) for key, v in value.items())
    if cls in (dict, Mapping):
        keys, values = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(
            conforms(k, keys) and conforms(v, values) for k, v in value.items()
        )
    if cls in (int, float):
        number = int if cls is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool) and is_finite(value)
    if issubclass(cls, Enum):
        return value in cls.__members__.values() or value in [member.value for member in cls]
    return isinstance(value, cls)


def _entries_conform(value: Any, cls: type, arguments: tuple[Any, ...]) -> bool:
    if cls is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(conforms, value, arguments))
    return all(conforms(entry, arguments[0] if arguments else Any) for entry in value)


def is_finite(value: Any) -> bool:
    """Return True unless a value contains a number that is infinite or NaN."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, COLLECTIONS):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
