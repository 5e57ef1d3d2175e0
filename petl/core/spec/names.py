"""Names of adapters: what PEFT, its state dicts or its folders would take for something else."""

from typing import Any

from torch import nn

from petl.errors import InputError

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
