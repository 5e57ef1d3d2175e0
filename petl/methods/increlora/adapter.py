"""The components of one IncreLoRA layer, and the state that the layers of an adapter share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from petl.core.layers.layer import Adapter, Factors, LayerInfo, LayerShape
from petl.methods.increlora.components import Pull, first_components
from petl.methods.increlora.config import IncreloraConfig
from petl.methods.increlora.grouped import GroupedIncrelora
from petl.methods.increlora.importance import watch
from petl.ops.low_rank import add_low_rank, linear_with_low_rank

STD = 0.02  # initial standard deviation of A and B, as in the authors' code
RESERVE = 1e-5  # weight of a reserve component, from the paper

Penalty = tuple[Tensor, Tensor, Tensor]  # value, gradient of A's rows, gradient of B's columns


@dataclass
class Growth:
    """State of growth that the layers of one adapter share.

    Attributes:
        ranks: active rank by module path.
        costs: parameters per component by module path.
        config: the config, which defines when growth ends.
        grows: False for an adapter that is loaded for inference.
        scored: True if the next backward pass computes importance scores.
        layers: the layers by module path.
        is_open: True while ranks can still grow.
    """

    ranks: dict[str, int]
    costs: dict[str, int]
    config: IncreloraConfig
    grows: bool
    scored: bool = False
    layers: dict[str, "IncreloraAdapter"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Update `is_open` from the ranks."""
        full = self.config.is_full(self.ranks.values(), self.costs.values())
        self.is_open = self.grows and not full

    @property
    def weight(self) -> float:
        """Weight in the loss of each layer's two norms: the penalty is their mean over layers."""
        return self.config.orth_reg_weight / (2 * len(self.ranks))

    def penalties(self) -> dict[str, "Penalty"]:
        """Penalty of each trainable layer by module path; empty if tensors are sharded."""
        layers = [layer for layer in self.layers.values() if layer.lora_A.requires_grad]
        unsharded = all(type(layer.lora_A) is nn.Parameter for layer in layers)
        return self.penalties_of(layers) if unsharded else {}

    @torch.no_grad()
    def penalties_of(self, layers: Sequence["IncreloraAdapter"]) -> dict[str, "Penalty"]:
        """`weight (||A A^T - 1|| + ||B^T B - 1||)` of active and reserve components, by layer path.

        With it the gradients of the two norms, by rows of A and by columns of B. All layers are
        computed together: one by one they would take many small kernels.
        """
        A = [layer.lora_A[: layer.num_trained] for layer in layers]
        B = [layer.lora_B[:, : layer.num_trained].t() for layer in layers]
        norms, gradients = gram_distances([*A, *B])
        N = len(layers)
        values = torch._foreach_mul(torch._foreach_add(norms[:N], norms[N:]), self.weight)
        rows = zip(layers, values, gradients[:N], gradients[N:], strict=True)
        return {layer.info.key: (value, to_A, to_B.t()) for layer, value, to_A, to_B in rows}


class IncreloraAdapter(Adapter):
    """`lora_A` [C, I], `lora_B` [O, C] and weights `E` [C, 1] of a layer's components.

    The first `rank` components are active; while ranks grow, the next ones are the reserve. Further
    buffers: `ema` [2], the smoothed importance and its uncertainty; `steps` [2, C], the steps at
    which each component joined the reserve and became active, -1 for not yet.
    """

    # depends on how rows are split over processes: scores are means of sums of absolute values
    of_own_rows = ("ema",)

    rank: Tensor
    ema: Tensor
    steps: Tensor

    def __init__(self, shape: LayerShape, config: IncreloraConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        self.growth: Growth = info.settings["growth"]
        self.growth.layers[info.key] = self
        C, R, (I, O) = info.settings["capacity"], self.active_rank, shape
        self.lora_A = nn.Parameter(torch.randn(C, I) * STD)
        self.lora_B = nn.Parameter(torch.randn(O, C) * STD)
        E = torch.zeros(C, 1)
        E[R:] = (
            RESERVE if config.advance_learn else 0.0
        )  # the weight with which a component becomes active
        if not config.init_weights:
            # for tests: with E = 0 the update is zero
            E[:R].normal_()
        self.E = nn.Parameter(E)
        self.register_buffer("rank", torch.tensor(R))
        self.register_buffer("ema", torch.zeros(2))
        steps = torch.full((2, C), -1)
        steps[0, : R + self.reserve] = steps[1, :R] = 0
        self.register_buffer("steps", steps)
        self.probe = torch.zeros((), requires_grad=True)  # a leaf whose gradient is the score

    @property
    def active_rank(self) -> int:
        """The number of active components: the value of `rank`, without a host-device sync."""
        return self.growth.ranks[self.info.key]

    @property
    def reserve(self) -> int:
        """The number of components that are trained in advance."""
        return self.config.reserve if self.growth.is_open else 0

    @property
    def num_trained(self) -> int:
        """The number of components that train: active ones and reserve."""
        return self.active_rank + self.reserve

    # The update

    def factors(self) -> Factors:
        """The update of the active components, for evaluation, merging and export."""
        return self.components(self.active_rank)

    def components(self, count: int, pull: Pull | None = None) -> Factors:
        """The update of the first `count` components; A is multiplied by their weights E.

        Args:
            pull: gradients of the penalty, which the backward pass adds.
        """
        scale = self.config.lora_alpha / (self.active_rank + 1e-5)  # 1e-5 as in the authors' code
        A, B = first_components(
            self.lora_A, self.lora_B, self.E, self.active_rank, count, rest=RESERVE, pull=pull
        )
        return Factors(A, B, scale)

    def plain_factors(self) -> Factors | None:
        """`factors()` in evaluation; None in training, which adds scores and penalties."""
        return None if self.training else self.factors()

    @property
    def drop_rate(self) -> float:
        return self.config.lora_dropout if self.training else 0.0

    @property
    def is_scored(self) -> bool:
        """True if the next backward pass computes this layer's importance score."""
        trains = self.training and self.lora_A.requires_grad
        return trains and self.growth.is_open and self.growth.scored

    def current_factors(self) -> Factors:
        """The update for this forward pass, which includes the reserve in training.

        In training, the backward pass adds the gradient of the orthogonality penalty.
        """
        if not self.training:
            return self.factors()
        return self.components(self.num_trained, self.penalty_gradients())

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        scores_dropped_input = self.is_scored and self.drop_rate > 0  # needs the dropout's output
        if args or kwargs or scores_dropped_input:
            return self(x, base(x, *args, **kwargs))
        factors = self.current_factors()
        y = linear_with_low_rank(x, base, *factors, self.drop_rate)
        if y is None:
            y, x = base(x), self.drop(x)
            y = add_low_rank(y, x, *factors)
        return self.with_score(y, x, factors)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, factors = self.drop(x), self.current_factors()
        return self.with_score(add_low_rank(y, x, *factors), x, factors)

    def with_score(self, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """Return `y`; its backward pass computes the importance score if the step is scored."""
        if not self.is_scored:
            return y
        A, B, scale = factors
        return watch(y, x, A, B, scale / self.entries(), self.probe_on(x.device))

    @classmethod
    def grouped(
        cls, adapters: Sequence[Self], base_layer: nn.Module, generators: Any, captured: object
    ) -> nn.Module:
        """The layer that trains several adapters in one pass, with the scores of each."""
        return GroupedIncrelora(base_layer, generators, adapters)

    def penalty_gradients(self) -> Pull | None:
        """The penalty's gradients for this layer; None if it has no penalty.

        The first layer of a forward pass computes them for all layers. Under torch.compile, and for
        sharded tensors, each layer computes its own.
        """
        context, growth, key = self.info.context, self.growth, self.info.key
        if growth.weight == 0 or not self.lora_A.requires_grad:
            return None
        name, penalties = self.info.adapter_name, {}
        if not torch.compiler.is_compiling():
            penalties = context.compute_once(("penalty", name), growth.penalties)
        value, to_A, to_B = penalties.get(key) or growth.penalties_of([self])[key]
        context.record(f"{key}.{name}", value)
        return None if context.scale is None else (to_A, to_B, context.scale, growth.weight)

    def entries(self) -> float:
        """Divisor of the score: the number of entries of the update, or its square root."""
        I, O = self.shape
        return float(I * O) if self.config.score_norm == "mean" else (I * O) ** 0.5

    # The score

    def probe_on(self, device: torch.device) -> Tensor:
        """The probe, created again if the model was moved to another device."""
        if self.probe.device != device:
            self.probe = torch.zeros((), device=device, requires_grad=True)
        return self.probe

    def pop_score(self) -> Tensor | None:
        """The score summed over the last backward passes, 0-d, or None; clears it."""
        score, self.probe.grad = self.probe.grad, None
        return score

    # Growth

    @torch.no_grad()
    def grow(self, count: int, step: int) -> None:
        """Make the next `count` components active at `step`."""
        R = self.growth.ranks[self.info.key] = self.active_rank + count
        self.rank.fill_(R)
        self.steps[1, R - count : R] = step

    @torch.no_grad()
    def start_reserve(self, step: int) -> None:
        """Record `step` as the start of reserve components that have none yet."""
        started = self.steps[0, : self.num_trained]
        started.copy_(torch.where(started < 0, step, started))

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.rank.is_meta:
            self.growth.ranks[self.info.key] = int(self.rank)
            self.growth.refresh()


# Distance of the rows of many matrices from orthonormality, with gradients


@torch.no_grad()
def gram_distances(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the Frobenius norm `||M M^T - 1||` of each M [R, I], and its gradient.

    Matrices of one shape are computed together. Autograd records nothing, and autocast does not
    lower the precision.

    Returns:
        The norms, 0-d each; and the gradients, [R, I] each, 0 where the norm is 0.
    """
    groups: dict[tuple, list[int]] = {}
    for i, M in enumerate(matrices):
        groups.setdefault((M.shape, M.dtype, M.device), []).append(i)
    norms, slopes = list(matrices), list(matrices)
    for members in groups.values():
        M = torch.stack([matrices[i] for i in members])
        # in half precision M M^T - 1 would cancel
        with torch.autocast(M.device.type, enabled=False):
            gap = M @ M.mT
            gap.diagonal(dim1=1, dim2=2).sub_(1)
            norm = torch.linalg.vector_norm(gap, dim=(1, 2))
            # d||G||/dM = 2 G M / ||G|| with G = M M^T - 1, symmetric; clamped: 0 where G is 0
            factor = 2 / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            slope = (gap @ M).mul_(factor[:, None, None])
        for i, n, s in zip(members, norm.unbind(), slope.unbind(), strict=True):
            norms[i], slopes[i] = n, s
    return norms, slopes
