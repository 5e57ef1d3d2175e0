"""The side network of one stack of blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.methods.sherl.config import SherlConfig
from petl.ops.recomputation import recomputed

EPS = 1e-6
SIZES = "sizes of features"  # key in `ForwardContext.series`


class SherlAdapter(Adapter):
    """Side network of one stack: tiers stacked over features, a score, and a way back.

    `down_weight` [S, H, K], `mix_weight` and `gate_weight` [S, H, H] with biases [S, H],
    `score_weight` [1, H], `up_weight` [K, H], `residual_gate` [1]; of an encoder also
    `norm_weight` [K], and `norm_bias` where its norms have one.
    """

    def __init__(self, shape: LayerShape, config: SherlConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        K, H = shape.in_features, config.width(shape.in_features)
        self.sides: list[int] = info.settings["sides"]
        self.temperature = config.gate_temperature
        S = len(self.sides) + 1
        self.down_weight, self.down_bias = _uniform(K, S, H, K), _uniform(K, S, H)
        self.mix_weight, self.mix_bias = _uniform(H, S, H, H), _uniform(H, S, H)
        self.gate_weight, self.gate_bias = _uniform(H, S, H, H), _uniform(H, S, H)
        self.score_weight, self.score_bias = _uniform(H, 1, H), _uniform(H, 1)
        self.up_weight, self.up_bias = _uniform(H, K, H), _uniform(H, K)
        self.residual_gate = nn.Parameter(torch.zeros(1))
        self.norm: tuple[float, bool] | None = info.settings["norm"]
        if self.norm is not None:
            self.norm_weight = nn.Parameter(torch.ones(K))
            if self.norm[1]:
                self.norm_bias = nn.Parameter(torch.zeros(K))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the input of the late block, or the memory of an encoder, [N, T, K].

        Hooks of the blocks call it, not the block that holds the adapter.

        Args:
            x: list of the S features [N, T, K].
            y: what the late block would have got, [N, T, K].
        """
        # a method as the function would keep the whole adapter for backward, and not see
        # parameters that another method, such as binary, reads in another way
        names = [name for name, _ in self.named_parameters()]
        network = _Network(names, self.temperature, self.norm)
        network.notes = self.info.context.recording
        out = recomputed(network, y, *(getattr(self, name) for name in names), *x)
        network.notes = False  # not again in backward
        if network.sizes is not None:
            self._record(network.sizes)
        return out

    def _record(self, sizes: Tensor) -> None:
        """Add the mean over the tokens that are no padding of `sizes`, [N, T, S], to the series."""
        info, sizes = self.info, sizes.flatten(0, -2)
        mask = info.context.mask_of(len(sizes), in_decoder=info.settings["in_decoder"])
        if mask is None:
            mean = sizes.mean(0)
        else:
            mask = mask.to(sizes)  # a model may be split over devices
            mean = (mask.unsqueeze(-1) * sizes).sum(0) / mask.sum().clamp(min=1)
        info.context.series.setdefault(SIZES, {})[f"{info.key}.{info.adapter_name}"] = mean

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        return base(x, *args, **kwargs)  # a hook has changed what the block gets


class _Network:
    """The equations of the package's docstring.

    Args:
        names: of the parameters, in the order of a call.
        temperature: of the residual gate.
        norm: epsilon of the encoder's norm, and whether it has a bias; None: no norm.

    Attributes:
        notes: whether a call sets `sizes`.
        sizes: |a_i z_i| of the tiers, then |z_g|, [N, T, S], without a graph.
    """

    def __init__(
        self, names: Sequence[str], temperature: float, norm: tuple[float, bool] | None
    ) -> None:
        self.names, self.temperature, self.norm = names, temperature, norm
        self.notes = False
        self.sizes: Tensor | None = None

    def __call__(self, last: Tensor, *tensors: Tensor) -> Tensor:
        """Return y [N, T, K], or norm(y).

        Args:
            last: what the late block would have got, [N, T, K].
            tensors: the parameters, then the S features [N, T, K].
        """
        p = dict(zip(self.names, tensors, strict=False))
        features = tensors[len(p) :]
        *tiers, guide = (_tier(p, i, x) for i, x in enumerate(features))
        z = torch.stack(tiers, -2)  # [..., S-1, H]
        a = _weights(z, guide, p["score_weight"], p["score_bias"])
        if self.notes:
            of_tiers, of_guide = (t.detach().float().norm(dim=-1) for t in (z, guide))
            self.sizes = torch.cat([a.detach() * of_tiers, of_guide.unsqueeze(-1)], -1)
        f = guide + (a.to(z.dtype).unsqueeze(-1) * z).sum(-2)
        up = F.linear(F.relu(f), p["up_weight"].to(f.dtype), p["up_bias"].to(f.dtype))
        gate = torch.tanh(p["residual_gate"] / self.temperature).to(last.dtype)
        y = up.to(last.dtype) + gate * last
        if self.norm is None:
            return y
        return _normalized(y, p["norm_weight"], p.get("norm_bias"), self.norm[0])


def _tier(p: dict[str, Tensor], i: int, x: Tensor) -> Tensor:
    """Return z_i [..., H] of feature i, `x` [..., K]."""
    (D, d), (M, m), (G, g) = (
        (p[f"{name}_weight"][i].to(x.dtype), p[f"{name}_bias"][i].to(x.dtype))
        for name in ("down", "mix", "gate")
    )
    u = F.relu(F.linear(x, D, d))
    return (F.linear(u, M, m) + u) * F.linear(u, G, g).sigmoid()


def _weights(z: Tensor, guide: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return a [..., S-1]: relevance to the guide over redundancy, in float32."""
    with torch.autocast(z.device.type, enabled=False):
        z, guide = z.float(), guide.float()
        e = z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + EPS)
        redundancy = F.relu(e @ e.mT).sum(-1).clamp(min=EPS)
        score = F.linear(z * guide.unsqueeze(-2), w.float(), b.float())
        a = F.relu(score.squeeze(-1)) / redundancy
        return a / (a.sum(-1, keepdim=True) + EPS)


def _normalized(y: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return layer norm of `y`, or RMS norm where there is no bias, in its dtype."""
    v, shape = y.float(), (y.shape[-1],)
    if bias is None:
        return F.rms_norm(v, shape, weight.float(), eps).to(y.dtype)
    return F.layer_norm(v, shape, weight.float(), bias.float(), eps).to(y.dtype)


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """Return a tensor with the distribution of torch's Linear."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32).uniform_(-bound, bound))
