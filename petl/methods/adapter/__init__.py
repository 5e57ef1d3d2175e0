"""Bottleneck adapters: a small two-layer network after, or parallel to, each sub-layer or block.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", ICML (arXiv:1902.00751), after
attention and feed-forward; Pfeiffer et al. 2021, "AdapterFusion", EACL (arXiv:2005.00247), one per
layer; He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR
(arXiv:2110.04366), parallel and scaled; Chen et al. 2022, "AdaptFormer", NeurIPS
(arXiv:2205.13535), parallel on the residual stream; Cappellazzo et al. 2024, "Parameter-Efficient
Transfer Learning of Audio Spectrogram Transformers", MLSP (arXiv:2312.03694), the conformer block.

Shapes: K width of the residual stream, D bottleneck, N rows, T tokens, W kernel size. Placements
and residuals are those of `petl.methods.families.sublayers`; the network is

    bottleneck    f(h) = LN_a(drop(act(LN_b(h) down^T)) up^T)
    conformer     [a; g] = LN_b(h) down^T; f(h) = LN_a(drop(SiLU(BN(conv(a sigmoid(g))))) up^T)

plus biases; LN_b and LN_a are identities unless `ln_before` and `ln_after` are set. The batch norm
BN uses the statistics of one forward pass of one process, so results depend on gradient
accumulation and the number of processes. Under DDP, rank 0's running statistics are broadcast.

Where we depart from the sources: AdapterFusion's network takes y plus the residual stream, which is
not supported; the closest setting is `locations=["ffn"]`. The audio study's code initializes both
matrices to zero, so that only a bias would receive a gradient, and computes a norm whose output it
discards; here only `up` starts at zero, and enabled norms are applied. `locations=["block"]` with
`placement="parallel"` follows the idea of IAA (Ma et al. 2022, "Scattered or Connected?", CIKM,
arXiv:2208.09847), whose code is not public: one network beside each block connects input and output
past all frozen layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.method import Method, NewAdapters, Settings, Target, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap
from petl.core.register import register
from petl.core.spec.components import Components, Ordered
from petl.core.spec.config import config_field, require
from petl.core.support import Capability
from petl.errors import InputError
from petl.methods.adapter.conformer import depthwise, normalize_channels
from petl.methods.families.gates import (
    READING,
    GatedAdapter,
    GatedConfig,
    gate_settings,
    gated_targets,
    keep_mask,
    values,
)
from petl.methods.families.stacked import layer_norm, linear
from petl.methods.families.sublayers import by_position, network_sizes, refuse_in_decoders


@dataclass
class AdapterConfig(GatedConfig):
    """Fields of the bottleneck adapter; the defaults are Houlsby's.

    `locations=["ffn"]` gives one adapter per transformer layer.
    """

    block: str = config_field(
        "bottleneck, or conformer (a depthwise convolution over the tokens)",
        "bottleneck",
        choices=("bottleneck", "conformer"),
    )
    conv_kernel_size: int = config_field(
        "kernel size of the conformer block in tokens, an odd number",
        31,
        ge=1,
        acts=("block=conformer", lambda config: config.block == "conformer"),
    )
    ln_before: bool = config_field("apply layer norm to the network's input", False)
    ln_after: bool = config_field("apply layer norm to the network's output", False)
    rank_pattern: dict[str, int] | None = config_field(
        "width of the bottleneck by module path, or by a regular expression for paths, as for "
        "PEFT's LoRA; overrides r and reduction_factor",
        None,
    )
    init_weights: str = config_field(
        "initialization: zero_up (training starts at the base model's outputs), normal (both "
        "matrices N(0, 0.01^2)) or binary (up: truncated normal with std 0.001, for quantized "
        "adapters)",
        "zero_up",
        choices=("zero_up", "normal", "binary"),
    )

    def check(self) -> None:
        """Raise InputError for an even kernel size, and as the base class does."""
        super().check()
        kernel = self.conv_kernel_size  # odd, so that the padding is the same on both sides
        require(kernel % 2 == 1, f"conv_kernel_size={kernel} is not an odd number of tokens")


class BottleneckAdapter(GatedAdapter):
    """The network f of one sub-layer: `down_weight` [D, K] ([2 D, K] if conformer), `up_weight`.

    `up_weight` is [K, D]. Optional: `down_bias`, `up_bias`, `scale` [1], `norm_before_*` and
    `norm_after_*` [K]; for the conformer block `conv_weight` [D, 1, W], `conv_bias` [D] and the
    state of a `BatchNorm1d(D)` as `bn_*`.
    """

    down_weight: Tensor
    up_weight: Tensor
    norm_before_weight: Tensor
    norm_before_bias: Tensor
    norm_after_weight: Tensor
    norm_after_bias: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    bn_weight: Tensor
    bn_bias: Tensor
    bn_running_mean: Tensor
    bn_running_var: Tensor
    bn_num_batches_tracked: Tensor

    # Initialization

    def __init__(self, shape: LayerShape, config: AdapterConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        # norms, convolution and biases are registered only if the config enables them
        I, K, D = self.input_width, self.width, self.bottleneck
        if config.ln_before:
            self.adopt("norm_before", nn.LayerNorm(I))
        inner = 2 * D if config.block == "conformer" else D  # values and gates of the GLU
        self.adopt("down", nn.Linear(I, inner, bias=config.use_bias))
        if config.block == "conformer":
            self.adopt("conv", nn.Conv1d(D, D, config.conv_kernel_size, groups=D))
            self.adopt("bn", nn.BatchNorm1d(D))
        self.adopt("up", nn.Linear(D, K, bias=config.use_bias))
        if config.ln_after:
            self.adopt("norm_after", nn.LayerNorm(K))
        self.add_gate()
        self.initialize()

    def check_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError unless the variances of the batch norm are positive or zero."""
        for name in tensors.keys() & {"bn_running_var", "bn_num_batches_tracked"}:
            require(
                tensors[name].is_meta or not bool((tensors[name] < 0).any()),
                f"{self.info.key}: {name} has negative values; the file is damaged",
            )

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialize the matrices by `init_weights` and all biases to zero."""
        config = self.config
        if config.init_weights == "zero_up":  # f(h) = 0: outputs are the base model's
            self.up_weight.zero_()
        elif config.init_weights == "normal":
            self.down_weight.normal_(std=0.01)
            self.up_weight.normal_(std=0.01)
        # "binary": without a deviation, quantized weights could not train
        else:
            nn.init.trunc_normal_(self.up_weight, std=1e-3, a=-2e-3, b=2e-3)
        for name, parameter in self.named_parameters():
            # of the gate, the layer with the logits: it starts as the same factor for all inputs
            if name.endswith("_bias") or name in ("gate_weight", "gate_up_weight"):
                parameter.zero_()

    # Forward pass

    def network(self, h: Tensor) -> Tensor:
        """f(h) of the module docstring, [..., K] for h [..., K]."""
        config = self.config
        if config.ln_before:
            h = self.norm(h, self.norm_before_weight, self.norm_before_bias)
        z = linear(h, *self.projection("down", h))  # [..., D], or [..., 2 D] for the gated block
        z = self.convolve(z) if config.block == "conformer" else self.act(z)
        z = F.dropout(z, config.bneck_dropout, self.training)
        f = linear(z, *self.projection("up", z))  # [..., K]
        if config.ln_after:
            f = self.norm(f, self.norm_after_weight, self.norm_after_bias)
        return f

    def matrices(self) -> tuple[Tensor, Tensor]:
        # the first D rows: the values of the conformer's gated unit, without the gates
        return self.down_weight[: self.bottleneck], self.up_weight

    @property
    def stacks(self) -> bool:
        return self.config.block == "bottleneck" and self.gate_stacks

    def norm(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Layer norm over the last dimension, K, in the dtype of `h`."""
        return layer_norm(h, weight.to(h.dtype), bias.to(h.dtype)).to(h.dtype)

    def convolve(self, z: Tensor) -> Tensor:
        """GLU, convolution over tokens, batch norm, SiLU: [N, T, D] for `z` [N, T, 2 D]."""
        if z.dim() != 3:
            raise InputError(
                f"block='conformer' needs activations of 3 dimensions [rows, tokens, width], and "
                f"those of {self.info.key} have {len(z.shape)}; use block='bottleneck'"
            )
        with torch.autocast(z.device.type, enabled=False):  # batch statistics need float32
            v = F.glu(z.float(), dim=-1)  # a sigmoid(g)
            # along T, same length
            v = depthwise(v, self.conv_weight.float(), self.conv_bias.float())
            # running statistics count each batch once, also under gradient checkpointing
            update = self.training and not self.recomputes()
            if update:
                self.bn_num_batches_tracked.add_(1)
            v = normalize_channels(
                v,
                self.bn_weight.float(),
                self.bn_bias.float(),
                (self.bn_running_mean, self.bn_running_var),
                training=self.training,
                update=update,
            )
            return F.silu(v).to(z.dtype)

    def recomputes(self) -> bool:
        """True if gradient checkpointing is recomputing this forward for the backward pass."""
        return torch.is_grad_enabled() and not self.info.context.recording


def whole_batch(config: AdapterConfig) -> str:
    """What needs all rows of a batch together, which are not those of one adapter; "": nothing."""
    if config.block == "conformer":
        return "block='conformer' has statistics over the rows of a batch"
    return "" if config.gate == "none" else f"gate={config.gate!r} reads the mask of one batch"


def last_tensors(config: AdapterConfig) -> tuple[str, ...]:
    """Return patterns of what the output is last multiplied by and added to; none of a gate."""
    # the output is then not the base's plus an update
    if config.gate != "none" or config.residual is False or config.train_layer_norms:
        return ()
    return ("norm_after_*",) if config.ln_after else ("up_weight", "up_bias")


def each_position(config: AdapterConfig) -> bool:
    """Return True if the output at a position follows from that position alone."""
    mixes = config.block == "conformer" or config.gate == "small"
    reads_stream = config.gate in READING and "attn" in config.locations
    return not mixes and not reads_stream and by_position(config)


def units(config: AdapterConfig) -> Ordered:
    """Where the tensors have the units of the bottleneck."""
    if config.block == "conformer":
        return "block='conformer' has statistics of the batch, which two widths would share"
    first, second = Components(0), Components(1)
    found = {"down_weight": first, "down_bias": first, "up_weight": second}
    # as wide as the adapter
    if config.gate == "large" and config.gate_rank is None:
        found |= {f"gate_{name}": each for name, each in found.items()}
    return found


@register
class BottleneckMethod(Method[AdapterConfig, BottleneckAdapter]):
    """A two-layer network at the end of each sub-layer."""

    name = "adapter"
    config_cls, adapter_cls = AdapterConfig, BottleneckAdapter
    summary = "a two-layer bottleneck at each sub-layer: Houlsby, AdaptFormer, conformer"
    paper = "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751"
    need = "added layers"
    recommended = "does not touch the weights: Houlsby, AdaptFormer, conformer for audio"
    lacks = {
        Capability.MERGE: (
            "bottleneck adapters are not linear and cannot be merged; keep the adapter, or call "
            "unload() for the base model"
        ),
        Capability.TOGETHER: whole_batch,
    }
    by_position = staticmethod(each_position)
    strength_tensors = staticmethod(last_tensors)
    components = staticmethod(units)

    def targets(self, c: WrapContext[AdapterConfig]) -> list[Target]:
        """The ends of sub-layers, projections to values, or whole blocks."""
        return gated_targets(c)

    def settings(self, c: WrapContext[AdapterConfig]) -> dict[str, Settings]:
        """Refuse the conformer block in decoders: its convolution would read future tokens."""
        of_values = values(c)
        if c.config.block == "conformer":
            # at the values of cross-attention it reads the outputs of the encoder
            keys = [key for key in c.targets if key not in of_values]
            refuse_in_decoders(c.model, keys, "block='conformer'", "block='bottleneck'")
        return gate_settings(c, of_values)

    def added(self, new: NewAdapters[AdapterConfig, BottleneckAdapter]) -> None:
        """Let the model keep the mask of the tokens, if the gate reads it."""
        keep_mask(new)

    def heat_maps(self, t: TrainContext[AdapterConfig, BottleneckAdapter]) -> list[HeatMap]:
        """The size of each network."""
        return network_sizes(t)
