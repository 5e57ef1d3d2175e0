"""How a cost is spent: rungs of trials, each with a schedule of its own length, and a last round.

Costs are processor seconds of the whole process. What is measured are the seconds of the first
trial, a plain run that is short; what a step costs in a pass of several is measured by each rung.
"""

import math
from dataclasses import dataclass

FIRST_SHARE = 1 / 20  # of the full length, of the trials of the first rung; assumption
FEWEST_STEPS = 20  # of a trial, below which its score says little; assumption
LAST_SHARE = 0.5  # of the full length, of the longest trials; assumption
JOINT = 0.8  # of the seconds of a plain step, in a pass of several, until it is measured
LONGER = 1.5  # from one rung to the next, at least; assumption
KEPT = 0.92  # of the cost is planned for, the rest is for what is not measured; assumption
RUNGS_FROM = 3.0  # cost from which there are three rungs of trials in place of two
FIRST_PART = 0.4  # of the seconds for trials, if there are two rungs; assumption
MOST = 12  # trials of a rung; assumption
PROBE = 0.05  # largest share of a linear probe, of a plain run
PROBE_FROM = 3.0  # cost from which it is one of all that is spent
CONTENDERS = 3  # settings of the last rung of trials, each with two seeds


@dataclass(frozen=True)
class Seconds:
    """Processor seconds of runs.

    Attributes:
        begin: of the process before its first run.
        run: of a run besides its steps: model, rows, scores, files.
        step: of a step of the plain run alone.
        joint: share of `step` that a step takes in a pass of several.
    """

    begin: float
    run: float
    step: float
    joint: float = JOINT

    def of(self, runs: int, steps: int) -> float:
        """Return the seconds of runs of a length, in one pass if they are several."""
        return runs * (self.run + self.step * steps * (self.joint if runs > 1 else 1))

    def measured(self, runs: int, steps: int, seconds: float) -> "Seconds":
        """Return these with the share of runs in one pass that took so many seconds."""
        if runs < 2:
            return self
        joint = (seconds - runs * self.run) / (runs * steps * self.step)
        return Seconds(self.begin, self.run, self.step, min(1.5, max(0.3, joint)))


@dataclass(frozen=True)
class Rung:
    """Trials of one length.

    Attributes:
        settings: how many of them are tried.
        seeds: of each.
        steps: of each trial.
    """

    settings: int
    seeds: int
    steps: int

    @property
    def runs(self) -> int:
        """How many trials these are."""
        return self.settings * self.seeds


def last_round(cost: float) -> Rung:
    """Return the runs of full length (`steps` is not set): by what the cost leaves room for."""
    if cost < 2:
        return Rung(0, 0, 0)
    if cost < 3:
        return Rung(1, 1, 0)
    return Rung(2, 1 if cost < 4 else 2, 0)


def probe_fits(cost: float, needed: float) -> bool:
    """Return True if a cost has room for a linear probe that needs so much, both in plain runs."""
    return needed <= PROBE * (cost if cost >= PROBE_FROM else 1)


def first_steps(full: int) -> int:
    """Return the steps of the trials of the first rung."""
    return min(full, max(FEWEST_STEPS, round(full * FIRST_SHARE)))


@dataclass(frozen=True)
class Budget:
    """What a cost leaves for trials.

    Attributes:
        cost: plain runs.
        unit: processor seconds of the plain run.
        full: steps of a run of full length.
    """

    cost: float
    unit: float
    full: int

    @property
    def rungs(self) -> int:
        """How many rungs of trials there are."""
        return 2 if self.cost < RUNGS_FROM else 3

    @property
    def has_longer(self) -> bool:
        """True if trials of the first length can be followed by longer ones."""
        return round(LAST_SHARE * self.full) >= LONGER * first_steps(self.full)

    def left(self, spent: float, seconds: Seconds) -> float:
        """Return the seconds for trials, once the last round has its part."""
        last = last_round(self.cost)
        return KEPT * self.cost * self.unit - spent - seconds.of(last.runs, self.full)

    def first(self, spent: float, seconds: Seconds, candidates: int) -> int:
        """Return how many trials of the first length there is room for, the first one included."""
        each = seconds.of(2, first_steps(self.full)) / 2
        part = FIRST_PART * 2 / self.rungs if self.has_longer else 1.0
        room = math.floor(part * self.left(spent, seconds) / each)
        return 1 + max(0, min(room, candidates - 1, MOST - 1))

    def following(
        self, number: int, spent: float, seconds: Seconds, contenders: int, before: int
    ) -> Rung | None:
        """Return the rung of this number, from 1; None if the cost has no room for it.

        Args:
            contenders: settings that were tried.
            before: steps of the rung before it.
        """
        is_last = number == self.rungs - 1
        room = self.left(spent, seconds) / (self.rungs - number)
        settings = min(contenders, CONTENDERS if is_last else math.ceil(contenders / 2))
        # two seeds of fewer settings tell more than one seed of more
        choices = [(n, seeds) for seeds in (2, 1) for n in range(settings, 1, -1)]
        for count, seeds in choices if is_last else choices[settings - 1 :]:
            runs = count * seeds
            steps = math.floor((room / runs - seconds.run) / (seconds.step * seconds.joint))
            steps = min(steps, max(before, round(LAST_SHARE * self.full)))
            # a rung that is hardly longer than the one before it repeats it
            if steps >= LONGER * before:
                return Rung(count, seeds, steps)
        return None
