"""Copies of models: with the same tensors, or without values."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.layers.class_swap import AdapterDict, SwappedClass, original_class
from petl.core.types import base_of
from petl.ops.expert_linear import ExpertLinears

M = TypeVar("M", bound=nn.Module)
ADAPTERS = (AdapterDict, ExpertLinears)  # of a block, and of experts


def share_weights(model: M) -> M:
    """Return a copy of the modules of `model` that has the same parameters and buffers.

    A change of a weight in place, such as a merged adapter, is a change of all copies.
    """
    # entries of the memo are taken as copies that exist already
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class _Copier:
    """Copies modules without values, and their configs; what is used in two places is copied once.

    Parameters of a class of their own, such as quantized or sharded ones, are shared.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.copies: dict[int, Any] = {}

    def of_module(self, module: Any) -> Any:
        """Copy a module without its hooks and adapters; other attributes are shared with it."""
        if isinstance(module, BaseTunerLayer):
            return self.of_module(module.get_base_layer())
        if isinstance(module, AuxiliaryTrainingWrapper):
            return self.of_module(module.original_module)
        if module is None or id(module) in self.copies:
            return self.copies.get(id(module))
        cls: Any = (
            original_class(module)
            if isinstance(module, SwappedClass) and module.holds_adapters
            else type(module)
        )
        self.copies[id(module)] = clone = cls.__new__(cls)
        for name, value in vars(module).items():
            # a method would otherwise add its hooks to the model itself
            if isinstance(value, dict):
                value = type(value)() if "hooks" in name else copy.copy(value)
            elif name == "config":  # PEFT writes into it: the number of replicated layers, ...
                value = self.copies.setdefault(id(value), copy.copy(value))
            clone.__dict__[name] = value
        clone._parameters = {k: self.of_tensor(p) for k, p in module._parameters.items()}
        clone._buffers = {k: self.of_tensor(b) for k, b in module._buffers.items()}
        clone._modules = {
            k: self.of_module(m) for k, m in module._modules.items() if not isinstance(m, ADAPTERS)
        }
        return clone

    def of_tensor(self, tensor: Tensor | None) -> Tensor | None:
        """Copy a tensor's shape and dtype."""
        if tensor is None or type(tensor) not in (nn.Parameter, Tensor):
            return tensor
        if id(tensor) not in self.copies:
            empty = torch.empty_like(tensor, device=self.device)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            self.copies[id(tensor)] = empty
        return self.copies[id(tensor)]


def skeleton_of(model: nn.Module, device: str = "meta") -> nn.Module:
    """Return a copy of a model without values, without adapters and without hooks.

    It shares with the model all attributes that are neither modules, tensors nor configs, so it is
    for adding an adapter and looking at its tensors, not for running.
    """
    return _Copier(device).of_module(base_of(model))
