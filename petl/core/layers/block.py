"""Adapters of whole blocks: they see a block's inputs, may change them, and its first output.

A block is no linear layer: it takes masks, caches or the encoder's output beside the hidden states
(in a U-Net the embedding of the timestep beside the feature map) and may return a tuple, and other
code reads its attributes and registers hooks on it. So it stays in its place, with its class
swapped for one whose `forward` goes through `BlockAdapters`, a child of the block. Paths inside the
block do not change, other adapters may be there, and what is done around a block (checkpointing,
sharding, `output_hidden_states`) covers its adapters too.
"""

from collections.abc import Mapping
from inspect import signature
from types import MethodType
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from petl.core.layers.class_swap import (
    AdapterDict,
    SwappedClass,
    original_class,
    restore_class,
    swap_class,
)
from petl.core.layers.layer import Adapter, AdapterLayer, FirstOutput, LayerShape, joined
from petl.core.types import Arguments
from petl.errors import InputError, UnsupportedError

SLOT = "petl_slot"  # attribute of an adapted block: the name of its BlockAdapters


class AdaptedBlock(SwappedClass):
    """Mixin for the class of a block with adapters."""

    holds_adapters: ClassVar[bool] = True

    def __call__(self: Any, *args: object, **kwargs: object) -> object:
        carried = self._modules[self.__dict__[SLOT]].carried()
        return super().__call__(*args, **kwargs, **carried)

    def forward(self: Any, *args: object, **kwargs: object) -> object:
        return self._modules[self.__dict__[SLOT]](*args, **kwargs)


class BlockCall(FirstOutput):
    """The block without its adapters, called like the block: it returns the first output."""

    def __init__(self, block: nn.Module, keyword: str | None) -> None:
        super().__init__(block)
        self.keyword = keyword  # name of the hidden states; None: they are positional

    def outputs(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """Return what the block computes without its adapters."""
        if self.keyword is None:
            return plain_forward(self.module, x, *args, **kwargs)
        return plain_forward(self.module, *args, **{self.keyword: x, **kwargs})


def plain_forward(block: nn.Module, *args: object, **kwargs: object) -> object:
    """Return what a block computes without its adapters."""
    # the class behind the mixin, also where sharding has put another one before it
    return cast(Any, super(AdaptedBlock, cast(Any, block))).forward(*args, **kwargs)


class BlockAdapters(AdapterLayer, AdapterDict):
    """Tuner layer of a block: holds the block's adapters by name and runs them.

    It is a child of the block, called `petl_<method>_adapters`, so that a key of the state dict is
    `<path of the block>.petl_<method>_adapters.<adapter>.<tensor>`, as for other layers. An
    adapter's `with_base` gets the arguments of the block, which it may change, and the block as a
    `BlockCall`.
    """

    def _hold(self, base_layer: nn.Module, slot: str) -> None:
        # in `__dict__`, nn.Module does not register them as children
        self.__dict__["_block"] = base_layer
        self.__dict__[slot] = self  # PEFT looks adapters up by this name

    @property
    def adapter_dict(self) -> AdapterDict:
        """The container of the adapters: itself."""
        return self

    @property
    def base_layer(self) -> nn.Module:
        """The block."""
        return self.get_base_layer()

    def get_base_layer(self) -> nn.Module:
        """Return the block."""
        return self.__dict__["_block"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names, block = kwargs.pop("adapter_names", None), self.get_base_layer()
        if self._disable_adapters:
            return plain_forward(block, *args, **kwargs)
        x, args, kwargs, keyword = split_arguments(args, kwargs)
        self._check("gets", x, self.in_features)
        call = BlockCall(block, keyword)
        adapters = [] if names is not None else list(self.pick(self.active_adapters))
        joint = joined(adapters)
        if adapters and joint is None:
            y = adapters.pop(0)[1].with_base(x, cast(Any, call), *args, **kwargs)
        else:
            y = call(x, *args, **kwargs)
        self._check("returns", y, self.out_features)
        if joint is not None:
            return call.complete(joint(y))
        if names is not None:
            y = self._forward_mixed(x, y, {}, names)
        for _, adapter in adapters:
            y = adapter(x, y)
        return call.complete(y)

    def carried(self) -> Arguments:
        """Return what the first active adapter gets beside the block's arguments."""
        first = None if self._disable_adapters else next(self.pick(self.active_adapters), None)
        return {} if first is None else first[1].carried()

    def _check(self, what: str, value: object, width: int) -> None:
        """Raise InputError unless a block's input or first output has this width."""
        adapter = next(iter(self.adapters.values()), None)
        if adapter is None:  # it holds what adapters of other blocks need
            return
        dim = cast(Adapter, adapter).width_dim
        shape = getattr(value, "shape", None)
        fits = isinstance(value, Tensor) and value.dim() > max(dim, 0)
        if not fits or value.shape[dim] != width:
            found = type(value).__name__ if shape is None else f"a tensor of shape {[*shape]}"
            needs = "hidden states" if dim < 0 else "a feature map"
            raise InputError(
                f"{original_class(self.base_layer).__name__} {what} {found} first, and an "
                f"adapter of a block needs {needs} of width {width} in dimension {dim}; adapt "
                "its sub-layers instead"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise UnsupportedError: a block has no weight of its own."""
        block = original_class(self.base_layer).__name__
        raise UnsupportedError(
            f"adapters of a whole block ({block}) cannot be merged; keep the adapter, or call "
            "unload() for the base model"
        )

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Return False, or what the reason of the method's adapters gives."""
        return super().supports_lora_conversion(adapter_name) and False

    def detach(self) -> None:
        """Remove all adapters from the block and restore its class."""
        block = self.get_base_layer()
        del block._modules[block.__dict__.pop(SLOT)]
        restore_class(block, AdaptedBlock)
        rebind(block)


def split_arguments(
    args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[Any, tuple[object, ...], dict[str, object], str | None]:
    """Return a block's hidden states, its further arguments, and the keyword of the first."""
    if args:
        return args[0], args[1:], {**kwargs}, None
    if not kwargs:
        raise InputError("a block with adapters was called without hidden states")
    keyword = next(iter(kwargs))
    return kwargs[keyword], (), {k: v for k, v in kwargs.items() if k != keyword}, keyword


def place_of_argument(block: nn.Module, name: str) -> int:
    """Return the position of an argument of a block's `forward`; the hidden states are at 0.

    Raises:
        InputError: there is no such argument.
    """
    cls = original_class(block)
    names = list(signature(cls.forward).parameters)[1:]  # without self
    if name not in names:
        raise InputError(f"{cls.__name__} takes no {name}; its arguments are {', '.join(names)}")
    return names.index(name)


def with_argument(
    args: tuple[object, ...], kwargs: Mapping[str, object], name: str, place: int, value: object
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of a block with another value of the one called `name`.

    It may be positional or not; `place` is its `place_of_argument`.
    """
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), {**kwargs}
    return args, {**kwargs, name: value}


def adapters_of(block: nn.Module) -> BlockAdapters | None:
    """Return the adapters of a block, or None if it has none."""
    return cast(Any, block._modules.get(block.__dict__.get(SLOT)))


def add_to_block(
    block: nn.Module,
    adapter: Adapter,
    prefix: str,
    pools: AdapterDict,
    shape: LayerShape,
    *,
    inference_mode: bool,
) -> None:
    """Add an adapter, under its `LayerInfo.adapter_name`, to a block.

    Raises:
        UnsupportedError: the block has a `forward` of its own, which would run without adapters,
            or it calls all of its children in turn.
    """
    layer = adapters_of(block)
    if layer is None:
        if isinstance(block, nn.Sequential):
            raise UnsupportedError(
                f"{adapter.info.key} is an nn.Sequential, which would call what holds its adapters "
                "as one of its layers; adapt its sub-layers instead"
            )
        refuse_own_forward(block, adapter.info.key)
        layer = BlockAdapters(block, prefix, pools, shape)
        block.add_module(layer.slot, layer)
        block.__dict__[SLOT] = layer.slot
        swap_class(block, AdaptedBlock)
        rebind(block)
    layer.add(adapter.info.adapter_name, adapter, inference_mode=inference_mode)


def refuse_own_forward(block: nn.Module, key: str) -> None:
    """Raise UnsupportedError for a block whose `forward` was replaced on the object.

    accelerate's hooks (`device_map`) do so as well, and keep the old one: they are allowed.
    """
    if "forward" in block.__dict__ and "_old_forward" not in block.__dict__:
        raise UnsupportedError(
            f"the forward of {key} ({type(block).__name__}) was replaced on the object, and would "
            "run without its adapters; add them before it is replaced, or adapt its sub-layers"
        )


def check_block_adapter_name(name: str) -> None:
    """Raise InputError if adapters of blocks cannot have this name: it is taken in their holder."""
    # "model": PEFT takes a child of that name for the model below a tuner
    if hasattr(BlockAdapters, name) or name in ("captures", "model", "slot"):
        raise InputError(
            f"adapter_name={name!r} is an attribute of the module that holds the adapters of a "
            "block; choose another, such as 'default'"
        )


def rebind(block: nn.Module) -> None:
    """Make the hooks of accelerate call the `forward` of the block's present class."""
    if "_old_forward" in block.__dict__:
        block.__dict__["_old_forward"] = MethodType(type(block).forward, block)
