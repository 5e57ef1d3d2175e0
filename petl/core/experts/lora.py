"""PEFT's LoRA on stacks of experts: its state, files and switching, with a forward pass of petl's.

PEFT's own adds B A to the weights of all experts in each forward pass, and computes the gradient of
the whole stack. Shapes: E experts, I in, O out, R rank.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import ClassVar, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn

from petl.core.adapter_folder import CONFIG
from petl.core.compat import LoraConfig, ParamWrapper, check_adapters_to_merge
from petl.core.experts.forward import MixedUpdates, Updates, accept_updates
from petl.core.experts.layout import ExpertsLayout, experts_of
from petl.core.experts.proof import check_experts
from petl.core.experts.stacks import has_sides_swapped, stacked_factors, stacks_of
from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.core.layers.mixed_batch import AdapterRows
from petl.errors import InputError, UnsupportedError
from petl.ops.grouped_experts import StackedFactors

logger = logging.getLogger(__name__)


class FusedExperts(SwappedClass, ParamWrapper):
    """Mixin for PEFT's layer around a stack: it passes its factors on to the forward of experts.

    PEFT wraps a layer for one stack around that for the other. Dropout, which PEFT's has none of,
    is that of the rows of each expert.
    """

    computes_as_before: ClassVar[bool] = True

    def forward(
        self,
        x: Tensor,
        *args: object,
        updates: Updates | MixedUpdates | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Compute with the active adapters of this stack, and of those around it, `updates`.

        With `adapter_names`, each row of the batch has its own; see `mixed_forward`.
        """
        if adapter_names is not None and not self.disable_adapters:
            mixed = self._mixed(AdapterRows.of(adapter_names), updates)
            return self.base_layer(x, *args, updates=mixed, **kwargs)
        assert not isinstance(updates, MixedUpdates)
        own = self._update()
        # of a layer around this one, whose base this layer is
        if own is not None:
            updates = {**(updates or {}), self.parameter_name: own}
        if updates is not None:
            kwargs["updates"] = updates
        return self.base_layer(x, *args, **kwargs)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: object
    ) -> None:
        """Add an adapter; PEFT refuses dropout, so it is added afterwards."""
        plain = _without_dropout(config)
        super().update_layer(adapter_name, r, lora_alpha, config=plain, **kwargs)
        _add_dropout(self, adapter_name, config)

    def _mixed(self, rows: AdapterRows, around: Updates | MixedUpdates | None) -> MixedUpdates:
        """Return the updates of each row's adapter, those of the layer around this one included."""
        if self.merged:
            raise InputError(
                "adapter_names cannot be used while adapters are merged; unmerge first"
            )
        found = around.updates if isinstance(around, MixedUpdates) else {}
        own = {
            name: {**found.get(name, {}), self.parameter_name: self.factors(name)}
            for name in rows.distinct
            if name in self.lora_A
        }
        return MixedUpdates(rows, {**found, **own})

    def _update(self) -> StackedFactors | None:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        updates = [self.factors(name) for name in names]
        # they share one product, and so one mask
        rates = {update.dropout for update in updates}
        if len(rates) > 1:
            raise UnsupportedError(
                f"adapters {', '.join(names)} drop different shares of the rows of experts "
                f"({', '.join(map(str, sorted(rates)))}); give them the same lora_dropout, or "
                "train one at a time"
            )
        return StackedFactors.joined(updates) if updates else None

    def factors(self, adapter_name: str) -> StackedFactors:
        """Return the update of an adapter: views of its tensors, A [E, R, I] and B [E, O, R]."""
        base = self.get_base_layer()
        A = cast(Tensor, self.lora_A[adapter_name].weight)
        B = cast(Tensor, self.lora_B[adapter_name].weight)
        swapped = has_sides_swapped(base, _layout(base))
        A, B = stacked_factors(A, B, self.num_experts, swapped=swapped)
        dropout = self.lora_dropout[adapter_name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return StackedFactors(A, B, self.scaling[adapter_name], rate)

    def _deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield weight and update of each expert, as stored, the update at least in float32."""
        weight, update = self.get_param().data, self.factors(adapter_name)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        transposed = _layout(self.get_base_layer()).transposed
        for W, A, B in zip(weight, update.A, update.B, strict=True):
            delta = update.scale * (B.to(W.device, dtype) @ A.to(W.device, dtype))
            yield W, delta.t() if transposed else delta

    def merged_experts(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield weight and weight with the updates of these adapters, of each expert, as stored.

        Both are at least in float32; adapters that this layer lacks are left out.
        """
        own = [self._deltas(name) for name in names if name in self.lora_A]
        for parts in zip(*own, strict=True):
            before = parts[0][0].to(parts[0][1].dtype)
            yield before, before + sum(delta for _, delta in parts)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the weights, one expert at a time.

        Raises:
            ValueError: `safe_merge`, and a sum is not finite; the weights are unchanged then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            # all are computed before one is written
            sums = (W + delta for W, delta in self._deltas(name)) if safe_merge else ()
            if not all(bool(each.isfinite().all()) for each in sums):
                raise ValueError(
                    f"the adapter {name!r} makes weights of experts that are not finite: it is "
                    "damaged; train it again, or merge another one"
                )
            for W, delta in self._deltas(name):
                W.copy_(W + delta)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged updates, one expert at a time."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            # it may have been deleted since
            if name in self.lora_A:
                for W, delta in self._deltas(name):
                    W.copy_(W - delta)


class GroupedExperts(nn.Module):
    """A module of experts for rows of K adapters that train together, those of one side by side.

    Args:
        experts: the module itself.
        layers: the outermost one around it in the model of each adapter.
        names: of the adapters there.
        generators: random numbers of each adapter's dropout; None: the default ones.
    """

    def __init__(
        self,
        experts: nn.Module,
        layers: Sequence[FusedExperts],
        names: Sequence[str],
        generators: Sequence[torch.Generator | None],
    ) -> None:
        super().__init__()
        self.experts = experts
        self.members = tuple(zip(layers, names, strict=True))  # no modules of this one
        self.rows = AdapterRows([str(k) for k in range(len(layers))])
        self.generators = dict(zip(self.rows, generators, strict=True))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Compute as each adapter's own model for its tokens."""
        updates = {str(k): _all_factors(*own) for k, own in enumerate(self.members)}
        mixed = MixedUpdates(self.rows, updates, self.generators)
        return self.experts(*args, updates=mixed, **kwargs)


def _all_factors(layer: nn.Module, adapter_name: str) -> dict[str, StackedFactors]:
    """Return the updates of the stacks of a layer and of those inside it, by parameter."""
    found = {}
    while isinstance(layer, FusedExperts):
        found[layer.parameter_name] = layer.factors(adapter_name)
        layer = layer.base_layer
    return found


def _layout(module: nn.Module) -> ExpertsLayout:
    layout = experts_of(module)
    assert layout is not None
    return layout


def created(
    original: Callable[..., None],
    layer: ParamWrapper,
    base_layer: nn.Module,
    adapter_name: str,
    parameter_name: str,
    config: LoraConfig,
    **kwargs: object,
) -> None:
    """Create PEFT's layer around a parameter; around a stack, with petl's forward pass."""
    # parameters of two dimensions, and stacks without a layout, stay PEFT's
    own = _is_stack(base_layer, parameter_name)
    if config.lora_dropout and not own:
        raise UnsupportedError(
            f"lora_dropout={config.lora_dropout} does not act on {parameter_name} of "
            f"{type(base_layer).__name__}, whose layer of PEFT's has no dropout: set "
            f"lora_dropout=0 (of a saved adapter: in its {CONFIG}), or name targets without it, "
            "such as block-linear"
        )
    given = _without_dropout(config) if own else config
    original(layer, base_layer, adapter_name, parameter_name, config=given, **kwargs)
    if own:
        accept_updates(layer.get_base_layer())
        swap_class(layer, FusedExperts)
        _add_dropout(layer, adapter_name, config)


def saved(original: Callable[..., None], config: LoraConfig, *args: object, **kw: object) -> None:
    """Write a config that PEFT loads; it takes no dropout for stacks, which has no use there."""
    if config.lora_dropout:
        _announce(config.lora_dropout)
        config = _without_dropout(config)
    original(config, *args, **kw)


@cache  # once, not for each checkpoint
def _announce(dropout: float) -> None:
    logger.info(
        "lora_dropout=%s is saved as 0, which PEFT needs to load an adapter of experts; set it "
        "again to train on",
        dropout,
    )


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """Return a copy of a config that PEFT takes for a parameter."""
    plain = copy.copy(config)
    plain.lora_dropout = 0.0
    return plain


def _add_dropout(layer: ParamWrapper, adapter_name: str, config: LoraConfig) -> None:
    if config.lora_dropout:
        layer.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)


def _is_stack(module: nn.Module, name: str) -> bool:
    layout = experts_of(module)
    return layout is not None and name in layout.stacks


def check_stacks(config: PeftConfig, model: nn.Module, no_experts: str) -> None:
    """Check the stacks among the parameters that a LoRA targets; the model is not changed.

    Args:
        no_experts: why the method adapts no stacks with this config; "": it does.

    Raises:
        UnsupportedError: it does not; and as of `check_experts`.
    """
    for stack in stacks_of(config, model):
        check_experts(stack.module, stack.path)
        if no_experts:
            raise UnsupportedError(
                f"{stack.path}.{stack.name} holds the weights of all experts: {no_experts}"
            )
