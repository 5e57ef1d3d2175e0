"""What a method trains on one layer, and the layer that hosts it.

Shapes: I in, O out, R rank. An `Adapter` is a plain module with plain parameters and buffers; an
`AdapterLayer` holds one per adapter name and is the only place that switches, mixes and merges.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petl.core.compat import (
    BaseTunerLayer,
    check_adapters_to_merge,
    resolve_quantization_backend,
)
from petl.core.layers.adapter_dict import AdapterDict
from petl.core.layers.context import ForwardContext, InputCapture
from petl.core.serving.mixed_batch import AdapterRows, BatchedAdapter
from petl.errors import InputError
from petl.ops.low_rank import LowRankRows, add_low_rank, linear_with_low_rank, owns_output

HALF = (torch.float16, torch.bfloat16)
Thing = TypeVar("Thing")


class LayerShape(NamedTuple):
    """Widths of a linear layer."""

    in_features: int
    out_features: int


class Factors(NamedTuple):
    """An update `scale * B A` with A [R, I] and B [O, R]."""

    A: Tensor
    B: Tensor
    scale: float


def is_lora_b(name: str) -> bool:
    """Whether the parameter called `name` is the B of low-rank pairs, which LoRA+ trains faster.

    That is `lora_B`, or `pool_B_<group>` where layers draw theirs from a pool.
    """
    return "lora_B" in name or ".pool_B_" in name


@dataclass
class LayerInfo:
    """Where an adapter stands and what it shares with others; plain data, never saved.

    Attributes:
        key: path of the adapted module in the base model.
        adapter_name: the adapter's name in the model.
        context: what all layers share during a forward pass.
        shared: tensors of this adapter that all its layers share, owned by the tuner; None if none.
        settings: what the method's `MethodTuner.layer_settings` gives for this module.
    """

    key: str
    adapter_name: str
    context: ForwardContext
    shared: nn.Module | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Adapter(nn.Module):
    """One method's state on one linear layer of weight [O, I].

    Override `factors` if the update is a low-rank product: the forward pass, merging and the export
    to LoRA follow. Override `forward` (and `delta`, if the update is one matrix for all inputs)
    otherwise. Parameters are created in float32; `x` and `y` come in the base model's dtype, and
    products are done in theirs.
    """

    merge_refusal: ClassVar[str | None] = None  # why the method cannot merge, if it cannot
    keep_float32: ClassVar[bool] = False  # parameters never take the base model's half precision
    start_tolerance: ClassVar[float] = 0.0  # how far outputs at the start may be off the base's
    of_own_rows: ClassVar[tuple[str, ...]] = ()  # buffers about the rows of one process alone

    def __init__(self, shape: LayerShape, config: Any, info: LayerInfo) -> None:
        super().__init__()
        self.shape = shape
        self.info = info

    def factors(self) -> Factors | None:
        """The update as low-rank factors, or None if it has none."""
        return None

    def delta(self) -> Tensor:
        """The update to the weight, [O, I]; for merging and export, never for a forward pass."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} has neither factors nor a delta")
        return factors.scale * (factors.B @ factors.A)

    @property
    def drop_rate(self) -> float:
        """Share of its input that the adapter drops now; a method with such a field overrides."""
        return 0.0

    def drop(self, x: Tensor) -> Tensor:
        """`x` after the adapter's own dropout."""
        return F.dropout(x, self.drop_rate) if self.drop_rate > 0 else x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The base layer's output `y` [..., O] for input `x` [..., I], adapted."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} has neither factors nor a forward")
        return add_low_rank(y, self.drop(x), *factors)

    def with_base(self, x: Tensor, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer and update together, [..., O]: what the layer calls for its first adapter.

        Factors beside a plain layer are computed together with it. A method that can do likewise
        overrides this; `forward` then serves where the base layer's output is there already (a
        second active adapter, one adapter per row).
        """
        factors = None if args or kwargs else self.plain_factors()
        if factors is None:
            return self(x, base(x, *args, **kwargs))
        y = linear_with_low_rank(x, base, *factors, self.drop_rate)
        return add_low_rank(base(x), self.drop(x), *factors) if y is None else y

    def plain_factors(self) -> Factors | None:
        """The factors of a method that is nothing but them; None of any other."""
        kind = type(self)
        is_frozen_linear = kind.forward is Adapter.forward and kind.drop is Adapter.drop
        return self.factors() if is_frozen_linear else None

    def tensors(self) -> dict[str, Tensor]:
        """All that it computes with, by name; what its layers share has `pool.` before its name."""
        pool = self.info.shared
        shared = {} if pool is None else _tensors(pool, "pool.")
        return {**_tensors(self, ""), **shared}

    @classmethod
    def batched(cls, adapters: Sequence[Any], dtype: torch.dtype) -> BatchedAdapter | None:
        """What computes all rows of a mixed batch at once, or None: each adapter computes its own.

        Called for inference alone, and what comes back serves until an adapter changes: it gives
        y [G, T, O], into which it may write, for x [G, T, I] in `dtype` and y, where group g of the
        rows goes through `adapters[g]`. These are of this class; some may be there twice.
        """
        found = {adapter: adapter.plain_factors() for adapter in adapters}
        if None in found.values():
            return None
        return LowRankRows.stack([found[adapter] for adapter in adapters], dtype)

    def merge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """A new tensor: the base weight [O, I], or [I, O] if transposed, with the update added."""
        delta = self.delta()
        return _plus(weight, delta.t() if transposed else delta, 1)

    def unmerge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """A new tensor: the base weight with the update that `merge` added taken out again."""
        delta = self.delta()
        return _plus(weight, delta.t() if transposed else delta, -1)


def _tensors(module: nn.Module, before: str) -> dict[str, Tensor]:
    names = (*module._parameters, *module._buffers)
    return {before + name: getattr(module, name) for name in names}


def _plus(weight: Tensor, delta: Tensor, sign: int) -> Tensor:
    if weight.dtype in HALF:  # add in float32 and round once
        return weight.float().add_(delta.float(), alpha=sign).to(weight.dtype)
    return weight.add(delta.to(weight), alpha=sign)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A base layer and its adapters by name.

    The adapters live in one container, `petl_<method>_adapters`, so that a live key reads
    `<module path>.petl_<method>_adapters.<adapter>.<tensor>`. The base is a linear layer, or a
    whole module that maps a tensor to one tensor (a mixture of experts, say).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        prefix: str,
        pools: AdapterDict,
        shape: LayerShape | None = None,
        **quantization: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.captures: dict[
            str, InputCapture
        ] = {}  # by adapter name, if it reads another module's input
        self.slot = f"{prefix}adapters"
        self.add_module(self.slot, AdapterDict())
        self.adapters: dict[str, nn.Module] = self.adapter_dict.all_modules  # by name
        # Shared tensors are the tuner's; PEFT switches and deletes them through this reference,
        # which nn.Module must not register a second time.
        self.__dict__[f"{prefix}pools"] = pools
        self.adapter_layer_names = (self.slot, f"{prefix}pools")
        self.other_param_names = ()
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self.in_features, self.out_features = shape or shape_of(base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)

    @property
    def adapter_dict(self) -> AdapterDict:
        """Where the adapters are."""
        return cast(AdapterDict, self._modules[self.slot])

    def add(self, name: str, adapter: Adapter, *, inference_mode: bool) -> None:
        """Put `adapter` under `name`, on the device of the base layer."""
        self.adapter_dict[name] = adapter
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def pick(self, names: Sequence[str]) -> Iterator[tuple[str, Adapter]]:
        """The adapters among `names` that this layer has."""
        adapters = self.adapters
        return ((n, cast(Adapter, adapters[n])) for n in names if n in adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        plain = self._disable_adapters or self.merged_adapters or names is not None
        adapters = [] if plain else list(self.pick(self.active_adapters))
        if adapters and adapters[0][0] not in self.captures:
            y = adapters.pop(0)[1].with_base(x, self.base_layer, *args, **kwargs)
        else:
            y = self.base_layer(x, *args, **kwargs)
        captured = {name: capture.pop() for name, capture in self.captures.items()}
        if names is not None and not self._disable_adapters:
            return self._forward_mixed(x, y, captured, names)
        for name, adapter in adapters:
            y = adapter(captured.get(name, x), y)
        return y

    def _forward_mixed(
        self, x: Tensor, y: Tensor, captured: Mapping[str, Tensor], names: Sequence[str]
    ) -> Tensor:
        """One adapter per row of the batch; `__base__` stands for none."""
        if len(names) != len(x):
            raise InputError(f"adapter_names has {len(names)} entries for a batch of {len(x)} rows")
        if self.merged_adapters:
            raise InputError(
                "adapter_names cannot be used while adapters are merged; unmerge first"
            )
        rows = AdapterRows.of(names)
        if len(rows.distinct) == 1:
            return next((a(captured.get(n, x), y) for n, a in self.pick(rows.distinct)), y)
        source = _one([captured.get(n, x) for n, _ in self.pick(rows.distinct)]) if captured else x
        if source is not None:
            found = rows.prepared(self, source, self.adapters, self._batched)
            if found is not None:
                return found.compute(source, y, is_own=owns_output(self.base_layer))
        mixed = y.clone()  # one copy, however many adapters
        for name, adapter in self.pick(rows.distinct):
            own = torch.tensor([i for i, n in enumerate(rows) if n == name], device=x.device)
            mixed.index_copy_(0, own, adapter(captured.get(name, x)[own], y[own]))
        return mixed

    def _batched(self, names: Sequence[str], dtype: torch.dtype) -> BatchedAdapter | None:
        adapters = [cast(Adapter, self.adapters[name]) for name in names]
        kind = _one([type(adapter) for adapter in adapters])
        return None if kind is None else kind.batched(adapters, dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update of one adapter as the base weight lies: [O, I], or [I, O] for Conv1D."""
        delta = cast(Adapter, self.adapters[adapter_name]).delta()
        return delta.t() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is one weight update for all inputs."""
        return all(adapter.merge_refusal is None for _, adapter in self.pick([adapter_name]))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of `adapter_names` (the active ones if None) to the base weight.

        Raises:
            ValueError: `safe_merge` and a merged weight is not finite; the base is left as it was.
        """
        for name, adapter in self.pick(check_adapters_to_merge(self, adapter_names)):
            if self.quantization_backend is not None:
                warnings.warn(
                    f"merging into a {self.quantization_backend.backend_name} base quantises it "
                    "again, which rounds the update",
                    stacklevel=2,
                )
            merged = adapter.merge(self.get_base_weight(), transposed=self.fan_in_fan_out)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"adapter {name!r}: merged weight is not finite; base left as is")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged updates out of the base weight again."""
        while self.merged_adapters:
            adapter = cast(Adapter, self.adapters[self.merged_adapters[-1]])
            plain = adapter.unmerge(self.get_base_weight(), transposed=self.fan_in_fan_out)
            self.set_base_weight(plain)
            self.merged_adapters.pop()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what feeds it."""
        if adapter_name in self.captures:
            self.captures.pop(adapter_name).detach()
        super().delete_adapter(adapter_name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Those of the weight; of a whole module, of the first of its floating-point parameters."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            floats = (p for p in base_layer.parameters() if p.is_floating_point())
            first = next(floats, None)
            return (None, None) if first is None else (first.device, first.dtype)
        return device, dtype

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move without casting: the precision of adapters is `_cast_adapter_dtype`'s say."""
        base_device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        target = device if device is not None else base_device
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if target is None or adapter_name not in container:
                continue
            state = container[adapter_name]  # the adapter, and what it shares with other layers
            if not any(t.is_meta for t in (*state.parameters(), *state.buffers())):
                state.to(target)


def _one(things: Sequence[Thing]) -> Thing | None:
    """The first of these, if they are all the same object."""
    return things[0] if things and all(thing is things[0] for thing in things) else None


def shape_of(layer: nn.Module) -> LayerShape:
    """Widths of a linear layer, whatever its kind (quantised ones included)."""
    if isinstance(layer, Conv1D):
        return LayerShape(layer.nx, layer.nf)
    return LayerShape(cast(int, layer.in_features), cast(int, layer.out_features))
