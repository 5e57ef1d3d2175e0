"""The side network of one stack of blocks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.methods.sherl.config import SherlConfig

EPS = 1e-6
TIERS = ("down", "mix", "gate")


class SherlAdapter(Adapter):
    """Side network of one stack: tiers stacked over features, a score, and a way back.

    `down_weight` [S, H, K], `mix_weight` and `gate_weight` [S, H, H] with biases [S, H],
    `score_weight` [1, H], `up_weight` [K, H], `residual_gate` [1]; of an encoder also
    `norm_weight` [K], and `norm_bias` where its norms have one.
    """

    down_weight: Tensor
    down_bias: Tensor
    mix_weight: Tensor
    mix_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor

    merge_refusal = (
        "SHERL's side network is no update of a weight and cannot be merged; keep the adapter, or "
        "call unload() for the base model"
    )

    def __init__(self, shape: LayerShape, config: SherlConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        K, H = shape.in_features, config.width(shape.in_features)
        self.sides: list[int] = info.settings["sides"]
        self.temperature = config.gate_temperature
        S = len(self.sides) + 1
        for name, inner in zip(TIERS, (K, H, H), strict=True):
            self.register_parameter(f"{name}_weight", _uniform(inner, S, H, inner))
            self.register_parameter(f"{name}_bias", _uniform(inner, S, H))
        self.score_weight = _uniform(H, 1, H)
        self.score_bias = _uniform(H, 1)
        self.up_weight, self.up_bias = _uniform(H, K, H), _uniform(H, K)
        self.residual_gate = nn.Parameter(torch.zeros(1))
        self.norm: tuple[float, bool] | None = info.settings["norm"]
        if self.norm is not None:
            self.norm_weight = nn.Parameter(torch.ones(K))
            if self.norm[1]:
                self.norm_bias = nn.Parameter(torch.zeros(K))

    def tier(self, i: int, x: Tensor) -> Tensor:
        """Return z_i [..., H] of feature `x` [..., K]."""
        (D, d), (M, m), (G, g) = (
            (getattr(self, f"{n}_weight")[i].to(x.dtype), getattr(self, f"{n}_bias")[i].to(x.dtype))
            for n in TIERS
        )
        u = F.relu(F.linear(x, D, d))
        return (F.linear(u, M, m) + u) * F.linear(u, G, g).sigmoid()

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Return the input of the late block, or the memory of an encoder, [N, T, K].

        Hooks of the blocks call it, not the block that holds the adapter.

        Args:
            x: list of the S features [N, T, K].
            y: what the late block would have got, [N, T, K].
        """
        fused = self.fuse([self.tier(i, feature) for i, feature in enumerate(x)], y)
        return fused if self.norm is None else self.normalize(fused)

    def with_base(self, x: Tensor, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return base(x, *args, **kwargs)  # a hook has changed what the block gets

    def fuse(self, tiers: list[Tensor], last: Tensor) -> Tensor:
        """Return y [N, T, K] of the S tiers [N, T, H] and what the late block would have got."""
        guide, z = tiers[-1], torch.stack(tiers[:-1], -2)  # [..., H], [..., S-1, H]
        f = guide + (self.weights(z, guide).to(z.dtype).unsqueeze(-1) * z).sum(-2)
        up, bias = self.up_weight.to(f.dtype), self.up_bias.to(f.dtype)
        gate = torch.tanh(self.residual_gate / self.temperature).to(last.dtype)
        return F.linear(F.relu(f), up, bias).to(last.dtype) + gate * last

    def weights(self, z: Tensor, guide: Tensor) -> Tensor:
        """Return a [..., S-1]: relevance to the guide over redundancy, in float32."""
        with torch.autocast(z.device.type, enabled=False):
            z, guide = z.float(), guide.float()
            e = z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + EPS)
            redundancy = F.relu(e @ e.mT).sum(-1).clamp(min=EPS)
            score = F.linear(
                z * guide.unsqueeze(-2), self.score_weight.float(), self.score_bias.float()
            )
            a = F.relu(score.squeeze(-1)) / redundancy
            return a / (a.sum(-1, keepdim=True) + EPS)

    def normalize(self, y: Tensor) -> Tensor:
        """Return norm(y), in the dtype of `y`: layer norm, or RMS norm where there is no bias."""
        assert self.norm is not None
        eps, has_bias = self.norm
        v, shape = y.float(), (y.shape[-1],)
        if has_bias:
            v = F.layer_norm(v, shape, self.norm_weight.float(), self.norm_bias.float(), eps)
        else:
            v = F.rms_norm(v, shape, self.norm_weight.float(), eps)
        return v.to(y.dtype)


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """Return a tensor with the distribution of torch's Linear."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32).uniform_(-bound, bound))
