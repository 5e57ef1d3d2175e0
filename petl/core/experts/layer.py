"""Adapters of petl's methods on stacked experts: one for each expert, as on a linear layer.

Shapes: S rows (a token once for each of its experts), E experts, I in, O out, R rank.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from petl.core.experts.forward import MixedUpdates, Update, UpdatedExperts
from petl.core.experts.linears import add_linears, drop_unused, linears_of
from petl.core.experts.proof import check_experts
from petl.core.layers.class_swap import outside_adapter_dicts, restore_class, swap_class
from petl.core.layers.grouped import stacked_factors
from petl.core.layers.layer import Adapter, AdapterLayer, refuse_conversion
from petl.core.layers.mixed_batch import AdapterRows
from petl.errors import InputError
from petl.ops.expert_linear import ExpertLinear
from petl.ops.grouped_experts import ExpertRows, StackedFactors


class ExpertLayer(AdapterLayer):
    """An `AdapterLayer` around the linear layer of one expert, whose weight is a slice."""

    def get_base_weight(self) -> Tensor:
        """Return a copy of the weight [O, I]; merging writes into the slice that it is of."""
        return super().get_base_weight().clone()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write the weight [O, I] into the stack."""
        base = self.get_base_layer()
        if isinstance(base, ExpertLinear):
            base.store(weight_data)
        else:  # a copy of the layer alone
            super().set_base_weight(weight_data)

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Refuse: PEFT has no LoRA on the layer of one expert."""
        reason = "PEFT's own conversion has no stacks of experts; use petl export --lora"
        return refuse_conversion(reason, adapter_name)


class AdaptedExperts(UpdatedExperts):
    """A module of experts that computes with the active adapters of its `linears`."""

    computes_as_before: ClassVar[bool] = False
    holds_adapters: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute with the active adapters, or with `adapter_names`; without any, as before."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return super().forward(*args, updates=dict(self._updates()) or None, **kwargs)
        rows = AdapterRows.of(names)
        each = {name: dict(self._updates(name)) for name in rows.distinct}
        return super().forward(*args, updates=MixedUpdates(rows, each), **kwargs)

    def _updates(self, adapter_name: str = "") -> Iterator[tuple[str, Update]]:
        """Yield the updates of the stacks by one adapter, or by the active ones."""
        linears = linears_of(cast(nn.Module, self))
        if linears is None:
            return
        for name in linears._modules:
            update = update_of(linears.layers(name), adapter_name)
            if update is not None:
                yield name, update


def has_adapted_experts(model: nn.Module) -> bool:
    """Return True if a method of petl has an adapter on experts."""
    return any(isinstance(module, AdaptedExperts) for module in outside_adapter_dicts(model))


def expand(model: nn.Module, stacks: Sequence[str]) -> None:
    """Give the stacks at these paths of parameters the layers that adapters are put on.

    Raises:
        ModuleKindError, UnsupportedError: as `check_experts`; nothing is changed.
    """
    owners = {path: model.get_submodule(path) for path in {s.rpartition(".")[0] for s in stacks}}
    layouts = {path: check_experts(module, path) for path, module in owners.items()}
    for stack in stacks:
        path, _, name = stack.rpartition(".")
        add_linears(owners[path], layouts[path], name)
        swap_class(owners[path], AdaptedExperts)


def collapse(model: nn.Module) -> None:
    """Undo `expand` for the stacks without an adapter."""
    for module in [m for m in model.modules() if linears_of(m) is not None]:
        if drop_unused(module):
            restore_class(module, AdaptedExperts)


def update_of(layers: Sequence[nn.Module], adapter_name: str = "") -> Update | None:
    """Return what adapters of the layers of a stack change; None: nothing.

    Args:
        adapter_name: of one adapter; "": the active ones.
    """
    first = layers[0]
    if not isinstance(first, AdapterLayer):
        return None
    own = cast(Sequence[AdapterLayer], layers)
    if first.disable_adapters and first.merged_adapters:
        for layer in own:
            layer.unmerge()
    if adapter_name and first.merged_adapters:
        raise InputError("adapter_names cannot be used while adapters are merged; unmerge first")
    if first.disable_adapters or first.merged_adapters:
        return None
    wanted = [adapter_name] if adapter_name else first.active_adapters
    names = [name for name, _ in first.pick(wanted)]
    if not names:
        return None
    for layer in own if len(names) > 1 else ():
        layer.refuse_combination(names)
    updates = [factors_of([cast(Adapter, layer.adapters[name]) for layer in own]) for name in names]
    plain = [update for update in updates if update is not None]
    # dropout of several adapters draws a mask for each
    drops = len(plain) > 1 and any(update.dropout for update in plain)
    if len(plain) == len(updates) and not drops:
        return StackedFactors.joined(plain)
    return partial(each_alone, own, adapter_name=adapter_name)


def factors_of(adapters: Sequence[Adapter]) -> StackedFactors | None:
    """Return the factors of the experts of a stack; None if they do not determine the output."""
    if any(adapter.info.layer.captures for adapter in adapters[:1]):
        return None
    first = adapters[0].plain_factors()
    if first is None:
        return None
    factors = [first, *(adapter.plain_factors() for adapter in adapters[1:])]
    A, B, scales, _ = stacked_factors(factors)
    if len(set(scales)) == 1:
        return StackedFactors(A, B, scales[0], adapters[0].drop_rate)
    scale = torch.tensor(scales, dtype=B.dtype, device=B.device)
    return StackedFactors(A, B * scale[:, None, None], 1.0, adapters[0].drop_rate)


# an expert gets another number of rows in each pass, for which a graph would be compiled again
@torch.compiler.disable
def each_alone(
    layers: Sequence[AdapterLayer], x: Tensor, rows: ExpertRows, *, adapter_name: str = ""
) -> Tensor:
    """Return the outputs [S, O] of the adapted layers of all experts for the rows x [S, I].

    In training also those without rows compute: their tensors get gradients of zero, and all
    processes run the same collectives.
    """
    is_trained = torch.is_grad_enabled() and layers[0].training
    context = cast(Adapter, next(iter(layers[0].adapters.values()))).info.context
    parts, start = [], 0
    for layer, end in zip(layers, rows.ends, strict=False):
        if end > start or is_trained:
            tokens = None if rows.tokens is None else rows.tokens[start:end]
            own = x[start:end]
            names = {"adapter_names": [adapter_name] * len(own)} if adapter_name else {}
            with context.only_tokens(tokens, rows.total):
                parts.append(layer(own, **names))
        start = end
    if start < len(x) or not parts:
        parts.append(x.new_zeros(len(x) - start, layers[0].out_features))
    return torch.cat([part.to(parts[0].dtype) for part in parts])
