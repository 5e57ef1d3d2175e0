"""The trained tensors of a layer, its mask, and its products.

Shapes: I in, O out, R rank, N entries.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.types import Record
from petl.errors import InputError, UnsupportedError
from petl.methods.dsee.config import DseeConfig
from petl.methods.dsee.entries import (
    Frozen,
    SparseUpdate,
    add_update,
    masked_weight,
    updated_linear,
)
from petl.methods.families.masks import check_mask
from petl.methods.families.rewriting import RewritingAdapter
from petl.ops.low_rank import WEIGHT_TYPES, call_with_weight, cast_for_product, is_frozen_linear
from petl.ops.masks import all_kept, count_kept
from petl.system.files.tensor_file import check_index

ALONE = (
    "dsee has pruned the weights of its layer, and a mask belongs to one adapter; activate one of "
    "them at a time, for all rows"
)
SHARDED = (
    "its weight is sharded by itself, and dsee needs all of it: pass blocks of the model to "
    "fully_shard, not single layers"
)


class DseeAdapter(RewritingAdapter):
    """Update c (B A + S) and mask of one layer; the mask alone on a layer of `prune_modules`.

    Attributes:
        is_target: True if the layer has an update.
        scale: c.
        pruned: number of zeros of the mask, on the host, so that no forward pass waits for the
            device.
        is_empty: True until the positions are chosen or loaded.
    """

    keep_float32 = True  # scores of half precision would tie

    def __init__(self, shape: LayerShape, config: DseeConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        I, O, R, N = *shape, config.r, config.num_sparse
        self.is_target: bool = info.settings["is_target"]
        self.mask: Tensor
        if self.is_target:
            small = 0.0 if config.init_weights else 0.02
            self.lora_A = nn.Parameter(0.02 * torch.randn(R, I))
            self.lora_B = nn.Parameter(small * torch.randn(O, R))
            self.values = nn.Parameter(small * torch.randn(N))
            self.indices: Tensor
            dtype = torch.int32 if self.size < 2**31 else torch.int64
            self.register_buffer("indices", torch.arange(N, dtype=dtype))
        self.register_buffer("mask", all_kept(self.size))
        self.scale = config.lora_alpha / config.r
        self.pruned = 0
        self.is_empty = self.is_target and config.num_sparse > 0
        self.forget()

    def forget(self) -> None:
        """Drop everything that was computed from the mask and the positions."""
        self._masked: tuple[object, Tensor] | None = None  # m W
        self._places: tuple[Tensor, Tensor] | None = None  # rows and columns of the entries

    @property
    def size(self) -> int:
        """The number of weights of the layer."""
        return self.shape.in_features * self.shape.out_features

    # State

    def start(self, indices: Tensor) -> None:
        """Take the positions [N] of the entries."""
        self.indices.copy_(indices)
        self.is_empty = False
        self.forget()

    def set_mask(self, packed: Tensor) -> None:
        """Take a packed mask."""
        self.mask.copy_(packed)
        self._count()

    def _count(self) -> None:
        self.forget()
        if not (self.mask.is_meta or isinstance(self.mask, FakeTensor)):
            self.pruned = self.size - int(count_kept(self.mask))

    def check_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError unless positions and mask are ones of this weight."""
        key = self.info.key
        if self.is_target:
            check_index(f"{key}: indices", tensors["indices"], self.size, unique=True)
        check_mask(f"{key}: mask", tensors["mask"], self.size)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_empty = False
        self._count()

    def _apply(self, *args: object, **kwargs: object) -> "DseeAdapter":
        super()._apply(*args, **kwargs)
        self.forget()
        return self

    def __getstate__(self) -> Record:
        return {**self.__dict__, "_masked": None}

    def combination_refusal(self) -> str | None:
        return ALONE if self.pruned else None

    # Products

    @property
    def update(self) -> SparseUpdate | None:
        """The update as the products take it; None on a layer that is only masked."""
        if not self.is_target:
            return None
        if self.is_empty:
            self._require_positions()
        rows, columns = self._rows_and_columns()
        return SparseUpdate(self.lora_A, self.lora_B, self.values, rows, columns, self.scale)

    def _rows_and_columns(self) -> tuple[Tensor, Tensor]:
        known = self._places
        if known is not None and not torch.compiler.is_compiling():
            return known
        at, I = self.indices.long(), self.shape.in_features
        places = at // I, at % I
        # tensors of a dry run or of a compiled graph must not outlive it
        if type(at) is Tensor and not torch.compiler.is_compiling() and not at.is_inference():
            self._places = places
        return places

    def _require_positions(self) -> None:
        if self.indices.is_meta or isinstance(self.indices, FakeTensor):  # a dry run
            return
        raise InputError(
            f"the entries of {self.info.key} have no positions: load the adapter's file, or start "
            "from the weights with petl.wrap(model, 'dsee')"
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base output `y` [..., O] plus the update, while nothing is pruned.

        Raises:
            UnsupportedError: weights are pruned, and `y` has all of them.
        """
        if self.pruned:
            raise UnsupportedError(f"{self.info.key}: {ALONE}")
        update = self.update
        return y if update is None else add_update(y, x, update)

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        if not (self.pruned or self.is_target):
            return base(x, *args, **kwargs)
        is_plain = not (args or kwargs) and is_frozen_linear(base, WEIGHT_TYPES)
        if torch.compiler.is_compiling() or not is_plain:
            return self._called(x, base, *args, **kwargs)
        stored, bias = cast(Tensor, base.weight), cast(Tensor | None, base.bias)
        if x.dtype != stored.dtype and not torch.is_autocast_enabled(x.device.type):
            return self._called(x, base)  # the layer raises
        weight = stored.t() if isinstance(base, Conv1D) else stored
        x = cast_for_product(x)
        frozen = Frozen(weight, bias)
        if self.pruned:
            frozen = Frozen(weight, bias, self.mask, self._kept_product(weight, x.dtype))
        return updated_linear(x, frozen, self.update)

    def _kept_product(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return m W [O, I] in a dtype, computed once; None where FSDP2 frees the weight."""
        # an attribute that FSDP2 sets on all modules
        if hasattr(self, "_is_fsdp_managed_module") or isinstance(weight, FakeTensor):
            return None
        version = 0 if weight.is_inference() else weight._version
        # a product that was made in inference mode cannot be saved for backward
        key = weight.data_ptr(), version, dtype, torch.is_inference_mode_enabled()
        if self._masked is None or self._masked[0] != key:
            with torch.no_grad():
                self._masked = key, masked_weight(weight, self.mask).to(dtype)
        return self._masked[1]

    def _called(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Call the base layer, whose hooks run, with m W in place of its weight; add the update."""
        if not self.pruned:
            return self(x, base(x, *args, **kwargs))
        stored = cast(Tensor, base.weight)
        if isinstance(stored, DTensor):
            raise UnsupportedError(f"{self.info.key}: {SHARDED}")
        weight = stored.t() if isinstance(base, Conv1D) else stored
        masked = masked_weight(weight, self.mask)
        if torch.compiler.is_compiling():
            y = F.linear(x, masked, cast(Tensor | None, base.bias))
        else:
            y = call_with_weight(base, masked, x, *args, **kwargs)
        update = self.update
        return y if update is None else add_update(y, x, update)

    # Merging

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return D [O, I]."""
        update = self.update
        if update is None:
            return torch.zeros(self.shape[::-1], device=self.mask.device)
        return update.dense()

    @torch.no_grad()
    def new_weight(self, weight: Tensor) -> Tensor:
        """Return m W + D [O, I] in the dtype of W [O, I]; sums are in float32, rounded once."""
        packed = self.mask if self.pruned else None
        if not self.is_target:
            return masked_weight(weight, packed).clone()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (masked_weight(wide, packed) + self.delta().to(wide)).to(weight.dtype)
