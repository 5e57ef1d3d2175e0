"""Compacter: bottleneck adapters whose projections are sums of Kronecker products.

Karimi Mahabadi, Henderson and Ruder 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter
Layers", NeurIPS (arXiv:2106.04647). Compacter++ is `locations=["ffn"]`, the PHM-Adapter
`factorized_phm=False, shared_phm_rule=False`, the low-rank adapter `projection="lowrank"`.

Shapes: K width of the residual stream, D bottleneck, N terms (`phm_dim`), Q rank (`phm_rank`),
I and O the widths of one projection (K and D for down, D and K for up). With rules R [N, N, N]

    H = sum_n R_n (x) B_n,    B_n = left_n right_n,    f(h) = act(h H_down + b_down) H_up + b_up

and one R for all layers, locations and projections. H is never materialized. Placements and
residuals are those of `petl.methods.families.sublayers`. The published results also train the
backbone's layer norms and use no weight decay, which on R would shrink all adapters of the model
together.

Where paper and code disagree, this follows the code: biases are on, and rules that are not shared
are initialized with std 0.01 whatever `phm_init_range` is. The low-rank adapter computes the matrix
product of the paper's formula, since the code multiplies elementwise and works for rank 1 only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petl.core.layers.layer import LayerInfo, LayerShape
from petl.core.method import Method, Settings, Target, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap
from petl.core.register import register
from petl.core.spec.components import Components, Ordered
from petl.core.spec.config import config_field, require
from petl.core.support import Capability
from petl.core.types import Fields
from petl.errors import InputError
from petl.methods.compacter.kronecker import times_factored, times_full
from petl.methods.families.sublayers import (
    BY_FACTOR,
    SubLayerAdapter,
    SubLayerConfig,
    by_position,
    network_sizes,
    sublayer_places,
    sublayer_targets,
)
from petl.system.collectives import num_processes

OWN_RULE_STD = 0.01  # of rules that are not shared, as in the authors' code
KRONECKER = ("projection=phm", lambda config: config.projection == "phm")
SHARED = (
    "projection=phm and shared_phm_rule=true",
    lambda config: config.projection == "phm" and config.shared_phm_rule,
)


@dataclass
class CompacterConfig(SubLayerConfig):
    """Fields of Compacter; N of the module's docstring is `phm_dim`, Q is `phm_rank`."""

    reduction_factor: float | None = config_field(
        "bottleneck width = model width / reduction_factor, a number above 0", 32, acts=BY_FACTOR
    )
    non_linearity: str = config_field(
        "activation in the bottleneck, a name in transformers' ACT2FN", "gelu_new"
    )
    projection: str = config_field(
        "phm (sum of Kronecker products), or lowrank", "phm", choices=("phm", "lowrank")
    )
    phm_dim: int = config_field(
        "number of Kronecker terms; must divide the model's width and the bottleneck",
        4,
        ge=1,
        acts=KRONECKER,
    )
    phm_rank: int = config_field(
        "rank of the factors, and of projection='lowrank'",
        1,
        ge=1,
        acts=("factorized_phm=true", lambda c: c.factorized_phm or c.projection == "lowrank"),
    )
    factorized_phm: bool = config_field(
        "low-rank terms B = left right; false: full matrices B (PHM-Adapter)", True, acts=KRONECKER
    )
    shared_phm_rule: bool = config_field(
        "share one rule in the whole model; false: one rule per projection", True, acts=KRONECKER
    )
    factorized_phm_rule: bool = config_field(
        "rank-1 rules, each the product of a column and a row", False, acts=KRONECKER
    )
    learn_phm: bool = config_field("train the shared rule; false: freeze it", True, acts=SHARED)
    phm_c_init: str = config_field(
        "initialization of the shared rule: normal, or uniform in (-1, 1)",
        "normal",
        choices=("normal", "uniform"),
        acts=SHARED,
    )
    phm_init_range: float = config_field(
        "standard deviation of normal initializations, at least 0",
        1e-4,
        ge=0,
        acts=(
            "w_init=normal, or a shared rule with phm_c_init=normal",
            lambda c: c.w_init == "normal" or (SHARED[1](c) and c.phm_c_init == "normal"),
        ),
    )
    w_init: str = config_field(
        "initialization of left, right and B: glorot-uniform, glorot-normal, or normal with "
        "standard deviation phm_init_range",
        "glorot-uniform",
        choices=("glorot-uniform", "glorot-normal", "normal"),
    )

    def sized(self, size: int) -> Fields:
        """Fields for rank `size`: `phm_rank`, and a bottleneck of at least `phm_dim * size`.

        A narrower bottleneck would bound the rank of the projections and leave factors unused.
        """
        return {"phm_rank": size, "r": max(self.r or 0, self.phm_dim * size)}

    def bottleneck(self, width: int) -> int:
        """D for a residual stream of this width; by reduction_factor, a multiple of `phm_dim`."""
        D = super().bottleneck(width)
        # an explicit r is not changed, so that `_check_division` can raise
        if self.r is not None or self.projection != "phm":
            return D
        return max(self.phm_dim, D - D % self.phm_dim)

    @property
    def has_shared_rule(self) -> bool:
        """True if the layers share one rule."""
        return self.projection == "phm" and self.shared_phm_rule


def init_factor(config: CompacterConfig, *shape: int) -> nn.Parameter:
    """A factor or B of `shape`, drawn by `w_init`; Glorot with gain sqrt(2), for each term alone.

    The last two dimensions of `shape` are fan-in and fan-out.
    """
    tensor = torch.empty(shape)
    rows, columns = shape[-2:]
    if config.w_init == "glorot-uniform":
        bound = (12 / (rows + columns)) ** 0.5  # gain sqrt(2) times sqrt(6 / (fan_in + fan_out))
        return nn.Parameter(tensor.uniform_(-bound, bound))
    std = 2 * (rows + columns) ** -0.5 if config.w_init == "glorot-normal" else None  # gain sqrt(2)
    return nn.Parameter(tensor.normal_(std=config.phm_init_range if std is None else std))


def rule_shapes(config: CompacterConfig) -> dict[str, tuple[int, int, int]]:
    """Names and shapes of a rule's tensors: `rule` [N, N, N], or its factors.

    The factors are `rule_left` [N, N, 1] and `rule_right` [N, 1, N].
    """
    N = config.phm_dim
    if config.factorized_phm_rule:
        return {"rule_left": (N, N, 1), "rule_right": (N, 1, N)}  # N rank-1 matrices
    return {"rule": (N, N, N)}


class SharedRule(nn.Module):
    """The rule that all layers of an adapter share; registered as buffers if it is frozen."""

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
                self.register_buffer(name, value)  # frozen, but saved


class CompacterAdapter(SubLayerAdapter):
    """Projections of one sub-layer, "down" and "up": `<side>_left` [N, I/N, Q], `<side>_right`.

    `<side>_right` is [N, Q, O/N]. For the low-rank adapter they are [I, Q] and [Q, O]; without
    `factorized_phm` both are replaced by `<side>_weight` [N, I/N, O/N]. Optional: `<side>_bias`
    [O], `scale` [1], and for rules that are not shared `<side>_rule`, or `<side>_rule_left` and
    `<side>_rule_right`.
    """

    keep_float32 = True  # a rule starts at 1e-4: products of three such underflow in float16
    start_tolerance = 1e-4  # the up projection is small at the start, not zero

    def __init__(self, shape: LayerShape, config: CompacterConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        K, D, N, Q = self.width, self.bottleneck, config.phm_dim, config.phm_rank
        for side, rows, columns in (("down", K, D), ("up", D, K)):  # H is [rows, columns]
            shapes = {"left": (rows, Q), "right": (Q, columns)}
            if config.projection == "phm":
                # B_n = left_n right_n
                shapes = {"left": (N, rows // N, Q), "right": (N, Q, columns // N)}
                if not config.factorized_phm:
                    shapes = {"weight": (N, rows // N, columns // N)}  # B_n itself
                if not config.shared_phm_rule:
                    for name, size in rule_shapes(config).items():
                        rule = nn.Parameter(torch.empty(size).normal_(std=OWN_RULE_STD))
                        self.register_parameter(f"{side}_{name}", rule)
            for name, size in shapes.items():
                self.register_parameter(f"{side}_{name}", init_factor(config, *size))
            if config.use_bias:
                self.register_parameter(f"{side}_bias", nn.Parameter(torch.zeros(columns)))

    def network(self, h: Tensor, addend: Tensor | None = None) -> Tensor:
        """f(h), plus `addend` [..., K] if given, in float32."""
        config, context = self.config, self.info.context
        # a rule per projection is used in one segment only
        if config.has_shared_rule and config.learn_phm and num_processes() > 1:
            # the segments' separate backward passes would trigger DDP's reduction of R too early
            require(
                torch.is_grad_enabled() or not context.recording,
                f"method 'compacter' cannot run under reentrant checkpointing in {num_processes()} "
                "processes: the gradient of its shared rule would be reduced before it is "
                "complete; pass gradient_checkpointing_kwargs={'use_reentrant': False}",
            )
        # float32: the rule starts at 1e-4 (see `keep_float32`)
        with torch.autocast(h.device.type, enabled=False):
            z = self.act(self.project("down", h.float()))  # [..., D]
            z = nn.functional.dropout(z, config.bneck_dropout, self.training)
            return self.project("up", z, addend)

    def added(self, y: Tensor, h: Tensor) -> Tensor:
        """`y + f(h)`, with y as the addend of the last product where dtypes allow."""
        # in float32, the last matrix product adds y, which saves a kernel
        return self.network(h, addend=y) if y.dtype == torch.float32 else super().added(y, h)

    def matrices(self) -> tuple[Tensor, Tensor]:
        device, maps = next(self.parameters()).device, []
        for side, width in (("down", self.width), ("up", self.bottleneck)):
            zero = self.project(side, torch.zeros(1, width, device=device))
            # minus the bias, which the zero vector is mapped to
            maps.append((self.project(side, torch.eye(width, device=device)) - zero).t())
        return maps[0], maps[1]

    @property
    def stacks(self) -> bool:
        return self.config.projection == "lowrank" or self.config.factorized_phm

    def project(self, side: str, h: Tensor, addend: Tensor | None = None) -> Tensor:
        """`h H + b` [..., O] for h [..., I], plus `addend` if given, all float32."""
        config = self.config
        bias = self.tensor(f"{side}_bias") if config.use_bias else None
        if config.projection == "phm" and config.factorized_phm:
            factors = self.tensor(f"{side}_left"), self.tensor(f"{side}_right")
            return times_factored(h, self.rule(side), *factors, bias, addend)  # without forming H
        if config.projection == "phm":
            out = times_full(h, self.rule(side), self.tensor(f"{side}_weight"))
        else:
            # two thin products are cheaper than forming left right
            out = h @ self.tensor(f"{side}_left") @ self.tensor(f"{side}_right")
        for term in (bias, addend):
            out = out if term is None else out + term
        return out

    def rule(self, side: str) -> Tensor:
        """The rule R of a projection, [N, N, N], shared or its own, in float32."""
        owner = self.info.shared if self.config.shared_phm_rule else self
        prefix = "" if self.config.shared_phm_rule else f"{side}_"
        parts = [getattr(owner, prefix + name).float() for name in rule_shapes(self.config)]
        # a factorized rule: N outer products
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the adapter, in float32 even if the model was cast as a whole."""
        return getattr(self, name).float()


def units(config: CompacterConfig) -> Ordered:
    """Where the tensors have the units of the bottleneck: (block, column) of N blocks."""
    N = config.phm_dim if config.projection == "phm" else 1
    last, before = Components(-1, shared=N), Components(-2, shared=N)
    return {
        "up_left": before,
        "up_weight": before,
        "down_right": last,
        "down_weight": last,
        "down_bias": Components(0, N),
    }


@register
class Compacter(Method[CompacterConfig, CompacterAdapter]):
    """Bottlenecks whose projections are sums of Kronecker products."""

    name = "compacter"
    config_cls, adapter_cls = CompacterConfig, CompacterAdapter
    summary = "bottleneck adapters of Kronecker products with a shared rule; very few parameters"
    paper = (
        "Karimi Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, "
        "arXiv:2106.04647"
    )
    need = "few parameters"
    lr = 3e-3
    lacks = {
        Capability.MERGE: (
            "Compacter adapters are not linear and cannot be merged; keep the adapter, or call "
            "unload() for the base model"
        ),
        Capability.RANKS: "its widths must divide",
        Capability.TOGETHER: "",
    }
    by_position = staticmethod(by_position)
    components = staticmethod(units)

    def targets(self, c: WrapContext[CompacterConfig]) -> list[Target]:
        """The ends of sub-layers, or whole blocks."""
        return sublayer_targets(c, sublayer_places(c))

    def settings(self, c: WrapContext[CompacterConfig]) -> dict[str, Settings]:
        """Refuse widths that `phm_dim` does not divide."""
        if c.config.projection == "phm":
            for key, (_, width) in c.shapes.items():
                _check_division(c.config, key, width)
        return {}

    def shared(self, c: WrapContext[CompacterConfig]) -> nn.Module | None:
        """The shared rule of an adapter, if it has one."""
        return SharedRule(c.config) if c.config.has_shared_rule else None

    def heat_maps(self, t: TrainContext[CompacterConfig, CompacterAdapter]) -> list[HeatMap]:
        """The size of each network."""
        return network_sizes(t)


def _check_division(config: CompacterConfig, key: str, width: int) -> None:
    N, D = config.phm_dim, config.bottleneck(width)
    require(
        width % N == 0,
        f"the width {width} of {key} is not divisible by phm_dim={N}; set another phm_dim",
    )
    if D % N:
        nearest = max(N, round(D / N) * N)
        raise InputError(
            f"bottleneck {D} is not divisible by phm_dim={N}; the nearest valid value is "
            f"r={nearest}"
        )
