"""Compacter: bottleneck adapters whose projections are sums of Kronecker products.

Karimi Mahabadi, Henderson and Ruder 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter
Layers", NeurIPS (arXiv:2106.04647). Compacter++ is `locations=["ffn"]`, the PHM-Adapter
`factorized_phm=False, shared_phm_rule=False`, the low-rank adapter `projection="lowrank"`.

Shapes: K width of the residual stream, D bottleneck, N terms (`phm_dim`), Q rank (`phm_rank`),
I and O the widths of one projection (K and D for down, D and K for up). With rules R [N, N, N]

    H = sum_n R_n (x) B_n,    B_n = left_n right_n,    f(h) = act(h H_down + b_down) H_up + b_up

and one R for all layers, sites and projections. H is never formed. Placements and residuals are
those of `petl.core.tuners.sublayers`; the norms of the backbone train as well in all published
results, which use no weight decay: on R it pulls all adapters of the model towards zero at once.

Where paper and code disagree, the code counts: biases are on, own rules start with std 0.01
whatever `phm_init_range` is. The low-rank adapter is the formula's matrix product, since the code
multiplies elementwise and works for rank 1 only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.distributed import num_processes
from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.registry import register
from petl.core.spec.config import config_field, require
from petl.core.tuners.sublayers import SubLayerAdapter, SubLayerConfig, SubLayerTuner
from petl.errors import InputError
from petl.ops.kronecker import times_factored, times_full

OWN_RULE_STD = 0.01


@dataclass
class CompacterConfig(SubLayerConfig):
    """See the module's docstring."""

    reduction_factor: float | None = config_field("the bottleneck is width / reduction_factor", 32)
    non_linearity: str = config_field("a name in transformers' ACT2FN", "gelu_new")
    projection: str = config_field("phm (sums of Kronecker products), or lowrank", "phm")
    phm_dim: int = config_field("terms of the sum; divides the model's width and the bottleneck", 4)
    phm_rank: int = config_field("rank of the factors, and of projection='lowrank'", 1)
    factorized_phm: bool = config_field("B = left right; false: B is free (PHM-Adapter)", True)
    shared_phm_rule: bool = config_field(
        "one rule for the whole model; false: one a projection", True
    )
    factorized_phm_rule: bool = config_field("rules are products of a column and a row", False)
    learn_phm: bool = config_field("train the shared rule", True)
    phm_c_init: str = config_field(
        "start of the shared rule: normal, or uniform in (-1, 1)", "normal"
    )
    phm_init_range: float = config_field("standard deviation of that normal", 1e-4)
    w_init: str = config_field(
        "start of left, right and B: glorot-uniform, glorot-normal, or normal with std "
        "phm_init_range",
        "glorot-uniform",
    )

    def check(self) -> None:
        super().check()
        for name, allowed in (
            ("projection", ("phm", "lowrank")),
            ("phm_c_init", ("normal", "uniform")),
            ("w_init", ("glorot-uniform", "glorot-normal", "normal")),
        ):
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r} is not one of {', '.join(allowed)}")
        for name in ("phm_dim", "phm_rank"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 1,
                f"{name}={value!r} is not a whole number from 1",
            )
        require(self.phm_init_range >= 0, f"phm_init_range={self.phm_init_range} is negative")
        require(
            self.learn_phm or self.has_shared_rule,
            "learn_phm=false freezes the shared rule, and there is none; leave it true",
        )

    def sized(self, size: int) -> dict[str, Any]:
        """The rank of the factors, and a bottleneck wide enough that it is no idle rank."""
        return {"phm_rank": size, "r": max(self.r or 0, self.phm_dim * size)}

    def bottleneck(self, width: int) -> int:
        """D for a residual stream of this width; by reduction_factor, a multiple of `phm_dim`."""
        D = super().bottleneck(width)
        if self.r is not None or self.projection != "phm":
            return D
        return max(self.phm_dim, D - D % self.phm_dim)

    @property
    def has_shared_rule(self) -> bool:
        """Whether the layers share one rule."""
        return self.projection == "phm" and self.shared_phm_rule


def start_weight(config: CompacterConfig, *shape: int) -> nn.Parameter:
    """A factor or B, drawn by `w_init` term by term with Glorot's gain sqrt(2)."""
    tensor = torch.empty(shape)
    rows, columns = shape[-2:]
    if config.w_init == "glorot-uniform":
        bound = (12 / (rows + columns)) ** 0.5
        return nn.Parameter(tensor.uniform_(-bound, bound))
    std = 2 * (rows + columns) ** -0.5 if config.w_init == "glorot-normal" else None
    return nn.Parameter(tensor.normal_(std=config.phm_init_range if std is None else std))


def rule_shapes(config: CompacterConfig) -> dict[str, tuple[int, int, int]]:
    """The tensors of a rule: `rule` [N, N, N], or `rule_left` [N, N, 1] and `rule_right`."""
    N = config.phm_dim
    if config.factorized_phm_rule:
        return {"rule_left": (N, N, 1), "rule_right": (N, 1, N)}
    return {"rule": (N, N, N)}


class SharedRule(nn.Module):
    """The rule that all layers of an adapter share; buffers if it is frozen."""

    def __init__(self, config: CompacterConfig) -> None:
        super().__init__()
        for name, shape in rule_shapes(config).items():
            value = torch.empty(shape)
            if config.phm_c_init == "uniform":
                value.uniform_(-1, 1)
            else:
                value.normal_(std=config.phm_init_range)
            if config.learn_phm:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)


class CompacterAdapter(SubLayerAdapter):
    """For each side, down and up: `<side>_left` [N, I/N, Q] and `<side>_right` [N, Q, O/N].

    For the low-rank adapter they are [I, Q] and [Q, O]; `<side>_weight` [N, I/N, O/N] stands for
    both if `factorized_phm` is off. Further `<side>_bias` [O], `scale` [1], and for rules that are
    not shared `<side>_rule`, or `<side>_rule_left` and `<side>_rule_right`.
    """

    merge_refusal = (
        "Compacter adapters are not linear and cannot be merged; keep the adapter, or call "
        "unload() for the base model"
    )
    keep_float32 = True  # a rule starts at 1e-4, and products of three such underflow in half
    start_tolerance = 1e-4

    def __init__(self, shape: LayerShape, config: CompacterConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        K, D, N, Q = self.width, self.bottleneck, config.phm_dim, config.phm_rank
        for side, rows, columns in (("down", K, D), ("up", D, K)):
            shapes = {"left": (rows, Q), "right": (Q, columns)}
            if config.projection == "phm":
                shapes = {"left": (N, rows // N, Q), "right": (N, Q, columns // N)}
                if not config.factorized_phm:
                    shapes = {"weight": (N, rows // N, columns // N)}
                if not config.shared_phm_rule:
                    for name, size in rule_shapes(config).items():
                        rule = nn.Parameter(torch.empty(size).normal_(std=OWN_RULE_STD))
                        self.register_parameter(f"{side}_{name}", rule)
            for name, size in shapes.items():
                self.register_parameter(f"{side}_{name}", start_weight(config, *size))
            if config.use_bias:
                self.register_parameter(f"{side}_bias", nn.Parameter(torch.zeros(columns)))

    def network(self, h: Tensor, extra_trainable: Tensor | None = None) -> Tensor:
        """f(h) plus `beside` [..., K], in float32."""
        config, context = self.config, self.info.context
        if config.has_shared_rule and config.learn_phm and num_processes() > 1:
            require(
                torch.is_grad_enabled() or not context.recording,
                "every layer uses Compacter's shared rule, which reentrant checkpointing cannot "
                "serve in several processes; pass gradient_checkpointing_kwargs="
                "{'use_reentrant': False}",
            )
        with torch.autocast(h.device.type, enabled=False):
            z = self.act(self.project("down", h.float()))
            z = nn.functional.dropout(z, config.bneck_dropout, self.training)
            return self.project("up", z, extra_trainable)

    def added(self, y: Tensor, h: Tensor) -> Tensor:
        return (
            self.network(h, extra_trainable=y) if y.dtype == torch.float32 else super().added(y, h)
        )

    @property
    def stacks(self) -> bool:
        return self.config.projection == "lowrank" or self.config.factorized_phm

    def project(self, side: str, h: Tensor, extra_trainable: Tensor | None = None) -> Tensor:
        """`h H + b` [..., O] for h [..., I], plus `beside`, all float32."""
        config = self.config
        bias = self.tensor(f"{side}_bias") if config.use_bias else None
        if config.projection == "phm" and config.factorized_phm:
            factors = self.tensor(f"{side}_left"), self.tensor(f"{side}_right")
            return times_factored(h, self.rule(side), *factors, bias, extra_trainable)
        if config.projection == "phm":
            out = times_full(h, self.rule(side), self.tensor(f"{side}_weight"))
        else:
            out = h @ self.tensor(f"{side}_left") @ self.tensor(f"{side}_right")
        for term in (bias, extra_trainable):
            out = out if term is None else out + term
        return out

    def rule(self, side: str) -> Tensor:
        """The rule of a projection, [N, N, N], shared or its own."""
        owner: Any = self.info.shared if self.config.shared_phm_rule else self
        prefix = "" if self.config.shared_phm_rule else f"{side}_"
        parts = [getattr(owner, prefix + name).float() for name in rule_shapes(self.config)]
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the adapter, in float32 even if the whole model was cast."""
        return getattr(self, name).float()


@register(
    "compacter",
    summary="bottlenecks of Kronecker products with a shared rule; very few parameters",
    paper="Karimi Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, "
    "arXiv:2106.04647",
    lr=3e-3,
)
class CompacterModel(SubLayerTuner):
    """The tuner of `CompacterConfig`."""

    config_cls, adapter_cls = CompacterConfig, CompacterAdapter

    def layer_settings(
        self, config: CompacterConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Refuses widths that `phm_dim` does not divide."""
        if config.projection == "phm":
            for key, (_, width) in shapes.items():
                _check_division(config, key, width)
        return {}

    def make_shared(
        self, config: CompacterConfig, shapes: Mapping[str, LayerShape]
    ) -> nn.Module | None:
        """The shared rule."""
        return SharedRule(config) if config.has_shared_rule else None


def _check_division(config: CompacterConfig, key: str, width: int) -> None:
    N, D = config.phm_dim, config.bottleneck(width)
    require(width % N == 0, f"the width {width} of {key} is not divisible by phm_dim={N}")
    if D % N:
        nearest = max(N, round(D / N) * N)
        raise InputError(
            f"bottleneck {D} is not divisible by phm_dim={N}; the nearest is r={nearest}"
        )
