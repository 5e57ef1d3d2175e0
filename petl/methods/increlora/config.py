"""The fields of IncreLoRA, and the growth schedule that follows from them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from petl.core.spec.checks import check_rank
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.types import Fields
from petl.errors import InputError

# fraction of the training after which growth ends; 0.21 to 0.42 in the paper's GLUE settings
GROWTH_FRACTION = 0.35


@dataclass
class IncreloraConfig(MethodConfig):
    """Fields of IncreLoRA. All steps are optimizer steps."""

    init_r: int = config_field("initial rank of every module", 1, ge=1)
    target_r: int = config_field("average rank at the end, at least init_r", 2, ge=1)
    target_total_rank: int | None = config_field(
        "sum of all ranks at the end; null: target_r per module", None, ge=1
    )
    parameter_budget: int | None = config_field(
        "largest number of parameters of the active components; null: no bound. Without "
        "target_total_rank, ranks grow until it is reached",
        None,
        ge=1,
    )
    rank_step: int | None = config_field(
        "ranks that a module gains at a time; null: half of target_r, at least 1", None, ge=1
    )
    top_h: int = config_field("modules that grow at each growth step", 5, ge=1)
    max_r: int | None = config_field(
        "highest rank of a module, at least init_r; null: 8 target_r", None, ge=1
    )
    tinit: int | None = config_field(
        "warmup in optimizer steps, without growth; null: equal to deltaT", 100, ge=0
    )
    deltaT: int | None = config_field(
        "optimizer steps between growth steps; null: chosen so that growth ends after 35 % of "
        "total_step",
        100,
        ge=1,
    )
    beta1: float = config_field("smoothing factor of the importance, in (0, 1)", 0.85, gt=0, lt=1)
    beta2: float = config_field("smoothing factor of its uncertainty, in (0, 1)", 0.85, gt=0, lt=1)
    lora_alpha: float = config_field("the update is scaled by lora_alpha / rank", 16, gt=0)
    lora_dropout: float = config_field(
        "dropout probability at the update's input, in [0, 1)", 0.0, ge=0, lt=1
    )
    orth_reg_weight: float = config_field(
        "weight of the orthogonality penalty, at least 0; 0 disables it", 0.1, ge=0
    )
    advance_learn: bool = config_field(
        "train the next components of each module in advance, with a weight of 1e-5", True
    )
    score_norm: str = config_field(
        "divisor of the importance score: sqrt of the number of entries (authors' code), or mean "
        "(paper)",
        "sqrt",
        choices=("sqrt", "mean"),
    )
    score_window: int | None = config_field(
        "compute scores only in this many steps before each growth step, such as 48, which is "
        "faster; null: every step",
        None,
        ge=1,
    )
    restart_warmup: bool = config_field(
        "components added during training have their own learning-rate schedule", True
    )
    warmup_steps: int = config_field(
        "warmup of that schedule in optimizer steps; paper: as tinit",
        0,
        ge=0,
        acts=("restart_warmup=true", lambda config: config.restart_warmup),
    )
    total_step: int | None = config_field(
        "length of the training in optimizer steps, where that schedule ends; null: from the run",
        None,
        ge=1,
    )
    init_weights: bool = config_field(
        "start at the base model's outputs (E = 0); false: random E, for debugging", True
    )
    rank_pattern: dict[str, int] | None = config_field(
        "ranks by module path; written by the tuner", None
    )
    bias: str = config_field(
        "field of PEFT's LoRA; only 'none' is supported", "none", choices=("none",)
    )
    fan_in_fan_out: bool = config_field(
        "field of PEFT's LoRA, without effect: Conv1D layers are recognized", False
    )

    def check(self) -> None:
        require(
            self.target_r >= self.init_r,
            f"target_r={self.target_r} is below init_r={self.init_r}, but ranks only grow",
        )
        # null max_r is never below init_r
        require(self.max_rank >= self.init_r, f"max_r={self.max_r} is below init_r={self.init_r}")

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Check the average rank at the end."""
        check_rank(self, "target_r", shapes)

    def sized(self, size: int) -> Fields:
        """Fields for an average rank of `size` at the end."""
        return {"target_r": size, "target_total_rank": None}  # a total would override target_r

    def bounded(self, budget: int) -> Fields:
        """Large modules may grow more than others, so the average rank alone is no bound."""
        return {"parameter_budget": budget}

    @property
    def rank_increase(self) -> int:
        """Ranks that a module gains at a time."""
        return self.rank_step or max(1, self.target_r // 2)

    @property
    def reserve(self) -> int:
        """Components of a module that are trained in advance."""
        return self.rank_increase if self.advance_learn else 0

    @property
    def max_rank(self) -> int:
        """The highest rank that the config allows for a module."""
        return self.max_r or max(self.init_r, 8 * self.target_r)

    def target(self, modules: int) -> int:
        """The sum of all ranks at the end, for this number of modules."""
        return self.target_total_rank or self.target_r * modules  # target_r is an average

    def num_growth_steps(self, modules: int) -> int:
        """Growth steps until the target is reached, if no module reaches `max_rank`."""
        # assumes that every growth step grows top_h modules by rank_increase
        missing = self.target(modules) - self.init_r * modules
        return math.ceil(missing / (min(self.top_h, modules) * self.rank_increase))

    def limit(self, modules: int) -> int:
        """The highest rank that a module can reach: it may grow at every growth step."""
        return min(self.init_r + self.num_growth_steps(modules) * self.rank_increase, self.max_rank)

    def resolve(self, costs: Iterable[int]) -> None:
        """Replace null fields that depend on the model or on the length of the training.

        Args:
            costs: parameters per component of each module.

        Raises:
            InputError: the modules cannot have the target's ranks, or the length of the training
                is needed and unknown.
        """
        # costs differ by the shapes of the modules: I + O + 1 for each component
        costs = list(costs)
        if self.parameter_budget is not None and self.target_total_rank is None:
            left = self.parameter_budget - self.init_r * sum(costs)
            require(
                left >= 0,
                f"parameter_budget={self.parameter_budget} is below the {self.init_r * sum(costs)} "
                f"parameters of init_r={self.init_r}; raise it to at least that",
            )
            # an upper bound: the budget itself stops the growth
            reachable = self.init_r * len(costs) + left // min(costs)
            self.target_total_rank = min(reachable, self.max_rank * len(costs))
        self._check_target(len(costs))
        if self.deltaT is None:
            if self.total_step is None:
                raise InputError(
                    f"deltaT={self.deltaT} and total_step={self.total_step}: one of them is "
                    "needed; set deltaT, or total_step to the optimizer steps of the training"
                )
            steps, span = self.num_growth_steps(len(costs)), int(GROWTH_FRACTION * self.total_step)
            # without tinit, the warmup is one more interval
            warmup, intervals = (0, steps + 1) if self.tinit is None else (self.tinit, steps)
            self.deltaT = max(1, (span - warmup) // max(1, intervals))
        if self.tinit is None:  # the first growth step is then the second interval
            self.tinit = self.deltaT

    def is_full(self, ranks: Iterable[int], costs: Iterable[int]) -> bool:
        """True if no module can grow from these ranks: target or budget is reached."""
        ranks, costs = list(ranks), list(costs)
        # the target rank comes first: it holds without a budget
        if sum(ranks) >= self.target(len(ranks)):
            return True
        if self.parameter_budget is None:
            return False
        pairs, limit = list(zip(ranks, costs, strict=True)), self.limit(len(ranks))
        # the target is met or the budget too small for one more component of any module
        left = self.parameter_budget - sum(rank * cost for rank, cost in pairs)
        return not any(rank < limit and cost <= left for rank, cost in pairs)

    def _check_target(self, modules: int) -> None:
        target = self.target(modules)
        require(
            target >= self.init_r * modules,
            f"target_total_rank={target} is below init_r={self.init_r} times {modules} modules; "
            f"raise it to at least {self.init_r * modules}",
        )
        require(
            self.max_rank * modules >= target,
            f"max_r ({self.max_rank}) times {modules} modules is below the target total rank "
            f"{target}; raise max_r, or lower the target",
        )

    @property
    def schedule(self) -> tuple[int, int]:
        """`tinit` and `deltaT`, once `resolve` has replaced null."""
        assert self.tinit is not None, "call `resolve` first"
        assert self.deltaT is not None, "call `resolve` first"
        return self.tinit, self.deltaT

    def is_growth_step(self, step: int) -> bool:
        """True if modules may grow after `step` steps."""
        warmup, interval = self.schedule
        return step > warmup and step % interval == 0  # as in the authors' code

    def next_growth_step(self, step: int) -> int:
        """The first growth step at `step` or later."""
        warmup, interval = self.schedule
        return math.ceil(max(step, warmup + 1) / interval) * interval

    def is_scored(self, step: int) -> bool:
        """True if scores of step `step` enter the importance."""
        return self.score_window is None or self.next_growth_step(step) - step < self.score_window

    def last_growth_step(self, modules: int) -> int:
        """The step after which the target is reached, if no module reaches `max_rank`; else 0.

        It is 0 if the initial ranks meet the target.
        """
        count, (_, interval) = self.num_growth_steps(modules), self.schedule
        return self.next_growth_step(0) + (count - 1) * interval if count else 0
