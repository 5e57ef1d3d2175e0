"""Checks of values: types of config fields, names of adapters and tensors, ranks against shapes."""

import logging
from collections.abc import Mapping
from typing import TypeVar

from peft import PeftConfig
from torch import nn

from petl.core.compat import get_pattern_key
from petl.core.spec.facts import facts_of
from petl.core.types import Fields
from petl.errors import InputError
from petl.system.values import hints_of

logger = logging.getLogger(__name__)
BLOCKS = "layers_to_transform"
T = TypeVar("T")


def config_hints(config_cls: type) -> Fields:
    """Return the type of each field of a config class.

    `layers_to_transform` may also be text: a share of the blocks, which
    `petl.core.model.targets.resolve_blocks` replaces; and `lora_alpha`, an int in PEFT, a fraction.
    """
    hints = dict(hints_of(config_cls))
    for name, hint in hints.items():
        if hint is int and name.endswith("alpha"):
            hints[name] = float
    if BLOCKS in hints:
        hints[BLOCKS] = list[int] | int | str | None
    return hints


# Names of adapters and tensors

BASE = "__base__"  # PEFT's word in `adapter_names` for rows without an adapter
OF_PEFT = ("base_model", "base_layer", "modules_to_save", "original_module")


def check_adapter_name(name: object, model: nn.Module, tuner: type) -> None:
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


def _reason(name: object, model: nn.Module, tuner: type) -> str:
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


def rank_of(config: PeftConfig, key: str, default: T) -> int | T:
    """Return the rank that `rank_pattern` of a config has for module `key`, else `default`."""
    return pattern_value(facts_of(config).rank_pattern, key, default)


def pattern_value(pattern: Mapping[str, T] | None, key: str, default: T) -> T:
    """Return the value that a pattern of a config has for module `key`, else `default`."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), key), default)


def check_rank(
    config: PeftConfig,
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
