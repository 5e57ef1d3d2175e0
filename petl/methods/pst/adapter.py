"""The trained tensors of a layer, its mask, and its products.

Shapes: I in, O out, R rank of the update, Q rank of the scores.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.spec.config import require
from petl.core.types import Record
from petl.errors import UnsupportedError
from petl.methods.families.masks import check_mask, register_adapter
from petl.methods.families.rewriting import RewritingAdapter
from petl.methods.pst.compiled import compiled_linear
from petl.methods.pst.pruned import (
    PruningFactors,
    Scales,
    differentiable_weight,
    masked_,
    moved_weight,
    pruned_linear,
    pruning_scores,
)
from petl.ops.low_rank import WEIGHT_TYPES, call_with_weight, cast_for_product, is_frozen_linear
from petl.ops.masks import all_kept, count_kept, keep_largest, pack_mask

ALONE = (
    "pst prunes the weight of its layer, and masks of several adapters do not add up; activate one "
    "of them at a time"
)
SHARDED = (
    "its weight is sharded by itself, and pst needs it whole: pass blocks of the model to "
    "fully_shard, not single layers"
)


class PstAdapter(RewritingAdapter):
    """Update U V and scores of one layer; `num_pruned` of its weights are pruned.

    Attributes:
        pruned: `num_pruned` on the host, so that no forward pass waits for the device.
        updates: number of calls of `end_step`, after which values of before are invalid.
        masks_due: number of these that asked for a new mask.
    """

    keep_float32 = True  # scores of half precision would tie
    decays = False  # decay would pull the scores to plain magnitudes

    def __init__(self, shape: LayerShape, config: Any, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        I, O, R, Q = *shape, config.r, config.mask_r
        std, small = (1.0, 0.0) if config.init_weights else (0.02, 0.02)
        self.U = nn.Parameter(std * torch.randn(O, R))
        self.V = nn.Parameter(small * torch.randn(R, I))
        self.A = nn.Parameter(std * torch.randn(O, Q))
        self.B = nn.Parameter(small * torch.randn(Q, I))
        self.R = nn.Parameter(small * torch.randn(O))
        self.C = nn.Parameter(small * torch.randn(I))
        self.num_pruned: Tensor
        self.register_buffer("num_pruned", torch.zeros((), dtype=torch.int64))
        self.mask: Tensor
        if config.save_mask:
            self.register_buffer("mask", all_kept(O * I))
        self.scales = Scales(config.beta, config.alpha1, config.alpha2)
        self.interval, self.saves_mask = config.mask_interval, config.save_mask
        self.pruned = self.updates = self.masks_due = 0
        self.number = register_adapter(self)
        self.forget()

    def forget(self) -> None:
        """Drop everything that was computed from the parameters."""
        # masks by True: for the steps up to the next update, False: of the present parameters
        self._masks: dict[bool, tuple[object, Tensor]] = {}
        self._dense: tuple[object, Tensor] | None = None  # M W' for inference
        # the last two masks in training, with `masks_due`
        self._history: list[tuple[int, Tensor | None]] = []

    @property
    def factors_of_pruning(self) -> PruningFactors:
        """The six trained tensors."""
        return PruningFactors(self.U, self.V, self.A, self.B, self.R, self.C)

    @property
    def size(self) -> int:
        """The number of weights of the layer."""
        return self.shape.in_features * self.shape.out_features

    # State

    def check_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError unless a number of pruned entries, and a mask if any, are possible."""
        count, key = tensors["num_pruned"], self.info.key
        if count.is_meta:
            return
        pruned = int(count)
        require(
            0 <= pruned < self.size,
            f"{key}: num_pruned={pruned} is not in [0, {self.size}), the entries of its weight",
        )
        if self.saves_mask:
            check_mask(f"{key}: mask", tensors["mask"], self.size, pruned)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.num_pruned.is_meta:
            self.pruned = int(self.num_pruned)
        self.forget()

    def _apply(self, *args: object, **kwargs: object) -> "PstAdapter":
        super()._apply(*args, **kwargs)
        standing = self._masks.get(True)
        self.forget()
        if standing is not None:
            self._masks[True] = None, standing[1].to(self.U.device)
        return self

    def __getstate__(self) -> Record:
        return {**self.__dict__, "_dense": None}

    def __setstate__(self, state: Record) -> None:
        super().__setstate__(state)
        self.number = register_adapter(self)  # a copy needs a number of its own

    # Masks

    def mask_now(self, weight: Tensor, *, stands: bool = False) -> tuple[Tensor | None, Any]:
        """Return the packed mask, None if nothing is pruned, and W' if it was computed for it.

        Args:
            weight: W [O, I].
            stands: the mask of the last update instead of one of the present parameters.
        """
        if not self.pruned:
            return None, None
        if self.saves_mask:
            return self.mask, None
        if self._is_sharded and not stands:  # sharding changes parameters without a new version
            key = (id(self), "mask")
            return self.info.context.compute_once(key, lambda: self._new_mask(weight)[0]), None
        key = None if stands else self._key(weight)
        made = self._masks.get(stands)
        if made is not None and made[0] == key:
            return made[1], None
        packed, moved = self._new_mask(weight)
        self._masks[stands] = key, packed
        return packed, moved

    @property
    def _is_sharded(self) -> bool:
        # an attribute that FSDP2 sets on all modules
        return hasattr(self, "_is_fsdp_managed_module")

    def _key(self, weight: Tensor) -> object:
        """Return a value that changes with the parameters."""
        tensors = (*self.factors_of_pruning, weight)
        counts = [0 if t.is_inference() else t._version for t in tensors]
        # a mask that was made in inference mode cannot be saved for backward
        state = self.updates, self.pruned, torch.is_inference_mode_enabled()
        return *state, *map(id, self.factors_of_pruning), *counts

    @torch.no_grad()
    def _new_mask(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the packed mask of the present parameters, and W'."""
        factors = self.factors_of_pruning
        moved = moved_weight(weight, factors, self.scales)
        keep = keep_largest(pruning_scores(moved, factors, self.scales), self.pruned)
        return pack_mask(keep), moved

    @torch.no_grad()
    def new_weight(self, weight: Tensor) -> Tensor:
        """Return M W' [O, I] of the present parameters, in the dtype of W [O, I]."""
        packed, moved = self.mask_now(weight)
        if moved is None:
            moved = moved_weight(weight, self.factors_of_pruning, self.scales)
        return masked_(moved, packed).to(weight.dtype)

    def end_step(self, pruned: int | None) -> None:
        """Take the number of entries to prune from now on; None: the mask stands."""
        self.updates += 1
        if pruned is not None:
            self.masks_due += 1
            self.pruned = pruned
            self.num_pruned.fill_(pruned)
            self._masks.clear()

    @torch.no_grad()
    def save_mask(self, weight: Tensor, factors: PruningFactors) -> None:
        """Write the mask of these factors, and of the weight W [O, I], into `mask`."""
        moved = moved_weight(weight, factors, self.scales)
        packed = pack_mask(keep_largest(pruning_scores(moved, factors, self.scales), self.pruned))
        self.mask.copy_(packed)
        self._record(packed)

    def begin(self) -> None:
        """Start a training: nothing is pruned before its first step."""
        self.forget()
        self.end_step(0)
        if self.saves_mask:
            self.mask.copy_(all_kept(self.size, self.mask.device))

    def _record(self, packed: Tensor | None) -> None:
        history = self._history
        if history and history[-1][0] == self.masks_due:
            return  # the same mask, of another micro-batch or step
        # the next mask is written into the buffer
        copy = packed.clone() if packed is not None and self.saves_mask else packed
        self._history = [*history[-1:], (self.masks_due, copy)]

    def num_changed(self) -> Tensor:
        """Return the number of entries that changed side at the last mask of a training, 0-d."""
        if len(self._history) < 2:
            return self.num_pruned.new_zeros(())
        everything = all_kept(self.size, self.U.device)
        before, after = (everything if mask is None else mask for _, mask in self._history)
        return count_kept(before ^ after)

    def standing_mask(self) -> Tensor | None:
        """Return the packed mask that holds until the next update, if it differs from its source.

        None if it follows from the parameters, is saved anyway, or was not made yet.
        """
        return self._masks[True][1] if True in self._masks else None

    def load_standing_mask(self, packed: Tensor | None) -> None:
        """Restore the result of `standing_mask`."""
        self._masks.clear()
        if packed is not None:
            check_mask(f"{self.info.key}: mask", packed, self.size, self.pruned)
            self._masks[True] = None, packed.to(self.U.device)

    # Products

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Raise UnsupportedError: the base output `y` has all weights, so it is of no use."""
        raise UnsupportedError(f"{self.info.key}: {ALONE}")

    def combination_refusal(self) -> str | None:
        return ALONE

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        stored = cast(Tensor, base.weight)
        if isinstance(stored, DTensor):
            raise UnsupportedError(f"{self.info.key}: {SHARDED}")
        weight = stored.t() if isinstance(base, Conv1D) else stored
        if args or kwargs or not is_frozen_linear(base, WEIGHT_TYPES):
            return self._called(base, weight, x, *args, **kwargs)
        x = cast_for_product(x)
        bias = cast(Tensor | None, base.bias)
        if torch.compiler.is_compiling():
            return compiled_linear(x, weight, bias, list(self.factors_of_pruning), self.number)[0]
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in self.factors_of_pruning)):
            masked = self.masked_weight(weight, x.dtype)[0]
            return F.linear(x, masked, None if bias is None else bias.to(x.dtype))
        masked, packed = self.masked_weight(weight, x.dtype)
        factors = self.factors_of_pruning
        return pruned_linear(x, (weight, bias), masked, packed, factors, self.scales)

    @torch.no_grad()
    def masked_weight(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return M W' [O, I] in a dtype, and the packed mask; kept for the next call in eval."""
        packed, moved = self.mask_now(weight, stands=self.training and self.interval > 1)
        if self.info.context.recording:
            self._record(packed)
        if self.training or self._is_sharded:
            self._dense = None
        key = self._key(weight), dtype
        if self._dense is not None and self._dense[0] == key:
            return self._dense[1], packed
        if moved is None:
            moved = moved_weight(weight, self.factors_of_pruning, self.scales)
        masked = masked_(moved, packed).to(dtype)
        if not (self.training or self._is_sharded):
            self._dense = key, masked
        return masked, packed

    def _called(
        self, base: nn.Module, weight: Tensor, x: Tensor, *args: object, **kw: object
    ) -> Tensor:
        """Call the base layer, whose hooks run, with M W' in place of its weight."""
        packed, _ = self.mask_now(weight, stands=self.training and self.interval > 1)
        if self.info.context.recording:
            self._record(packed)
        masked = differentiable_weight(weight, packed, self.factors_of_pruning, self.scales)
        return call_with_weight(base, masked, x, *args, **kw)
