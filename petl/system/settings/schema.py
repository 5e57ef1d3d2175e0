"""Typed settings: values of a YAML file or a command line, checked against a dataclass.

`read_fields(Files, cfg.data, "data")` returns an instance of `Files` or raises an `InputError` that
names the setting as the user wrote it (`data.test_share=often`).
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from petl.errors import InputError, UnknownNameError, did_you_mean, first_line

T = TypeVar("T")

# Of integers, all of which count or bound something: far above what runs, and exact in float64.
LARGEST = 10**12

# Settings that had another name in version 0.1: the old name is refused with the new one, and is
# read from the files of old runs (`with_new_names`).
RENAMED = {"train.frozen_head": "train.linear_probe"}


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
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


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to one dictionary with dotted names."""
    entries: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            entries |= flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def with_new_names(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the nested settings of an old run with the present names (`RENAMED`)."""
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        name = RENAMED.get(f"{prefix}{key}")
        nested = isinstance(value, Mapping)
        renamed[key if name is None else name.rpartition(".")[2]] = (
            with_new_names(value, f"{prefix}{key}.") if nested else value
        )
    return renamed


def read_fields(kind: type[T], settings: Mapping[str, Any], group: str) -> T:
    """Build an instance of the dataclass `kind` from `settings`.

    Null counts as not given, except where the field's type allows it.

    Args:
        group: the word before the dot in messages: "train" for `train.lr`.

    Raises:
        InputError: an unknown setting, a missing one, or a value of another type.
    """
    assert is_dataclass(kind)
    known = {field.name: field for field in fields(kind) if field.init}
    for key in settings:
        if key not in known:
            raise unknown_setting(f"{group}.{key}", known)
    # a YAML lists every setting, with null for "the default"
    given = {
        key: value
        for key, value in settings.items()
        if value is not None or NoneType in get_args(known[key].type)
    }
    for name, field_ in known.items():
        if name not in given and field_.default is MISSING and field_.default_factory is MISSING:
            raise InputError(f"{group}.{name} is not given: set {group}.{name}=...")
    return kind(**typed(kind, given, group))


def unknown_setting(key: str, known: Mapping[str, Any]) -> UnknownNameError:
    """Return the error for the setting `key`; `known` holds the last parts of names it may have."""
    if key in RENAMED:
        return UnknownNameError(f"{key} was renamed: use {RENAMED[key]}")
    name = key.rpartition(".")[2]
    return UnknownNameError(f"no setting {key}{did_you_mean(name, known)}")


def typed(kind: type[Any], given: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Convert values to the types of their fields: `"4"` for an int is 4, `4.5` is an error."""
    # OmegaConf converts and checks each value when it is assigned
    schema, key = copy.deepcopy(structured(kind)), ""
    try:
        for key, value in given.items():
            schema[key] = value
    except OmegaConfBaseException as error:
        wanted = next(field.type for field in fields(kind) if field.name == key)
        name = getattr(wanted, "__name__", str(wanted).replace("None", "null"))
        raise InputError(f"{group}.{key}={given[key]!r} is not of type {name}") from error
    container = OmegaConf.to_container(schema)
    assert isinstance(container, dict)
    for key in given:
        if isinstance(container[key], int) and abs(container[key]) > LARGEST:
            raise InputError(
                f"{group}.{key}={container[key]} is out of range: no number of a run is beyond "
                f"{LARGEST:,}"
            )
    return {key: container[key] for key in given}


@cache  # reading the annotations takes ten times as long as copying the result
def structured(kind: type[Any]) -> DictConfig:
    """The fields of a dataclass with their types and defaults, as OmegaConf checks them."""
    schema = OmegaConf.structured(kind)
    OmegaConf.set_readonly(schema, False)  # the schema of a frozen dataclass is read-only
    return schema


# Bounds of a field


@dataclass(frozen=True)
class Rule:
    """The values that a setting may have, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Rule":
        """Return the same rule, which also allows null."""
        return Rule(f"{self.words}, or null", lambda value: value is None or self.holds(value))


def integer(low: int) -> Rule:
    """Rule for integers from `low`; the type is checked by `typed`."""
    return Rule(f"an integer from {low}", lambda value: value >= low)


def real(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """Rule for finite numbers from `low` (with `above`: greater than it) to `high`."""
    words = f"a number {'above' if above else 'from'} {low:g}"
    words += f" to {high:g}" if high < math.inf else ""
    return Rule(
        words,
        # YAML reads .inf and .nan as numbers
        lambda x: math.isfinite(x) and (low < x if above else low <= x) and x <= high,
    )


def one_of(*options: Any) -> Rule:
    """Rule for a value that is one of `options`, booleans in YAML's spelling."""
    # `is`: 1 == True, and the words are shown as YAML has them
    words = ", ".join("true" if o is True else "false" if o is False else o for o in options)
    return Rule(f"one of {words}", lambda value: value in options)


def setting(default: Any, rule: Rule) -> Any:
    """Declare a dataclass field with a rule for its values; `check_rules` applies it."""
    return field(default=default, metadata={"rule": rule})


def check_rules(settings: Any, group: str) -> None:
    """Check the rule of each field of a dataclass.

    Raises:
        InputError: a value that its rule does not allow.
    """
    for entry in fields(settings):
        rule, value = entry.metadata["rule"], getattr(settings, entry.name)
        if not rule.holds(value):
            raise InputError(f"{group}.{entry.name}={value!r} is not {rule.words}")
