"""Trained norms: in mixed batches, where PEFT computes linear layers by row, and on unloading."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import ModulesToSaveWrapper
from petl.core.layers.class_swap import SwappedClass
from petl.errors import InputError


class TrainedNorm(SwappedClass, ModulesToSaveWrapper):
    """Mixin for PEFT's wrapper of a norm: with `adapter_names`, each row has its adapter's norm.

    Rows of an adapter that trains no norm, and of `__base__`, have the original one.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
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
