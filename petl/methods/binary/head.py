"""Quantized classification head: the copy of the head that PEFT trains, without its bias."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import ModulesToSaveWrapper
from petl.errors import ModuleKindError, UnknownNameError, did_you_mean

NAMES = ("classifier", "score", "head")


def find_head(model: nn.Module, name: str | None) -> str:
    """Name of the model's head: `name`, or the first of `NAMES` that the model has.

    Raises:
        UnknownNameError: there is no such module.
        ModuleKindError: the module is not an `nn.Linear`.
    """
    modules = dict(model.named_modules())
    found = next((n for n in ([name] if name else NAMES) if n in modules), None)
    if found is None:
        raise UnknownNameError(
            f"head_module={name!r} is not a module of the model" + did_you_mean(name, modules)
            if name
            else f"the model has no module {', '.join(NAMES[:-1])} or {NAMES[-1]}; name its last "
            "layer with head_module, or leave out head_bits"
        )
    head = modules[found]  # the module itself, or PEFT's wrapper of an earlier adapter
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module
    if type(head) is not nn.Linear:
        raise ModuleKindError(
            f"{found} is {type(head).__name__}, not nn.Linear; head_bits supports heads of one "
            "linear layer only: leave it out"
        )
    return found


class QuantizedHead(ModulesToSaveWrapper):
    """PEFT's wrapper of a head, for adapters whose quantized head the tuner saves and loads.

    Attributes:
        low_bit: names of the adapters with a quantized head.
    """

    low_bit: set[str]

    # The tuner writes these weights as codes, so PEFT must not write or expect them.

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> object:
        """The entries to save; none for a quantized head."""
        if adapter_name in self.low_bit:
            return {}
        return super().adapter_state_dict(adapter_name, state_dict)

    def adapter_state_dict_load_map(self, adapter_name: str) -> object:
        """The entries to load; none for a quantized head."""
        if adapter_name in self.low_bit:
            return {}
        return super().adapter_state_dict_load_map(adapter_name)

    def delete_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Delete an adapter's head; a later adapter may have the name."""
        super().delete_adapter(adapter_name, *args, **kwargs)
        self.low_bit.discard(adapter_name)

    @torch.no_grad()
    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The active head as a layer like the original one, with the quantized weights."""
        module = super().unload_and_optionally_merge_module(*args, **kwargs)
        quantized = module.__dict__.get("quantized_weights", {}).get("weight")
        if quantized is None:
            return module
        head = copy.deepcopy(self.original_module)
        head.weight.copy_(quantized.read())
        if head.bias is not None:
            head.bias.zero_()  # the quantized head has none
        return head


def prepare_head(model: nn.Module, name: str, adapter_name: str) -> nn.Linear:
    """Remove the bias of the adapter's copy of the head `name`, and return that copy."""
    wrapper: Any = model.get_submodule(name)
    if not isinstance(wrapper, QuantizedHead):
        wrapper.__class__ = QuantizedHead  # PEFT creates the wrapper; it has no hook for its class
        wrapper.low_bit = set()
    wrapper.low_bit.add(adapter_name)
    head = wrapper.modules_to_save[adapter_name]
    head.bias = None  # as the authors' bi-head
    return head
