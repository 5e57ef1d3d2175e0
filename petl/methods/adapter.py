"""Bottleneck adapters: a small two-layer network at the end of each sub-layer, or beside it.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", ICML (arXiv:1902.00751), after
attention and feed-forward; Pfeiffer et al. 2021, "AdapterFusion", EACL (arXiv:2005.00247), one per
layer; He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR
(arXiv:2110.04366), parallel and scaled; Chen et al. 2022, "AdaptFormer", NeurIPS
(arXiv:2205.13535), parallel on the residual stream; Cappellazzo et al. 2024, "Parameter-Efficient
Transfer Learning of Audio Spectrogram Transformers", MLSP (arXiv:2312.03694), the conformer block.

Shapes: K width of the residual stream, D bottleneck, N rows, T tokens, W kernel size. Placements
and residuals are those of `petl.core.tuners.sublayers`; the network is

    bottleneck    f(h) = LN_a(drop(act(LN_b(h) down^T)) up^T)
    conformer     [a; g] = LN_b(h) down^T; f(h) = LN_a(drop(SiLU(BN(conv(a sigmoid(g))))) up^T)

with biases, and with each norm only if asked for. The batch norm BN has the statistics of what one
process sees in one forward: gradient accumulation and several processes change them, and under
DDP the running values of rank 0 are those of all.

Where we depart from the sources: the network of AdapterFusion sees y plus the residual stream,
which is not offered; the nearest is `locations=["ffn"]`. The constructor in the audio study's code
zeroes both matrices, where only a bias would learn, and its block throws away a norm that it
computes; here only up starts at zero, and a norm that is asked for counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.model.structure import find_sublayers
from petl.core.registry import register
from petl.core.spec.config import config_field, require
from petl.core.tuners.sublayers import SubLayerAdapter, SubLayerConfig, SubLayerTuner
from petl.errors import InputError
from petl.ops.conformer import depthwise, normalize_channels
from petl.ops.stacked import layer_norm, linear

STARTS = ("zero_up", "normal", "binary")


@dataclass
class AdapterConfig(SubLayerConfig):
    """See the module's docstring; Houlsby is the default, `locations=["ffn"]` one per layer."""

    block: str = config_field(
        "bottleneck, or conformer (a depthwise convolution along tokens)", "bottleneck"
    )
    conv_kernel_size: int = config_field("kernel of the conformer block, odd, in tokens", 31)
    ln_before: bool = config_field("normalise the network's input", False)
    ln_after: bool = config_field("normalise the network's output", False)
    init_weights: str = config_field(
        "zero_up (starts at the base model), normal (both matrices N(0, 0.01^2)) or binary (up "
        "truncated normal of std 0.001, for adapters that are quantized)",
        "zero_up",
    )

    def check(self) -> None:
        super().check()
        require(
            self.block in ("bottleneck", "conformer"),
            f"block={self.block!r} is not bottleneck or conformer",
        )
        kernel = self.conv_kernel_size
        odd = isinstance(kernel, int) and kernel >= 1 and kernel % 2 == 1
        require(odd, f"conv_kernel_size={kernel!r} is not an odd number of tokens")
        require(
            self.init_weights in STARTS,
            f"init_weights={self.init_weights!r} is not one of {', '.join(STARTS)}",
        )


class BottleneckAdapter(SubLayerAdapter):
    """`down_weight` [D, K] ([2 D, K] if conformer), `up_weight` [K, D], and what the config adds.

    That is `down_bias`, `up_bias`, `scale` [1], `norm_before_*` and `norm_after_*` [K]; for the
    conformer block `conv_weight` [D, 1, W], `conv_bias` [D] and the state of a `BatchNorm1d(D)`.
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

    merge_refusal = (
        "bottleneck adapters are not linear and cannot be merged; keep the adapter, or call "
        "unload() for the base model"
    )

    def __init__(self, shape: LayerShape, config: AdapterConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        K, D = self.width, self.bottleneck
        if config.ln_before:
            self.adopt("norm_before", nn.LayerNorm(K))
        inner = 2 * D if config.block == "conformer" else D
        self.adopt("down", nn.Linear(K, inner, bias=config.use_bias))
        if config.block == "conformer":
            self.adopt("conv", nn.Conv1d(D, D, config.conv_kernel_size, groups=D))
            self.adopt("bn", nn.BatchNorm1d(D))
        self.adopt("up", nn.Linear(D, K, bias=config.use_bias))
        if config.ln_after:
            self.adopt("norm_after", nn.LayerNorm(K))
        self.start()

    def adopt(self, name: str, module: nn.Module) -> None:
        """Take the tensors of a module under flat names, `<name>_weight` and so on."""
        for tensor, value in module.named_parameters():
            self.register_parameter(f"{name}_{tensor}", value)
        for tensor, value in module.named_buffers():
            self.register_buffer(f"{name}_{tensor}", value)

    @torch.no_grad()
    def start(self) -> None:
        """The matrices by `init_weights`, all biases zero."""
        config = self.config
        if config.init_weights == "zero_up":
            self.up_weight.zero_()
        elif config.init_weights == "normal":
            self.down_weight.normal_(std=0.01)
            self.up_weight.normal_(std=0.01)
        else:
            nn.init.trunc_normal_(self.up_weight, std=1e-3, a=-2e-3, b=2e-3)
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                parameter.zero_()

    def network(self, h: Tensor) -> Tensor:
        config = self.config
        if config.ln_before:
            h = self.norm(h, self.norm_before_weight, self.norm_before_bias)
        z = linear(h, *self.projection("down", h))
        z = self.convolve(z) if config.block == "conformer" else self.act(z)
        z = F.dropout(z, config.bneck_dropout, self.training)
        f = linear(z, *self.projection("up", z))
        if config.ln_after:
            f = self.norm(f, self.norm_after_weight, self.norm_after_bias)
        return f

    @property
    def stacks(self) -> bool:
        return self.config.block == "bottleneck"

    def projection(self, name: str, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, or None, in the dtype of `h`."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias", None)
        return weight.to(h.dtype), None if bias is None else bias.to(h.dtype)

    def norm(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Layer norm over K, in the dtype of `h`."""
        return layer_norm(h, weight.to(h.dtype), bias.to(h.dtype)).to(h.dtype)

    def convolve(self, z: Tensor) -> Tensor:
        """Gate, convolution along tokens, batch norm, SiLU: [N, T, D] for `z` [N, T, 2 D]."""
        if z.dim() != 3:
            raise InputError(
                f"block='conformer' needs [rows, tokens, width], and {self.info.key} gives "
                f"{len(z.shape)} dimensions; use block='bottleneck'"
            )
        with torch.autocast(z.device.type, enabled=False):
            v = F.glu(z.float(), dim=-1)
            v = depthwise(v, self.conv_weight.float(), self.conv_bias.float())
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
        """Whether checkpointing runs this forward a second time, for the backward pass."""
        return torch.is_grad_enabled() and not self.info.context.recording


@register(
    "adapter",
    summary="a two-layer bottleneck at each sub-layer: Houlsby, AdaptFormer, conformer",
    paper="Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751",
)
class AdapterModel(SubLayerTuner):
    """The tuner of `AdapterConfig`."""

    config_cls, adapter_cls = AdapterConfig, BottleneckAdapter

    def layer_settings(
        self, config: AdapterConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Refuses a convolution along the tokens of a decoder, which would see the future."""
        if config.block == "conformer":
            causal = {sub.closing for sub in find_sublayers(model) if sub.causal}
            decoder = re.search("ForCausalLM|LMHead", type(model).__name__)
            for key in shapes:
                require(
                    key not in causal and not decoder,
                    f"block='conformer' looks ahead along the tokens, and {key} belongs to a "
                    "decoder; use block='bottleneck', or leave it out with exclude_modules",
                )
        return {}
