"""Adapter, the trained part of a method on one layer, and AdapterLayer, which wraps the layer.

Shapes: I in, O out, R rank. An `Adapter` is a plain module with plain parameters and buffers; an
`AdapterLayer` holds one per adapter name and is the only place that switches, mixes and merges.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petl.core.compat import (
    BaseTunerLayer,
    check_adapters_to_merge,
    resolve_quantization_backend,
)
from petl.core.layers.class_swap import AdapterDict, SwappedClass
from petl.core.layers.context import ForwardContext, InputCapture
from petl.core.layers.mixed_batch import AdapterRows, BatchedAdapter
from petl.core.types import Arguments, Fields
from petl.errors import InputError, ModuleKindError, UnsupportedError
from petl.ops.low_rank import LowRankRows, add_low_rank, linear_with_low_rank, owns_output

if TYPE_CHECKING:
    from petl.core.layers.grouped import InputHook

# dtypes in which a sum with an update loses digits of the update
HALF = (torch.float16, torch.bfloat16)
T = TypeVar("T")


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
    """Return True for the B of low-rank pairs, which LoRA+ trains with a larger learning rate.

    That is `lora_B`, or `pool_B_<group>` where layers take their vectors from a pool.
    """
    return "lora_B" in name or ".pool_B_" in name


@dataclass
class LayerInfo:
    """Position of an adapter in the model and what it shares with others; never saved.

    Attributes:
        key: path of the adapted module in the base model.
        adapter_name: the adapter's name in the model.
        context: state that all layers share during a forward pass.
        shared: tensors of this adapter that all its layers share, owned by the tuner; None if none.
        settings: the entry for this module of the method's `Method.settings`.
        no_lora: why no LoRA has the same outputs; "": one has.
        layer: the layer that holds the adapter.
    """

    key: str
    adapter_name: str
    context: ForwardContext
    shared: nn.Module | None = None
    settings: Fields = field(default_factory=dict)
    no_lora: str = ""
    layer: "AdapterLayer" = field(init=False, repr=False, compare=False)


class Adapter(nn.Module):
    """Parameters and computation of one method on one linear layer of weight [O, I].

    Override `factors` if the update is a low-rank product: the forward pass, merging and the export
    to LoRA follow. Override `forward` (and `delta`, if the update is one matrix for all inputs)
    otherwise. Parameters are created in float32; `x` and `y` have the base model's dtype, and
    products are computed in it.
    """

    keep_float32: ClassVar[bool] = False  # parameters never take the base model's half precision
    start_tolerance: ClassVar[float] = 0.0  # max. difference of outputs to the base at the start
    decays: ClassVar[bool] = True  # False: weight decay leaves its tensors out
    # True: several active adapters of a layer change its output in one call of `together`
    is_joint: ClassVar[bool] = False
    width_dim: ClassVar[int] = -1  # of a whole block's input and output; of feature maps 1
    # buffers with statistics of this process's rows only, which differ between processes
    of_own_rows: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: LayerShape, config: PeftConfig, info: LayerInfo) -> None:
        super().__init__()
        self.shape = shape
        self.info = info

    def check_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError for values in a file that this adapter cannot have.

        A method with tables of indices or statistics overrides it.

        Args:
            tensors: by name in this module, of the right shapes and kinds, and finite.
        """

    def factors(self) -> Factors | None:
        """Return the update as low-rank factors, or None if it is not a low-rank product."""
        return None

    def delta(self) -> Tensor:
        """Return the update to the weight, [O, I]; for merging and export, not for forward passes.

        A dense update in the forward pass would cost more time and memory than the factors.
        """
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} has neither factors nor a delta")
        return factors.scale * (factors.B @ factors.A)

    def change_of(self, weight: Tensor) -> Tensor:
        """Return the update to this base weight, both [O, I]; by default `delta`, for any weight.

        A method that masks the base weight overrides it.
        """
        return self.delta()

    @property
    def is_matrix(self) -> bool:
        """True if the update is a matrix that is added to the base weight, as `change_of` is."""
        # of the method itself: `binary` swaps classes that wrap these
        own: Any = next(cls for cls in type(self).__mro__ if not issubclass(cls, SwappedClass))
        default = Adapter
        return (own.factors, own.delta, own.change_of) != (
            default.factors,
            default.delta,
            default.change_of,
        )

    def combination_refusal(self) -> str | None:
        """Return why no other adapter may be active or merged beside it now; None: others may."""
        return None

    @property
    def drop_rate(self) -> float:
        """Probability with which the adapter drops its input now; methods with dropout override."""
        return 0.0

    def drop(self, x: Tensor) -> Tensor:
        """Return `x` after the adapter's own dropout."""
        return F.dropout(x, self.drop_rate) if self.drop_rate > 0 else x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base layer's output `y` [..., O] for input `x` [..., I], adapted."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} has neither factors nor a forward")
        return add_low_rank(y, self.drop(x), *factors)

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Compute base layer and update in one step, [..., O]: called for the first active adapter.

        By default, low-rank factors on a frozen linear layer run fused with it, and everything else
        as `forward(x, base(x))`. A method with a fused kernel of its own overrides this; `forward`
        is still called where the base output exists already: a second active adapter, one adapter
        per row.

        Args:
            x: input of the layer, [..., I].
            base: the wrapped layer; of a whole block, a `BlockCall`.
            args: further positional arguments of the layer; with any of them nothing is fused.
            kwargs: further keyword arguments of the layer, likewise.
        """
        factors = None if args or kwargs else self.plain_factors()
        if factors is None:
            return self(x, base(x, *args, **kwargs))
        y = linear_with_low_rank(x, base, *factors, self.drop_rate)
        # None: the base layer is not a frozen linear layer without hooks
        return add_low_rank(base(x), self.drop(x), *factors) if y is None else y

    @classmethod
    def together(cls, adapters: Sequence[Self], y: Tensor) -> Tensor:
        """Return the base layer's output `y` [..., O] with several adapters; see `is_joint`."""
        raise NotImplementedError(f"{cls.__name__} has no joint computation")

    def carried(self) -> Arguments:
        """Return further keyword arguments of `with_base`, for the adapter of a whole block.

        They are what blocks before it have left. Taken when the block is called, outside of
        checkpointing, so that a recomputation gets the same values.
        """
        return {}

    def plain_factors(self) -> Factors | None:
        """Return the factors of an adapter that overrides neither `forward` nor `drop`, else None.

        Only then do the factors alone determine the output.
        """
        cls = type(self)
        is_plain = cls.forward is Adapter.forward and cls.drop is Adapter.drop
        return self.factors() if is_plain else None

    def tensors(self) -> dict[str, Tensor]:
        """Return all its tensors by name; shared ones have the prefix `pool.`."""
        pool = self.info.shared
        shared = {} if pool is None else _tensors(pool, "pool.")
        return {**_tensors(self, ""), **shared}

    @classmethod
    def batched(cls, adapters: Sequence[Self], dtype: torch.dtype) -> BatchedAdapter | None:
        """Return a function that computes all rows of a mixed batch together, or None.

        None: each adapter computes its own rows. Called for inference only; the function is used
        until an adapter changes.

        Args:
            adapters: of this class, one per group of rows; an adapter may occur several times.
            dtype: of the input.

        Returns:
            A function of x [G, T, I] and y [G, T, O], which it may overwrite, to the output
            [G, T, O], in which group g went through `adapters[g]`.
        """
        factors = {a: own for a in adapters if (own := a.plain_factors()) is not None}
        if factors.keys() != {*adapters}:
            return None
        # one tensor per group, not per adapter: a batched product needs them contiguous
        return LowRankRows.stack([factors[adapter] for adapter in adapters], dtype)

    @classmethod
    def grouped(
        cls,
        adapters: Sequence[Self],
        base_layer: nn.Module,
        generators: Sequence[torch.Generator | None],
        captured: "InputHook | None",
    ) -> nn.Module:
        """Return the layer that trains several adapters in one pass, each with rows of its own.

        By default, plain factors are computed together on one product of the base layer, and all
        else adapter by adapter.

        Args:
            adapters: of this class, one per group of rows.
            base_layer: the layer that all of them adapt.
            generators: random numbers of each adapter's dropout; None: the default ones.
            captured: the input of another module, if the adapters read that; None: the layer's.
        """
        # imported where adapters train together
        from petl.core.layers.grouped import GroupedAdapters, GroupedFactors

        if captured is None and all(a.plain_factors() is not None for a in adapters):
            return GroupedFactors(base_layer, generators, adapters)
        return GroupedAdapters(base_layer, adapters, generators, captured)

    def merge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """Return a new tensor: the base weight [O, I] ([I, O] if transposed) plus the update."""
        delta = self.delta()
        return _plus(weight, delta.t() if transposed else delta, 1)

    def unmerge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """Return a new tensor: the merged weight minus the update that `merge` added."""
        delta = self.delta()
        return _plus(weight, delta.t() if transposed else delta, -1)


def _tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    names = (*module._parameters, *module._buffers)
    return {prefix + name: getattr(module, name) for name in names}


def _plus(weight: Tensor, delta: Tensor, sign: int) -> Tensor:
    if weight.dtype in HALF:  # add in float32 and round once
        return weight.float().add_(delta.float(), alpha=sign).to(weight.dtype)
    return weight.add(delta.to(weight), alpha=sign)


class FirstOutput:
    """A module that may return several outputs, called for the first of them.

    Attributes:
        others: its further outputs in the last call; None if it returned one tensor, or did not
            run.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.others: tuple[object, ...] | list[object] | None = None

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        output = self.outputs(*args, **kwargs)
        if not isinstance(output, tuple | list):
            return output
        self.others = output[1:]
        return output[0]

    def outputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        return self.module(*args, **kwargs)

    def complete(self, y: Tensor) -> object:
        """Return `y` in the form of the module's output."""
        others = self.others
        if others is None:
            return y
        return [y, *others] if isinstance(others, list) else (y, *others)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """PEFT tuner layer: a base layer and its adapters by name.

    The adapters are in one container, `petl_<method>_adapters`, so that a key of the state dict is
    `<module path>.petl_<method>_adapters.<adapter>.<tensor>`. The base is a linear layer, or a
    larger module whose first output has the width of its input (a mixture of experts, say, which
    may return the scores of its router as well).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        prefix: str,
        pools: AdapterDict,
        shape: LayerShape | None = None,
        **quantization: object,
    ) -> None:
        super().__init__()
        # by adapter name, for adapters whose input is another module's
        self.captures: dict[str, InputCapture] = {}
        self.slot = f"{prefix}adapters"
        self._hold(base_layer, self.slot)
        self.adapters: dict[str, nn.Module] = self.adapter_dict.all_modules  # by name
        # The tuner owns the shared tensors. PEFT switches and deletes them through this reference;
        # in `__dict__`, nn.Module does not register (and save) them a second time.
        self.__dict__[f"{prefix}pools"] = pools
        # PEFT reads this and the next four attributes of every tuner layer
        self.adapter_layer_names = (self.slot, f"{prefix}pools")
        self.other_param_names = ()
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self.in_features, self.out_features = shape or shape_of(base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.is_linear = self.fan_in_fan_out or hasattr(base_layer, "in_features")
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)

    def _hold(self, base_layer: nn.Module, slot: str) -> None:
        """Register the base layer, and a container of adapters under the name `slot`."""
        self.base_layer = base_layer
        self.add_module(slot, AdapterDict())

    @property
    def adapter_dict(self) -> AdapterDict:
        """The container of the adapters."""
        return cast(AdapterDict, self._modules[self.slot])

    def add(self, name: str, adapter: Adapter, *, inference_mode: bool) -> None:
        """Add `adapter` under `name` and move it to the device of the base layer."""
        self.adapter_dict[name] = adapter
        adapter.info.layer = self
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def pick(self, names: Sequence[str]) -> Iterator[tuple[str, Adapter]]:
        """Yield name and adapter of those `names` that this layer has."""
        adapters = self.adapters
        return ((n, cast(Adapter, adapters[n])) for n in names if n in adapters)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> object:
        if self.is_linear:
            return self._adapted(self.base_layer, x, *args, **kwargs)
        call = FirstOutput(self.base_layer)
        return call.complete(self._adapted(call, x, *args, **kwargs))

    def _adapted(
        self, base_layer: nn.Module | FirstOutput, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        base_only = self._disable_adapters or self.merged_adapters or names is not None
        adapters = [] if base_only else list(self.pick(self.active_adapters))
        joint = joined(adapters)
        if adapters and joint is None and adapters[0][0] not in self.captures:
            # not for a captured input: the base layer and the adapter then have different ones
            y = adapters.pop(0)[1].with_base(x, cast(Any, base_layer), *args, **kwargs)
        else:
            y = base_layer(x, *args, **kwargs)
        # all of them, those of idle adapters too: an input must not outlive the forward pass
        captured = {name: capture.pop() for name, capture in self.captures.items()}
        if names is not None and not self._disable_adapters:
            return self._forward_mixed(x, y, captured, names)
        # with `adapters` left, there are two or more
        if adapters:
            self.refuse_combination(self.active_adapters)
        if joint is not None:
            return joint(y)
        for name, adapter in adapters:
            y = adapter(captured.get(name, x), y)
        return y

    def refuse_combination(self, names: Sequence[str]) -> None:
        """Raise UnsupportedError if one of several adapters cannot be active beside the others."""
        present = dict(self.pick(names))
        if len(present) > 1:
            for name, adapter in present.items():
                reason = adapter.combination_refusal()
                if reason:
                    raise UnsupportedError(f"adapter {name!r} of {adapter.info.key}: {reason}")

    def _forward_mixed(
        self, x: Tensor, y: Tensor, captured: Mapping[str, Tensor], names: Sequence[str]
    ) -> Tensor:
        """Apply one adapter per row of the batch; `__base__` is PEFT's name for none."""
        # PEFT checks this for its own layers only
        if len(names) != len(x):
            raise InputError(f"adapter_names has {len(names)} entries for a batch of {len(x)} rows")
        if self.merged_adapters:
            raise InputError(
                "adapter_names cannot be used while adapters are merged; unmerge first"
            )
        rows = AdapterRows.of(names)
        if len(rows.distinct) == 1:
            return next((a(captured.get(n, x), y) for n, a in self.pick(rows.distinct)), y)
        inputs = [captured.get(n, x) for n, _ in self.pick(rows.distinct)] if captured else [x]
        source = _common(inputs)  # None: the adapters have different inputs
        if source is not None:
            prepared = rows.prepared(self, source, self.adapters, self._batched)
            if prepared is not None:
                return prepared.compute(source, y, is_own=owns_output(self.base_layer))
        mixed = y.clone()  # one copy, however many adapters
        for name, adapter in self.pick(rows.distinct):
            places = rows.places[name]
            own = torch.tensor(places, device=x.device)
            with adapter.info.context.only_rows(places, len(rows)):
                mixed.index_copy_(0, own, adapter(captured.get(name, x)[own], y[own]))
        return mixed

    def _batched(self, names: Sequence[str], dtype: torch.dtype) -> BatchedAdapter | None:
        adapters = [cast(Adapter, self.adapters[name]) for name in names]
        cls = _common([type(adapter) for adapter in adapters])
        return None if cls is None else cls.batched(adapters, dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the update of one adapter in the layout of the base weight.

        That is [O, I], or [I, O] for Conv1D.
        """
        adapter = cast(Adapter, self.adapters[adapter_name])
        if type(adapter).change_of is Adapter.change_of:  # the base may be quantized
            delta = adapter.delta()
        else:
            weight = self.get_base_weight()
            delta = adapter.change_of(weight.t() if self.fan_in_fan_out else weight)
        return delta.t() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Return True for one weight update for all inputs; if not, see `refuse_conversion`."""
        names = list(self.adapters) if adapter_name is None else [adapter_name]
        reasons = [a.info.no_lora for _, a in self.pick(names) if a.info.no_lora]
        return refuse_conversion(reasons[0], adapter_name) if reasons else True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of `adapter_names` (the active ones if None) to the base weight.

        Raises:
            ValueError: `safe_merge` is set and a merged weight is not finite; that layer's base
                weight is unchanged.
            UnsupportedError: an adapter cannot be merged beside another one.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        self.refuse_combination([*self.merged_adapters, *adapter_names])
        for name, adapter in self.pick(adapter_names):
            if self.quantization_backend is not None:
                warnings.warn(
                    f"merging into a {self.quantization_backend.backend_name} base quantizes it "
                    "again, which rounds the update",
                    stacklevel=2,
                )
            # a dequantized copy, if the base is quantized
            merged = adapter.merge(self.get_base_weight(), transposed=self.fan_in_fan_out)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(
                    f"merging adapter {name!r} gives a weight that is not finite; the base weight "
                    "is unchanged"
                )
            # quantizes again, if the base is quantized
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged updates from the base weight."""
        while self.merged_adapters:
            adapter = cast(Adapter, self.adapters[self.merged_adapters[-1]])
            plain = adapter.unmerge(self.get_base_weight(), transposed=self.fan_in_fan_out)
            self.set_base_weight(plain)
            self.merged_adapters.pop()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and the hook that captures its input."""
        if adapter_name in self.captures:
            self.captures.pop(adapter_name).detach()
        super().delete_adapter(adapter_name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Return those of the weight; of larger modules, of the first floating-point parameter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            floats = (p for p in base_layer.parameters() if p.is_floating_point())
            first = next(floats, None)
            return (None, None) if first is None else (first.device, first.dtype)
        return device, dtype

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the adapter without casting it; PEFT would, but `_cast_adapter_dtype` decides."""
        base_device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        target = device if device is not None else base_device
        # both the adapters and the shared tensors
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if target is None or adapter_name not in container:
                continue
            state = container[adapter_name]  # the adapter, and what it shares with other layers
            # meta tensors have no values to move: loading assigns them later
            if not any(t.is_meta for t in (*state.parameters(), *state.buffers())):
                state.to(target)


def refuse_conversion(reason: str, adapter_name: str | None) -> bool:
    """Return False where PEFT asks without a name; else raise ModuleKindError with the reason.

    PEFT asks for `model.supports_lora_conversion()` without a name, and with one before it converts
    an adapter, with an error of its own that names the layer's class only.
    """
    if adapter_name is None:
        return False
    raise ModuleKindError(f"adapter {adapter_name!r} cannot become a LoRA: {reason}")


def joined(adapters: Sequence[tuple[str, Adapter]]) -> Callable[[Tensor], Tensor] | None:
    """Return `together` of several adapters of a layer, which have one class, if they need it."""
    if len(adapters) < 2 or not adapters[0][1].is_joint:
        return None
    return partial(adapters[0][1].together, [adapter for _, adapter in adapters])


def _common(values: Sequence[T]) -> T | None:
    """Return the first value if all of them are the same object, else None."""
    return values[0] if values and all(value is values[0] for value in values) else None


def weight_of(layer: AdapterLayer) -> Tensor:
    """Return the base weight of a layer as [O, I], as it is stored: sharded ones are DTensors."""
    weight = cast(Tensor, layer.get_base_layer().weight)
    return weight.t() if layer.fan_in_fan_out else weight


def shape_of(layer: nn.Module) -> LayerShape:
    """Return the widths of a linear layer of any class, quantized ones included."""
    if isinstance(layer, Conv1D):  # transformers' GPT-2 layer, whose weight is [I, O]
        return LayerShape(layer.nx, layer.nf)
    return LayerShape(cast(int, layer.in_features), cast(int, layer.out_features))
