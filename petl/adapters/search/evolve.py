"""A (1 + lambda) evolutionary search: one level for each unit, under one budget for all of them.

Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
ICML 2025, arXiv:2410.14649. A candidate differs from its parent by trades: one unit
goes down a level and another one up. Candidates are compared on few calibration tokens, the better
ones on more; the parent takes part in the last comparison, so that it is never replaced by a worse
state.

Where levels have costs, a trade of one level down for one up changes the cost: a cheap level would
pay for an expensive one, or the budget would be left unused. The authors trade between units of
equal cost only. Here random units are lowered until the candidate is within the budget, then raised
while one more level of some unit fits.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from petl.errors import InputError, shown
from petl.system.collectives import shared_out
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.system.values import integer

State = tuple[int, ...]  # the level of each unit, from 0
Costs = Sequence[Sequence[float]]
Fitness = Callable[[State, int], float]
STAGES = ((8, 512), (2, 4096), (1, 16384))
TRADES, DRAWS = 3, 100  # trades of a candidate at most, draws for each place of a generation


@dataclass(frozen=True)
class Generation:
    """One generation of a search.

    Attributes:
        generation: its number, from 1.
        state: the best state so far.
        fitness: of that state, on the tokens of the last stage.
        evaluations: calls of the fitness function.
        seconds: that it took.
    """

    generation: int
    state: State
    fitness: float
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Evolution:
    """A search and what it found.

    Attributes:
        levels: number of levels of each unit.
        budget: the highest allowed cost.
        seed: of the mutations.
        start: the state at the start of the whole search.
        state: the best state.
        history: of all generations, also of those before the search was resumed.
    """

    levels: tuple[int, ...]
    budget: float
    seed: int
    start: State
    state: State
    history: tuple[Generation, ...] = field(default=())

    @property
    def fitness(self) -> float:
        """The fitness of the best state, on the tokens of the last stage."""
        return self.history[-1].fitness

    def save(self, file: str | Path) -> None:
        """Write the search as JSON."""
        write_atomic(Path(file), as_json(asdict(self), in_order=True))

    @classmethod
    def load(cls, file: str | Path) -> "Evolution":
        """Read a file of `save`.

        Raises:
            InputError: the file cannot be read, or is damaged.
        """
        return evolution_of(read_json(Path(file), Evolution), str(file))


def evolution_of(raw: Mapping[str, Any], where: str) -> Evolution:
    """Return the search in a file.

    Args:
        raw: the fields of an `Evolution`, of the right types, with lists for tuples.
        where: the name of the file, for the message.

    Raises:
        InputError: its values contradict each other.
    """
    levels = tuple(raw["levels"])
    entries = (dict(entry) for entry in raw.get("history", ()))
    history = tuple(Generation(state=tuple(entry.pop("state")), **entry) for entry in entries)
    start, state = tuple(raw["start"]), tuple(raw["state"])
    found = Evolution(levels, raw["budget"], raw["seed"], start, state, history)
    for state in (found.start, found.state, *(each.state for each in history)):
        check_state(state, levels, where)
    if [each.generation for each in history] != list(range(1, len(history) + 1)):
        raise InputError(f"{where} is damaged: its generations are not numbered from 1")
    if history and history[-1].state != found.state:
        raise InputError(f"{where} is damaged: its last generation has another state")
    return found


def evolve(  # noqa: PLR0913
    levels: Sequence[int],
    budget: float,
    fitness: Fitness,
    *,
    costs: Costs | None = None,
    offspring: int = 32,
    stages: Sequence[tuple[int, int]] = STAGES,
    generations: int = 50,
    seed: int = 0,
    max_deviation: int | None = None,
    state: "Evolution | Sequence[int] | None" = None,
) -> Evolution:
    """Search the state of lowest fitness whose cost is within a budget.

    With several processes each computes the fitness of some candidates, and all return the same.

    Args:
        levels: number of levels of each unit.
        budget: the highest cost of a state.
        fitness: of a state on the first N calibration tokens; lower is better.
        costs: of each unit, the cost of each level, not falling; None: a level costs its number,
            and the sum of the levels stays that of the start.
        offspring: candidates of a generation.
        stages: survivors and tokens of each comparison; survivors fall to 1, tokens rise.
        generations: to search.
        seed: of the mutations.
        max_deviation: the largest sum of level differences from the start of the search; None: no
            limit.
        state: where to start, or a search to resume; None: `even`.

    Raises:
        InputError: an argument is out of range, a state does not fit, the smallest state is over
            the budget, or the fitness of a parent is not a finite number.
    """
    space = Space(tuple(levels), budget, costs, max_deviation)
    stages = checked(stages, offspring, generations, seed)
    if isinstance(state, Evolution):
        _check_same(state, space, seed)
        parent, start, history = state.state, state.start, state.history
    else:
        parent = space.even() if state is None else tuple(state)
        start, history = parent, ()
    check_state(parent, space.levels, "state")
    if space.cost(parent) > budget:
        raise InputError(
            f"the state costs {space.cost(parent):,g}, more than the budget of {budget:,g}"
        )
    for number in range(len(history) + 1, len(history) + 1 + generations):
        began = time.perf_counter()
        # of the generation alone, so that a resumed search draws the same
        rng = Random(f"{seed}, {number}")
        candidates = space.offspring(parent, start, offspring, rng)
        parent, value, calls = select(parent, candidates, fitness, stages)
        seconds = time.perf_counter() - began
        history = (*history, Generation(number, parent, value, calls, seconds))
    return Evolution(space.levels, budget, seed, start, parent, history)


def even(levels: Sequence[int], budget: float, costs: Costs | None = None) -> State:
    """Return the state in which all units have the same level, or one more where that fits.

    Levels are raised one by one, unit after unit, round after round, while the budget allows.

    Raises:
        InputError: the smallest state is over the budget.
    """
    return Space(tuple(levels), budget, costs, None).even()


def checked(
    stages: Sequence[tuple[int, int]], offspring: int, generations: int, seed: int
) -> list[tuple[int, int]]:
    """Return the stages of a search, or raise InputError if a setting of it is out of range."""
    integer(1).check("offspring", offspring, int)
    integer(1).check("generations", generations, int)
    integer(0).check("seed", seed, int)
    found = [(int(survivors), int(tokens)) for survivors, tokens in stages]
    survivors, tokens = ([stage[i] for stage in found] for i in (0, 1))
    falling = survivors == sorted(survivors, reverse=True) and survivors[-1:] == [1]
    if not falling or tokens != sorted(tokens) or tokens[0] < 1:
        raise InputError(
            f"stages={stages!r}: give (survivors, tokens), with survivors falling to 1 and tokens "
            "rising"
        )
    return found


def check_state(state: Sequence[int], levels: Sequence[int], where: str) -> None:
    """Raise InputError unless a state has one level in range for each unit."""
    if len(state) != len(levels):
        raise InputError(f"{where}: {len(state)} levels do not fit {len(levels)} units")
    for unit, (level, count) in enumerate(zip(state, levels, strict=True)):
        if not 0 <= level < count:
            raise InputError(f"{where}: level {level} of unit {unit} is not in 0..{count - 1}")


def _check_same(before: Evolution, space: "Space", seed: int) -> None:
    """Raise InputError if a search that is resumed was for other levels, budget or seed."""
    for name, old, new in (
        ("levels", before.levels, space.levels),
        ("budget", before.budget, space.budget),
        ("seed", before.seed, seed),
    ):
        if old != new:
            raise InputError(
                f"{name}={shown(new)} differs from {shown(old)} of the search to resume; pass its "
                "state alone to start another search there"
            )


@dataclass(frozen=True)
class Space:
    """The states of a search.

    Attributes:
        levels: number of levels of each unit.
        budget: the highest cost of a state.
        costs: of each unit, the cost of each level; None: its number, and their sum is fixed.
        max_deviation: the largest distance from the start; None: no limit.
    """

    levels: tuple[int, ...]
    budget: float
    costs: Costs | None
    max_deviation: int | None

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError("levels=[]: there is no unit to search a level for")
        for unit, count in enumerate(self.levels):
            integer(1).check(f"levels[{unit}]", count, int)
        if self.costs is None:
            return
        if len(self.costs) != len(self.levels):
            raise InputError(f"{len(self.costs)} costs do not fit {len(self.levels)} units")
        for unit, (own, count) in enumerate(zip(self.costs, self.levels, strict=True)):
            if len(own) != count or list(own) != sorted(own):
                raise InputError(
                    f"costs[{unit}]={shown(own)} are not the costs of {count} levels, not falling"
                )

    def cost(self, state: Sequence[int]) -> float:
        """Return the cost of a state."""
        if self.costs is None:
            return sum(state)
        return sum(own[level] for own, level in zip(self.costs, state, strict=True))

    def step(self, unit: int, level: int) -> float:
        """Return what a unit costs at a level more than at the one below."""
        return 1 if self.costs is None else self.costs[unit][level] - self.costs[unit][level - 1]

    def even(self) -> State:
        """Return the state of `even`."""
        state = [0] * len(self.levels)
        if self.rest(state) < 0:
            raise InputError(
                f"the smallest state costs {self.cost(state):,g}, more than the budget of "
                f"{self.budget:,g}"
            )
        while self.affordable(state):
            for unit in range(len(state)):
                # again for each unit, since the one before has used some of the budget
                if unit in self.affordable(state):
                    state[unit] += 1
        return tuple(state)

    def offspring(self, parent: State, start: State, count: int, rng: Random) -> list[State]:
        """Draw `count` different candidates, or as many as are found in `DRAWS` draws for each."""
        found: list[State] = []
        for _ in range(count * DRAWS):
            if len(found) == count:
                break
            candidate = self.mutated(parent, rng)
            if candidate != parent and candidate not in found and self.allows(candidate, start):
                found.append(candidate)
        return found

    def allows(self, state: State, start: State) -> bool:
        """Return True if a state is within the budget and near enough to the start."""
        distance = sum(abs(a - b) for a, b in zip(state, start, strict=True))
        near = self.max_deviation is None or distance <= self.max_deviation
        return near and (self.costs is None or self.cost(state) <= self.budget)

    def mutated(self, parent: State, rng: Random) -> State:
        """Return a state that differs from its parent by a few trades."""
        state = list(parent)
        for _ in range(trades(rng)):
            self.trade(state, rng)
        if self.costs is not None:
            self.fit(state, rng)
        return tuple(state)

    def trade(self, state: list[int], rng: Random) -> None:
        """Lower a random unit by a level and raise a random one, which may be the same."""
        # enumerated: drawing until a unit suits would not end if none does
        down = [unit for unit, level in enumerate(state) if level > 0]
        up = [unit for unit, level in enumerate(state) if level + 1 < self.levels[unit]]
        if down and up:
            state[rng.choice(down)] -= 1
            state[rng.choice(up)] += 1

    def fit(self, state: list[int], rng: Random) -> None:
        """Lower random units until a state is within the budget, then raise some while they fit."""
        while self.rest(state) < 0:
            state[rng.choice([unit for unit, level in enumerate(state) if level > 0])] -= 1
        while up := self.affordable(state):
            state[rng.choice(up)] += 1

    def rest(self, state: Sequence[int]) -> float:
        """Return what a state leaves of the budget."""
        return self.budget - self.cost(state)

    def affordable(self, state: Sequence[int]) -> list[int]:
        """Return the units that can be raised by a level within the budget."""
        rest = self.rest(state)
        return [
            unit
            for unit, level in enumerate(state)
            if level + 1 < self.levels[unit] and self.step(unit, level + 1) <= rest
        ]


def trades(rng: Random) -> int:
    """Draw the number of trades: the smaller of two uniform numbers from 1 to `TRADES`."""
    return min(rng.randint(1, TRADES), rng.randint(1, TRADES))


def select(
    parent: State, candidates: list[State], fitness: Fitness, stages: Sequence[tuple[int, int]]
) -> tuple[State, float, int]:
    """Return the best of a parent and its offspring, its fitness, and the number of evaluations.

    Raises:
        InputError: the fitness of the parent is not a finite number.
    """
    calls = 0
    for survivors, tokens in stages[:-1]:
        values = measure(candidates, fitness, tokens)
        calls += len(candidates)
        # of equal fitness, the smaller state
        candidates = sorted(candidates, key=lambda state: (values[state], state))[:survivors]
    tokens = stages[-1][1]
    values = measure([parent, *candidates], fitness, tokens)
    if not math.isfinite(values[parent]):
        raise InputError(
            f"the fitness of the state {parent} on {tokens:,} tokens is not a finite number, so "
            "that no candidate can be compared with it"
        )
    best = min(values, key=lambda state: (values[state], state != parent, state))
    return best, values[best], calls + len(values)


def measure(states: Sequence[State], fitness: Fitness, tokens: int) -> dict[State, float]:
    """Return the fitness of states, each computed by one process; infinity for NaN."""
    values = shared_out([partial(fitness, state, tokens) for state in states])
    numbers = (math.inf if math.isnan(value) else float(value) for value in values)
    return dict(zip(states, numbers, strict=True))
