"""A classification head of few bits: the copy of it that PEFT trains, quantised, without a bias."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import ModulesToSaveWrapper
from petl.errors import ModuleKindError, UnknownNameError, did_you_mean

NAMES = ("classifier", "score", "head")


def find_head(model: nn.Module, name: str | None) -> str:
    """The name of the head of `model`: `name`, or the first of `NAMES` that it has.

    Raises:
        UnknownNameError: there is none.
        ModuleKindError: it is not one linear layer.
    """
    modules = dict(model.named_modules())
    found = next((n for n in ([name] if name else NAMES) if n in modules), None)
    if found is None:
        raise UnknownNameError(
            f"the model has no module {name!r} to be the head" + did_you_mean(name, modules)
            if name
            else f"the model has no {', '.join(NAMES[:-1])} or {NAMES[-1]}; name its last layer "
            "with head_module, or leave out head_bits"
        )
    head = modules[found]
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module
    if type(head) is not nn.Linear:
        raise ModuleKindError(
            f"{found} is {type(head).__name__}, not nn.Linear; head_bits is for a head of one "
            "linear layer, leave it out"
        )
    return found


class QuantisedHead(ModulesToSaveWrapper):
    """The wrapper of a head whose weights the tuner saves and loads, in few bits.

    Attributes:
        low_bit: names of the adapters whose head it is.
    """

    low_bit: set[str]

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> Any:
        if adapter_name in self.low_bit:
            return {}
        return super().adapter_state_dict(adapter_name, state_dict)

    def adapter_state_dict_load_map(self, adapter_name: str) -> Any:
        if adapter_name in self.low_bit:
            return {}
        return super().adapter_state_dict_load_map(adapter_name)

    @torch.no_grad()
    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The active head as a plain layer like the original, of the weights it computes with."""
        module: Any = super().unload_and_optionally_merge_module(*args, **kwargs)
        spot = module.__dict__.get("spots", {}).get("weight")
        if spot is None:
            return module
        plain = copy.deepcopy(self.original_module)
        plain.weight.copy_(spot.read())
        if plain.bias is not None:
            plain.bias.zero_()
        return plain


def take_head(model: nn.Module, name: str, adapter_name: str) -> nn.Linear:
    """The copy of the head `name` that belongs to an adapter, now without a bias."""
    wrapper: Any = model.get_submodule(name)
    if not isinstance(wrapper, QuantisedHead):
        wrapper.__class__ = QuantisedHead
        wrapper.low_bit = set()
    wrapper.low_bit.add(adapter_name)
    head = wrapper.modules_to_save[adapter_name]
    head.bias = None
    return head
