"""Trained norms in mixed batches: PEFT computes linear layers by row, but no norms."""

from typing import Any

import torch
from torch import Tensor

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
