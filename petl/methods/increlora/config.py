"""The fields of IncreLoRA, and the plan that follows from them for a number of modules."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from petl.core.spec.config import MethodConfig, config_field, require
from petl.errors import InputError

PACE = 0.35  # of the training, after which growth ends: 0.21 to 0.42 in the paper's GLUE settings


@dataclass
class IncreloraConfig(MethodConfig):
    """See the package's docstring. Steps are optimizer steps."""

    init_r: int = config_field("rank of every module at the start", 1)
    target_r: int = config_field("average rank at the end", 2)
    target_total_rank: int | None = config_field(
        "sum of all ranks at the end; null: target_r each", None
    )
    parameter_budget: int | None = config_field(
        "most parameters of the active components; without target_total_rank ranks grow up to it",
        None,
    )
    rank_step: int | None = config_field(
        "components per grant; null: half of target_r, 1 at least", None
    )
    top_h: int = config_field("modules that grow in an event", 5)
    max_r: int | None = config_field("highest rank of a module; null: 8 target_r", None)
    tinit: int | None = config_field("steps of warm-up, without an event; null: as deltaT", 100)
    deltaT: int | None = config_field(
        "steps from event to event; null: such that growth ends after 0.35 of total_step", 100
    )
    beta1: float = config_field("how much of the importance is kept from step to step", 0.85)
    beta2: float = config_field("how much of its spread is kept", 0.85)
    lora_alpha: float = config_field("the update is scaled by lora_alpha / rank", 16)
    lora_dropout: float = config_field("dropout of the update's input, in [0, 1)", 0.0)
    orth_reg_weight: float = config_field(
        "weight of the orthogonality penalty; 0 switches it off", 0.1
    )
    advance_learn: bool = config_field("let the next components learn before they count", True)
    score_norm: str = config_field("sqrt of the entries (authors' code), or mean (paper)", "sqrt")
    score_window: int | None = config_field(
        "score only so many steps before each event, such as 48; null: every step", None
    )
    restart_warmup: bool = config_field(
        "a learning-rate curve of its own for each late component", True
    )
    warmup_steps: int = config_field("steps of warm-up of that curve", 0)
    total_step: int | None = config_field("length of the training; that curve ends there", None)
    init_weights: bool = config_field(
        "start at the base model; false: E random, for debugging", True
    )
    rank_pattern: dict[str, int] | None = config_field(
        "module path to rank; the tuner writes it", None
    )
    bias: str = config_field("PEFT's name; only 'none' is supported", "none")
    fan_in_fan_out: bool = config_field(
        "PEFT's name; Conv1D layers are recognised by themselves", False
    )

    def check(self) -> None:
        for name in ("init_r", "top_h"):
            self._require_count(name, 1)
        self._require_count("warmup_steps", 0)
        if self.tinit is not None:
            self._require_count("tinit", 0)
        for name in (
            *("target_total_rank", "parameter_budget", "rank_step", "max_r"),
            *("deltaT", "score_window", "total_step"),
        ):
            if getattr(self, name) is not None:
                self._require_count(name, 1)
        require(
            self.target_r >= self.init_r,
            f"target_r={self.target_r} is below init_r={self.init_r}, and ranks only grow",
        )
        require(self.cap >= self.init_r, f"max_r={self.max_r} is below init_r={self.init_r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name}={value} is not in (0, 1)")
        require(self.lora_alpha > 0, f"lora_alpha={self.lora_alpha} is not above 0")
        require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} is not in [0, 1)")
        weight = self.orth_reg_weight
        require(weight >= 0, f"orth_reg_weight={weight} is negative; 0 switches the penalty off")
        require(
            self.score_norm in ("sqrt", "mean"),
            f"score_norm={self.score_norm!r} is not sqrt or mean",
        )
        require(self.bias == "none", f"bias={self.bias!r} is not 'none', the only one supported")

    def sized(self, size: int) -> dict[str, Any]:
        """The average rank at the end."""
        return {"target_r": size, "target_total_rank": None}

    def bounded(self, budget: int) -> dict[str, Any]:
        """Large modules may grow more than others, so the average rank alone is no bound."""
        return {"parameter_budget": budget}

    def _require_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole and value >= least, f"{name}={value!r} is not a whole number from {least} on")

    @property
    def grant(self) -> int:
        """Components that a module receives at a time."""
        return self.rank_step or max(1, self.target_r // 2)

    @property
    def reserve(self) -> int:
        """Components that learn in advance."""
        return self.grant if self.advance_learn else 0

    @property
    def cap(self) -> int:
        """The highest rank of a module."""
        return self.max_r or max(self.init_r, 8 * self.target_r)

    def target(self, modules: int) -> int:
        """The sum of all ranks at the end."""
        return self.target_total_rank or self.target_r * modules

    def rounds(self, modules: int) -> int:
        """Events that it takes to get there, when no module is at its cap."""
        missing = self.target(modules) - self.init_r * modules
        return math.ceil(missing / (min(self.top_h, modules) * self.grant))

    def limit(self, modules: int) -> int:
        """The highest rank that a module can come to."""
        return min(self.init_r + self.rounds(modules) * self.grant, self.cap)

    def settle(self, costs: Iterable[int]) -> None:
        """Work out the fields that are null and depend on the model.

        Args:
            costs: parameters of a component of each module.

        Raises:
            InputError: the modules cannot have the target's ranks, or nothing says how long the
                training is.
        """
        costs = list(costs)
        if self.parameter_budget is not None and self.target_total_rank is None:
            left = self.parameter_budget - self.init_r * sum(costs)
            require(
                left >= 0,
                f"parameter_budget={self.parameter_budget} is below the {self.init_r * sum(costs)} "
                f"parameters of init_r={self.init_r}",
            )
            most = self.init_r * len(costs) + left // min(costs)
            self.target_total_rank = min(most, self.cap * len(costs))
        self._check_target(len(costs))
        if self.deltaT is None:
            if self.total_step is None:
                raise InputError(
                    "deltaT is null and total_step is not given; set one of them, total_step to "
                    "the optimizer steps of the training"
                )
            rounds, span = self.rounds(len(costs)), int(PACE * self.total_step)
            warmup, events = (0, rounds + 1) if self.tinit is None else (self.tinit, rounds)
            self.deltaT = max(1, (span - warmup) // max(1, events))
        if self.tinit is None:
            self.tinit = self.deltaT

    def is_full(self, ranks: Iterable[int], costs: Iterable[int]) -> bool:
        """Whether no module can grow from these ranks: target or budget are reached."""
        ranks, costs = list(ranks), list(costs)
        if sum(ranks) >= self.target(len(ranks)):
            return True
        if self.parameter_budget is None:
            return False
        pairs, limit = list(zip(ranks, costs, strict=True)), self.limit(len(ranks))
        left = self.parameter_budget - sum(rank * cost for rank, cost in pairs)
        return not any(rank < limit and cost <= left for rank, cost in pairs)

    def _check_target(self, modules: int) -> None:
        target = self.target(modules)
        require(
            target >= self.init_r * modules,
            f"target_total_rank={target} is below init_r={self.init_r} times {modules} modules",
        )
        require(
            self.cap * modules >= target,
            f"max_r ({self.cap}) times {modules} modules is below the target total rank {target}",
        )

    @property
    def pace(self) -> tuple[int, int]:
        """`tinit` and `deltaT`."""
        assert self.tinit is not None, "`settle` comes first"
        assert self.deltaT is not None, "`settle` comes first"
        return self.tinit, self.deltaT

    def is_event(self, step: int) -> bool:
        """Whether modules may grow after `step` steps."""
        warmup, interval = self.pace
        return step > warmup and step % interval == 0

    def next_event(self, step: int) -> int:
        """The first event at `step` or later."""
        warmup, interval = self.pace
        return math.ceil(max(step, warmup + 1) / interval) * interval

    def is_scored(self, step: int) -> bool:
        """Whether step `step` counts for the importance."""
        return self.score_window is None or self.next_event(step) - step < self.score_window

    def last_event(self, modules: int) -> int:
        """The event at which the target is reached, when no module is at its cap; 0 if at once."""
        rounds, (_, interval) = self.rounds(modules), self.pace
        return self.next_event(0) + (rounds - 1) * interval if rounds else 0
