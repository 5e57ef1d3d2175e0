"""Checks of values: types of config fields, names of adapters and tensors, ranks against shapes."""

import dataclasses
import logging
import math
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Literal, Union

from torch import nn

from petl.core.compat import get_pattern_key
from petl.errors import InputError

logger = logging.getLogger(__name__)


BLOCKS = "layers_to_transform"
COLLECTIONS = (list, set, tuple, range)  # JSON has lists only; a user may give any of them


@cache
def hints_of(config_cls: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a config class.

    Of PEFT's, `layers_to_transform` may also be text here: a share of the blocks, which
    `petl.core.model.targets.resolve_blocks` replaces.
    """
    try:
        hints = typing.get_type_hints(config_cls)
    except NameError:  # annotations of another package, imported under TYPE_CHECKING only
        return {field.name: Any for field in dataclasses.fields(config_cls)}
    if BLOCKS in hints:
        hints[BLOCKS] = list[int] | int | str | None
    return hints


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


# Names of adapters and tensors

BASE = "__base__"  # PEFT's word in `adapter_names` for rows without an adapter
OF_PEFT = ("base_model", "base_layer", "modules_to_save", "original_module")


def check_adapter_name(name: Any, model: nn.Module, tuner: type[Any]) -> None:
    """Raise InputError if an adapter of `model` cannot be called `name`.

    A name is a part of the keys of state dicts, by which PEFT tells adapters apart: of two, saving
    one drops all keys in which the name of the other is a part. It is also a folder's name.

    Args:
        name: the name.
        model: the base model, or a model with adapters.
        tuner: class of the tuner, or of a soft prompt's encoder.
    """
    reason = _reason(name, model, tuner)
    if reason:
        raise InputError(f"adapter_name={name!r} {reason}; choose another, such as 'default'")


def check_tensor_names(name: str, tensors: nn.Module) -> None:
    """Raise InputError if an adapter called `name` has a tensor of that name, for the same reason.

    Args:
        name: the adapter's name.
        tensors: its module, or the one that its layers share.
    """
    parts = {part for key in tensors.state_dict() for part in key.split(".")}
    if name in parts:
        raise InputError(
            f"adapter_name={name!r} is a name of its own tensors; choose another, such as 'default'"
        )


def _reason(name: Any, model: nn.Module, tuner: type[Any]) -> str:
    prefix = getattr(tuner, "prefix", None) or ""
    layer = getattr(tuner, "tuner_layer_cls", None)
    if not isinstance(name, str) or not name.strip():
        return "is not a word"
    if name == BASE:
        return "is reserved: in adapter_names it means rows without an adapter"
    if not name.isprintable() or any(mark in name for mark in "./\\"):
        return (
            "has a dot, a slash or a control character; its tensors and its folder are named by it"
        )
    if hasattr(nn.ModuleDict, name):
        return "is an attribute of nn.ModuleDict, which holds the adapters"
    tensors = (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ()))
    if name in (*OF_PEFT, *tensors) or name.startswith("petl_"):
        return "is a part of the names of PEFT's tensors"
    if name in _parts(model, prefix):
        return f"is a part of the names of the tensors of {type(model).__name__}"
    return ""


def _parts(model: nn.Module, prefix: str) -> set[str]:
    """Return the parts of the names of a model's tensors, those of its adapters left out."""
    containers = ("modules_to_save", *([prefix] if prefix else []))
    found = set()
    for tensors in (model.named_parameters, model.named_buffers):
        for key, _ in tensors(remove_duplicate=False):
            before = ""
            for part in key.split("."):
                # the adapter's name follows that of its container
                if not before.startswith(containers):
                    found.add(part)
                before = part
    return found


# Ranks

# Parameters of an adapter per weight of its layers; assumption: above it, a slip of the keyboard.
MAX_EXCESS = 100


def rank_of(config: Any, key: str, default: Any) -> Any:
    """Return the rank that `rank_pattern` of a config has for module `key`, else `default`."""
    return pattern_value(getattr(config, "rank_pattern", None), key, default)


def pattern_value(pattern: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """Return the value that a pattern of a config has for module `key`, else `default`."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), key), default)


def check_rank(
    config: Any,
    name: str,
    shapes: Mapping[str, tuple[int, int]],
    *,
    linear: bool = True,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Warn about ranks that layers cannot use, and raise for an adapter far larger than they are.

    An update of rank R has R (I + O) parameters, and no layer can use R above min(I, O).

    Args:
        config: of any method.
        name: its field for the rank; one that is absent or null is not checked.
        shapes: both widths of each layer, by module path.
        linear: False for a bottleneck with a non-linearity, which may be wider than the layer.
        ranks: by module path; None: that field and `rank_pattern`, as PEFT reads them.

    Raises:
        InputError: the adapter would have over `MAX_EXCESS` times the parameters of its layers.
    """
    if ranks is None:
        default = getattr(config, name, None)
        if default is None:
            return
        ranks = {key: rank_of(config, key, default) for key in shapes}
    unusable = [key for key, shape in shapes.items() if ranks[key] > min(shape)]
    if not unusable:
        return
    key = max(unusable, key=lambda key: ranks[key] / min(shapes[key]))
    what = f"{name}={ranks[key]} is above {min(shapes[key])}, the smaller width of {key}"
    size = sum(rank * sum(shapes[key]) for key, rank in ranks.items())
    excess = size / sum(a * b for a, b in shapes.values())
    if excess > MAX_EXCESS:
        raise InputError(
            f"{what}: the adapter would have {size:,} parameters, {excess:.0f} times as many as "
            f"the layers that it adapts; use a smaller {name}"
        )
    if linear:
        others = f", and {len(unusable) - 1} more layers are as narrow" if unusable[1:] else ""
        logger.warning("%s, which is the highest rank that its update can have%s", what, others)
