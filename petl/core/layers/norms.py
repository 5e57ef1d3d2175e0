"""Trained norms: in mixed batches, where PEFT computes linear layers by row, and on unloading."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from petl.core.compat import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.errors import InputError


class TrainedNorm(SwappedClass, ModulesToSaveWrapper):
    """Mixin for PEFT's wrapper of a norm: with `adapter_names`, each row has its adapter's norm.

    Rows of an adapter that trains no norm, and of `__base__`, have the original one.
    """

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if names is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        x = args[0]
        if len(x) != len(names):
            raise InputError(f"adapter_names has {len(names)} entries for a batch of {len(x)} rows")
        out = self.original_module(x)
        for name in dict.fromkeys(names):
            if name in self.modules_to_save:
                rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
                norm = self.modules_to_save[name]
                out = out.index_copy(0, rows, norm(x.index_select(0, rows)).to(out.dtype))
        return out


@contextmanager
def original_norms(model: nn.Module) -> Generator[None]:
    """Context in which adapters are removed from `model`; then its norms are the original ones.

    PEFT would leave the trained norms in the model, as it does with heads.
    """
    trained = [(n, m) for n, m in model.named_modules() if isinstance(m, TrainedNorm)]
    yield
    for path, norm in trained:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, norm.original_module)


# Running statistics of a frozen base model, which adapters neither train nor save


logger = logging.getLogger(__name__)


class KeptStatistics(SwappedClass, _BatchNorm):
    """Mixin for a batch norm that stays in evaluation mode unless its weight is trained.

    In training mode it would change its mean and variance, which no adapter file has: the adapter
    would compute something else on the base that it is loaded onto.
    """

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as far as it has a weight to train."""
        trains = any(parameter.requires_grad for parameter in self.parameters())
        return super().train(mode and trains)


def keep_statistics(base: nn.Module) -> None:
    """Let the frozen batch norms of a base model under adapters keep their running statistics."""
    trained = {
        id(module)
        for wrapper in base.modules()
        if isinstance(wrapper, AuxiliaryTrainingWrapper)
        for module in wrapper.modules()
    }
    found = [
        module
        for module in base.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and id(module) not in trained
    ]
    for module in found:
        swap_class(module, KeptStatistics)
        module.train(module.training)
    if found:
        logger.info("%d batch norms of the base keep their running statistics", len(found))
