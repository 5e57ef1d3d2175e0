"""The tensors of a model's active adapter: as its file names them, and as the model does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from petl.core.adapter_file import is_whole, trained_modules, type_of
from petl.core.compat import BaseTunerLayer
from petl.errors import InputError, ModuleKindError


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter without full weights.

    Attributes:
        state: by name in the file.
        live: for each name in the file, the name in the model.
    """

    state: dict[str, Tensor]
    live: dict[str, str]


def active_adapter(model: nn.Module) -> tuple[PeftModel, str]:
    """Return an adapted model and the name of its active adapter.

    Raises:
        InputError: the model has no adapter, or several active ones.
    """
    if not isinstance(model, PeftModel):
        raise ModuleKindError(f"{type(model).__name__} has no adapter; wrap it, or petl.load one")
    active = model.active_adapters
    if len(active) != 1:
        raise InputError(f"the adapters {active} are active; set one, with set_adapter")
    return model, active[0]


def adapter_tensors(model: nn.Module) -> AdapterTensors:
    """Return the floating-point tensors of the active adapter.

    Raises:
        InputError: the model has none, or its file holds other tensors than the model does.
    """
    model, name = active_adapter(model)
    inside: dict[str, Tensor] = model.state_dict(keep_vars=True)
    named = {id(tensor): live for live, tensor in inside.items()}
    entries: Mapping[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=dict(inside), adapter_name=name, save_embedding_layers=False
    )
    heads = {*trained_modules(model, name), *filter(is_whole, entries)}
    state = {k: t for k, t in entries.items() if k not in heads and t.is_floating_point()}
    for key, tensor in state.items():
        # a method that codes its tensors, or sums some, saves others than it computes with
        if id(tensor) not in named:
            raise InputError(
                f"{type_of(model)} saves {key} in a format of its own, so that levels cannot be "
                "put into the model"
            )
    if not state:
        raise InputError(f"{type_of(model)} saves no floating-point tensor besides trained heads")
    live = {key: named[id(tensor)] for key, tensor in state.items()}
    return AdapterTensors({k: t.detach() for k, t in state.items()}, live)


def grouped(model: PeftModel, live: Mapping[str, str]) -> dict[str, list[str]]:
    """Return names in the file by adapted module; of other tensors, by the module that has them.

    Returns:
        By path in the base model, names in the order of the file.
    """
    layers = {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    groups: dict[str, list[str]] = {}
    for key, name in sorted(live.items()):
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        path = next((path for path in paths if path in layers), paths[0])
        # tensors that layers share belong to the tuner, outside the base model
        name = path.removeprefix("base_model.").removeprefix("model.")
        groups.setdefault(name, []).append(key)
    return groups


def config_of(model: PeftModel, name: str) -> Any:
    """Return the config of an adapter; of any class, since methods have fields of their own."""
    return model.peft_config[name]
