"""Token merging and its correction in one block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.types import Arguments
from petl.errors import InputError, UnsupportedError
from petl.methods.pyra.blocks import KEYS
from petl.methods.pyra.config import PyraConfig
from petl.methods.pyra.token_merging import match, merge

SIZES = "petl_sizes"  # keyword of an adapted block: the sizes of its tokens
MERGED_TOKENS = (
    "pyra merges tokens, not weights, and cannot be merged into the model; keep the adapter, or "
    "call unload() for the base model"
)
ONE_ACTIVE = (
    "one adapter at a time merges tokens: a second one would get other tokens than it was trained "
    "on; activate one of them"
)


class PyraAdapter(Adapter):
    """One block's `weight_a` [R, 1], `weight_b` [1, C], `norm_weight` and `norm_bias` [C].

    None of them exists without `reactivate`, and in a block that merges nothing.
    """

    keep_float32 = True  # in half precision small updates of a few numbers are lost

    def __init__(self, shape: LayerShape, config: PyraConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.r: int = info.settings["r"]
        self.reactivates: bool = config.reactivate and self.r > 0
        self.proportional: bool = config.proportional_attention
        if self.reactivates:
            C = info.settings["width"]
            self.weight_a = nn.Parameter(torch.empty(self.r, 1))
            nn.init.kaiming_uniform_(self.weight_a, a=5**0.5)
            self.weight_b = nn.Parameter(torch.zeros(1, C))
            self.norm_weight = nn.Parameter(torch.ones(C))
            self.norm_bias = nn.Parameter(torch.zeros(C))

    def carried(self) -> Arguments:
        """Return the sizes that the host before this one has left, if there is one."""
        info, before = self.info, self.info.settings["before"]
        if before is None:
            return {}
        place = (before, info.adapter_name)
        sizes = info.context.passed_on.get(place)
        if sizes is None:
            raise InputError(
                f"{info.key} was called, and {before}, whose merged tokens it needs, was not; call "
                "the model, or the encoder that holds both"
            )
        return {SIZES: sizes}

    def with_base(self, x: Tensor, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run the parts of the block, and merge tokens between attention and MLP.

        Returns:
            The block's output, [N, T - R, C] for x [N, T, C].
        """
        block: Any = base.module
        sizes: Tensor | None = kwargs.pop(SIZES, None)
        self._check_call(x, args[0] if args else kwargs.pop("attention_mask", None))
        keys: list[Tensor] = []
        if self.r:
            kwargs[KEYS] = keys
        h = block.layernorm_before(x)
        attended, _ = block.attention(h, self._counts(sizes, h), **kwargs)
        x = block.dropout(attended) + x
        if self.r:
            matching = match(keys[0], self.r, self.info.settings["protected"])
            x, sizes = merge(x, sizes, matching, self.reactivate if self.reactivates else None)
        self.info.context.passed_on[self.info.key, self.info.adapter_name] = sizes
        return block.dropout(block.mlp(block.layernorm_after(x))) + x

    def reactivate(self, S: Tensor, D: Tensor) -> Tensor:
        """Return the sources S corrected before they are added to their partners D, [N, R, C]."""
        a, b, weight, bias = (
            p.to(S.dtype) for p in (self.weight_a, self.weight_b, self.norm_weight, self.norm_bias)
        )
        P = F.layer_norm(S + D, weight.shape, weight, bias)
        Wc = 2 * torch.sigmoid(a.mT @ P)  # [N, 1, C]
        Wt = 2 * torch.sigmoid(P @ b.mT) - 1  # [N, R, 1]
        return S + (S * Wc) * Wt

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Raise UnsupportedError: the block's output exists already, with all tokens."""
        raise UnsupportedError(ONE_ACTIVE)

    def _counts(self, sizes: Tensor | None, h: Tensor) -> Tensor | None:
        """Return what is added to the logits of the keys, [N, 1, 1, T], or None for nothing."""
        if sizes is None or not self.proportional:
            return None
        return sizes.log()[:, None, None].to(h.dtype)

    def _check_call(self, x: Tensor, mask: Tensor | None) -> None:
        tokens = self.info.settings["tokens"]
        if x.shape[1] != tokens:
            raise InputError(
                f"{self.info.key} gets {x.shape[1]} tokens, and its adapter was made for {tokens}: "
                "give images of the size in the model's config"
            )
        if mask is not None:
            raise InputError(
                "attention_mask is not possible with pyra: a merged token would need the masks of "
                "several; leave it out"
            )
