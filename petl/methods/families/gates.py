"""Gates on the adapted output of a sub-layer, and adapters at the values of cross-attention.

Hu, Li, Lyu and Wang 2023, "VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity
Control", ICCV (arXiv:2308.09804).

Shapes: N rows, T tokens, K width of the residual stream, E `gate_rank`. Let x [N, T, K] be the
residual stream before a sub-layer and y1 [N, T, K] the sub-layer's adapted output, see
`petl.methods.families.sublayers`. The gate multiplies all of y1, not the update alone:

    large       sigmoid(up act(down x + b) + c)            [N, T, K]
    middle_x    sigmoid(w (x + y1) + c)                    [N, T, 1]
    middle_y    1 + w                                      [K]
    small       mean over tokens of sigmoid(w [x; y1] + c) [N, 1, 1]

`identity_gate` doubles the sigmoid, so that zero logits leave y1 as it is. The mean leaves padding
out, in evaluation too, so that a row's result does not depend on the longest row of its batch.

At the location `value`, y is the output of the projection to values in cross-attention and the
adapter is parallel to it, y + f(m) for the encoder's output m, without a gate: caches of keys and
values contain it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from petl.core.layers.layer import HALF, LayerInfo, LayerShape
from petl.core.method import NewAdapters, Settings, Target, WrapContext
from petl.core.model.structure import BLOCK, VALUE, encoder_of, value_projections
from petl.core.spec.checks import check_rank
from petl.core.spec.config import config_field, require
from petl.errors import InputError
from petl.methods.families.stacked import linear
from petl.methods.families.sublayers import (
    LOCATIONS,
    STREAMS,
    SubLayerAdapter,
    SubLayerConfig,
    refuse_in_decoders,
    sublayer_places,
    sublayer_targets,
)

GATES = ("large", "middle_x", "middle_y", "small", "none")
READING = ("large", "middle_x", "small")  # those that read the residual stream
LARGE = ("gate=large", lambda config: config.gate == "large")
READS = (f"gate one of {', '.join(READING)}", lambda config: config.gate in READING)
ROLE = "role"  # key of `LayerInfo.settings`, for adapters at `VALUE`
CHANNEL_STD = 0.02  # of the start of middle_y


@dataclass
class GatedConfig(SubLayerConfig):
    """Fields of a sub-layer's adapter with a gate, and the location `value`."""

    locations: list[str] = config_field(
        "subset of attn, cross_attn, ffn, value (parallel to the values of cross-attention), and "
        "block for one adapter beside each whole block",
        ["attn", "ffn"],
        choices=(*LOCATIONS, VALUE),
    )
    gate: str = config_field(
        "factor of a sub-layer's adapted output: none, large (by value), middle_x (by token), "
        "middle_y (by channel) or small (by row)",
        "none",
        choices=GATES,
    )
    gate_rank: int | None = config_field(
        "bottleneck of the gate large; null: that of the adapter", None, ge=1, acts=LARGE
    )
    identity_gate: bool = config_field(
        "double the sigmoid of the gate, so that training starts with a factor of 1, not 1/2",
        True,
        acts=READS,
    )

    def check(self) -> None:
        """Raise InputError for a gate that does not fit the other fields, or would do nothing."""
        super().check()
        gate, gated = self.gate, self.gate != "none"
        require(
            not gated or BLOCK not in self.locations,
            f"gate={gate!r} multiplies the output of a sub-layer, and locations={self.locations} "
            "has whole blocks, whose output is the residual stream; leave one of them out",
        )
        require(
            not gated or self.locations != [VALUE],
            f"gate={gate!r} has no effect at locations={self.locations}; add attn or ffn",
        )
        require(
            gate not in READING or self.placement != "parallel",
            f"gate={gate!r} reads the residual stream and placement='parallel' the sub-layer's "
            "input; use placement='parallel_residual' or 'sequential'",
        )

    @property
    def reads_input(self) -> bool:
        """True if the adapter or its gate reads another input than the output that it changes."""
        return super().reads_input or self.gate in READING

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError for a bottleneck that is far wider than the layers."""
        super().check_shapes(shapes)
        check_rank(self, "gate_rank", shapes, linear=False)


class GatedAdapter(SubLayerAdapter):
    """Network at the end of a sub-layer with a gate behind it, or parallel to a value projection.

    Tensors of the gate: `gate_down_weight` [E, K], `gate_down_bias` [E], `gate_up_weight` [K, E]
    and `gate_up_bias` [K]; or `gate_weight`, [1, K], [1, 2 K] or [K], with `gate_bias` [1] where
    there is a sigmoid.

    Attributes:
        output_scale: a constant factor of the gated output.
    """

    gate_weight: Tensor
    output_scale = 1.0

    def __init__(self, shape: LayerShape, config: Any, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.is_value = info.settings.get(ROLE) == VALUE
        self.gate = "none" if self.is_value else config.gate
        if self.is_value:
            self.placement, self.adds_input = "parallel", False
            self.input_width = shape.in_features

    def add_gate(self) -> None:
        """Create the tensors of the gate; linear layers start as torch's do."""
        K = self.width
        if self.gate == "large":
            E = self.config.gate_rank or self.bottleneck
            self.adopt("gate_down", nn.Linear(K, E))
            self.adopt("gate_up", nn.Linear(E, K))
        elif self.gate == "middle_y":
            self.gate_weight = nn.Parameter(torch.empty(K).normal_(std=CHANNEL_STD))
        elif self.gate != "none":
            self.adopt("gate", nn.Linear(K if self.gate == "middle_x" else 2 * K, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y1 = super().forward(x, y)
        if self.is_value:
            return y1
        scale = self.output_scale
        if self.gate in READING and self.config.identity_gate:
            scale *= 2
        if self.gate != "none":
            # out of place: backward needs y1 and the gate, and nothing else of this product
            y1 = y1 * self.factor(x.to(y1.dtype), y1)
        return y1 if scale == 1.0 else y1 * scale

    def factor(self, x: Tensor, y1: Tensor) -> Tensor:
        """Return the gate, not doubled, in a shape that broadcasts to `y1` [..., K]."""
        if self.gate == "middle_y":
            return 1 + self.gate_weight.to(y1.dtype)
        gate = self._logits(x, y1).sigmoid()
        return self._mean(gate) if self.gate == "small" else gate

    def _logits(self, x: Tensor, y1: Tensor) -> Tensor:
        if self.gate == "large":
            z = self.act(linear(x, *self.projection("gate_down", x)))
            return linear(z, *self.projection("gate_up", z))
        weight, bias = self.projection("gate", y1)
        # two products instead of one with the sum, or with both in one tensor, to be kept
        of_x, of_y = (weight, weight) if self.gate == "middle_x" else weight.chunk(2, dim=-1)
        return linear(x, of_x, bias) + linear(y1, of_y, None)

    def _mean(self, gate: Tensor) -> Tensor:
        """Return the mean of `gate` [N, T, 1] over the tokens that are no padding, [N, 1, 1]."""
        if gate.dim() != 3:
            raise InputError(
                f"gate='small' needs activations of 3 dimensions [rows, tokens, width], and those "
                f"of {self.info.key} have {gate.dim()}; use another gate"
            )
        mask = self.info.context.token_mask(gate)
        # a mean of many numbers in half precision would lose digits
        values = gate.float() if gate.dtype in HALF else gate
        if mask is None:
            return values.mean(1, keepdim=True).to(gate.dtype)
        weights = (mask != 0).unsqueeze(-1).to(values)
        # at least 1: a row that is all padding gets 0, not NaN
        counts = weights.sum(1, keepdim=True).clamp(min=1)
        return ((values * weights).sum(1, keepdim=True) / counts).to(gate.dtype)

    @property
    def gate_stacks(self) -> bool:
        """True if the gate broadcasts over stacked tensors, see `stacks`."""
        # there, the tokens of several rows are one dimension, and `small` is a mean over one row's
        return self.gate != "small"

    @property
    def form(self) -> tuple[object, ...]:
        return (*super().form, self.gate, self.is_value, self.config.identity_gate)


G = TypeVar("G", bound=GatedAdapter)
GC = TypeVar("GC", bound=GatedConfig)


def values(c: WrapContext[GC]) -> list[str]:
    """Return the paths of the value projections that get an adapter parallel to them."""
    return value_projections(c.model) if VALUE in c.config.locations else []


def gated_targets(c: WrapContext[GC]) -> list[Target]:
    """Return the targets of the locations; a gate may read the residual stream."""
    of_values = values(c)
    places = [*sublayer_places(c), *((VALUE, path) for path in of_values)]
    # that at values reads its own input
    of_gate = "residual" if c.config.gate in READING else ""
    others = STREAMS.get(c.config.placement, "") or of_gate
    return sublayer_targets(c, places, lambda path: "" if path in of_values else others)


def gate_settings(c: WrapContext[Any], of_values: Collection[str]) -> dict[str, Settings]:
    """Return the role of adapters at values; refuse the gate `small` in decoders."""
    if c.config.gate == "small":
        keys = [key for key in c.targets if key not in of_values]
        refuse_in_decoders(c.model, keys, "gate='small'", "gate='middle_x'")
    return {key: {ROLE: VALUE} for key in c.targets if key in of_values}


def keep_mask(new: NewAdapters[Any, G]) -> None:
    """Let the model keep the mask of each forward pass, if a gate needs it."""
    if new.config.gate == "small" and new.once("mask"):
        encoder = encoder_of(new.model)
        # generation calls an encoder directly, past the hooks of the model
        module = new.model if encoder is None else encoder[1]
        handle = module.register_forward_pre_hook(new.context.keep_mask, with_kwargs=True)
        new.hooks.append(handle)
