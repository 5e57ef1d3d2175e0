"""The components of IncreLoRA on one layer, and what the layers of an adapter share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.layers.layer import Adapter, Factors, LayerInfo, LayerShape
from petl.methods.increlora.config import IncreloraConfig
from petl.ops.components import Pull, first_components
from petl.ops.importance import watch
from petl.ops.low_rank import add_low_rank, linear_with_low_rank
from petl.ops.orthogonality import gram_distances

STD = 0.02  # of the random start of A and B
RESERVE = 1e-5  # weight of a component that is not active

Penalty = tuple[Tensor, Tensor, Tensor]


@dataclass
class Growth:
    """How far the layers of one adapter have grown; plain data that they share.

    Attributes:
        ranks: live rank by module path.
        costs: parameters of a component, by module path.
        config: what says when growth ends.
        grows: whether this adapter grows at all; one that is loaded for inference does not.
        scored: whether the coming backward pass counts for the importance.
        layers: the layers themselves, by module path.
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
        """Work out from the ranks whether growth goes on."""
        full = self.config.is_full(self.ranks.values(), self.costs.values())
        self.is_open = self.grows and not full

    @property
    def weight(self) -> float:
        """Weight in the loss of the two norms of each layer, whose mean is the penalty."""
        return self.config.orth_reg_weight / (2 * len(self.ranks))

    def penalties(self) -> dict[str, "Penalty"]:
        """By module path the share of each layer that trains; none if some are not whole here."""
        layers = [layer for layer in self.layers.values() if layer.lora_A.requires_grad]
        whole = all(type(layer.lora_A) is nn.Parameter for layer in layers)
        return self.penalties_of(layers) if whole else {}

    @torch.no_grad()
    def penalties_of(self, layers: Sequence["IncreloraAdapter"]) -> dict[str, "Penalty"]:
        """By module path `weight (||A A^T - 1|| + ||B^T B - 1||)` of the components that learn.

        Behind it the gradients of the two norms, by these rows of A and these columns of B.
        """
        A = [layer.lora_A[: layer.count] for layer in layers]
        B = [layer.lora_B[:, : layer.count].t() for layer in layers]
        norms, slopes = gram_distances([*A, *B])
        N = len(layers)
        values = torch._foreach_mul(torch._foreach_add(norms[:N], norms[N:]), self.weight)
        rows = zip(layers, values, slopes[:N], slopes[N:], strict=True)
        return {layer.info.key: (value, to_A, to_B.t()) for layer, value, to_A, to_B in rows}


class IncreloraAdapter(Adapter):
    """`lora_A` [C, I], `lora_B` [O, C] and weights `E` [C, 1] of a layer's components.

    The first `rank` components are active; while the model grows and trains, the next ones are the
    reserve. Further buffers: `ema` [2], the importance and its spread; `steps` [2, C], the step of
    birth and of activation of each component, -1 for not yet.
    """

    of_own_rows = ("ema",)  # means over processes of sums of absolute values, each of its rows

    rank: Tensor
    ema: Tensor
    steps: Tensor

    def __init__(self, shape: LayerShape, config: IncreloraConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        self.growth: Growth = info.settings["growth"]
        self.growth.layers[info.key] = self
        C, R, (I, O) = info.settings["capacity"], self.live, shape
        self.lora_A = nn.Parameter(torch.randn(C, I) * STD)
        self.lora_B = nn.Parameter(torch.randn(O, C) * STD)
        E = torch.zeros(C, 1)
        E[R:] = RESERVE if config.advance_learn else 0.0
        if not config.init_weights:
            E[:R].normal_()
        self.E = nn.Parameter(E)
        self.register_buffer("rank", torch.tensor(R))
        self.register_buffer("ema", torch.zeros(2))
        steps = torch.full((2, C), -1)
        steps[0, : R + self.reserve] = steps[1, :R] = 0
        self.register_buffer("steps", steps)
        self.probe = torch.zeros((), requires_grad=True)  # its gradient is the score

    @property
    def live(self) -> int:
        """The number of active components: `rank`, where no device has to be asked."""
        return self.growth.ranks[self.info.key]

    @property
    def reserve(self) -> int:
        """The number of components that learn in advance."""
        return self.config.reserve if self.growth.is_open else 0

    # The update

    def factors(self) -> Factors:
        return self.components(self.live)

    def components(self, count: int, pull: Pull | None = None) -> Factors:
        """The update of the first `count` components; A carries their weights."""
        scale = self.config.lora_alpha / (self.live + 1e-5)
        A, B = first_components(
            self.lora_A, self.lora_B, self.E, self.live, count, rest=RESERVE, pull=pull
        )
        return Factors(A, B, scale)

    def plain_factors(self) -> Factors | None:
        return None if self.training else self.factors()

    @property
    def drop_rate(self) -> float:
        return self.config.lora_dropout if self.training else 0.0

    @property
    def is_scored(self) -> bool:
        """Whether the coming backward pass counts for the importance of this layer."""
        trains = self.training and self.lora_A.requires_grad
        return trains and self.growth.is_open and self.growth.scored

    def active(self) -> Factors:
        """The update of the components that compute now: in training also the reserve.

        In training, the backward pass adds the gradient of the orthogonality penalty.
        """
        return self.components(self.count, self.penalised()) if self.training else self.factors()

    @property
    def count(self) -> int:
        """The number of components that learn: live ones and reserve."""
        return self.live + self.reserve

    def with_base(self, x: Tensor, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        score_is_of_rest = self.is_scored and self.drop_rate > 0  # of what dropout leaves
        if args or kwargs or score_is_of_rest:
            return self(x, base(x, *args, **kwargs))
        factors = self.active()
        y = linear_with_low_rank(x, base, *factors, self.drop_rate)
        if y is None:
            y, x = base(x), self.drop(x)
            y = add_low_rank(y, x, *factors)
        return self.watched(y, x, factors)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, factors = self.drop(x), self.active()
        return self.watched(add_low_rank(y, x, *factors), x, factors)

    def watched(self, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """`y`, with the score in its backward pass if it is due."""
        if not self.is_scored:
            return y
        A, B, scale = factors
        return watch(y, x, A, B, scale / self.entries(), self.probe_on(x.device))

    def penalised(self) -> Pull | None:
        """What the penalty adds to this layer's gradients; None if it plays no part.

        The first layer of a forward pass that asks works out the shares of all; where that cannot
        be, or a compiler looks on, each layer works out its own.
        """
        context, growth, key = self.info.context, self.growth, self.info.key
        if growth.weight == 0 or not self.lora_A.requires_grad:
            return None
        name, shares = self.info.adapter_name, {}
        if not torch.compiler.is_compiling():
            shares = context.once(("penalty", name), growth.penalties)
        value, to_A, to_B = shares.get(key) or growth.penalties_of([self])[key]
        context.record(f"{key}.{name}", value)
        return None if context.scale is None else (to_A, to_B, context.scale, growth.weight)

    def entries(self) -> float:
        """What the score is divided by: the number of entries of the update, or its root."""
        I, O = self.shape
        return float(I * O) if self.config.score_norm == "mean" else (I * O) ** 0.5

    # The score

    def probe_on(self, device: torch.device) -> Tensor:
        if self.probe.device != device:
            self.probe = torch.zeros((), device=device, requires_grad=True)
        return self.probe

    def take_score(self) -> Tensor | None:
        """The score of the last backward passes, 0-d; None if there was none."""
        score, self.probe.grad = self.probe.grad, None
        return score

    # Growth

    @torch.no_grad()
    def grow(self, count: int, step: int) -> None:
        """Make the next `count` components active."""
        R = self.growth.ranks[self.info.key] = self.live + count
        self.rank.fill_(R)
        self.steps[1, R - count : R] = step

    @torch.no_grad()
    def give_birth(self, step: int) -> None:
        """Let all components down to the reserve be born that are not yet."""
        born = self.steps[0, : self.live + self.reserve]
        born.copy_(torch.where(born < 0, step, born))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.rank.is_meta:
            self.growth.ranks[self.info.key] = int(self.rank)
            self.growth.refresh()
