"""Which trials are made, round by round: rungs, and a last round of full length.

Where their scores come from is for others to know: from trainings (advisor.py), or from a table of
runs that are made already, in which advice is tried again.
"""

from collections.abc import Sequence
from typing import Protocol, TypedDict

from petl.experiments.advice.candidates import SIMPLEST, Shortlist, neighbor
from petl.experiments.advice.evidence import Evidence, Setting
from petl.experiments.advice.schedule import Budget, Rung, Seconds, last_round

LAST_SEED = 2  # of the runs of full length: not one of those that chose the setting


class PlannedRun(TypedDict):
    """A run in schedule.json."""

    setting: list[str | int | float]
    seed: int
    steps: int


class PlannedRounds(TypedDict):
    """What was planned.

    Attributes:
        rungs: the runs of each.
        last: those of full length; None: not yet.
    """

    rungs: list[list[PlannedRun]]
    last: list[PlannedRun] | None


class Trials(Protocol):
    """Makes trials, and has what those made so far say and cost."""

    @property
    def evidence(self) -> Evidence:
        """What the finished trials say."""
        ...

    @property
    def seconds(self) -> Seconds:
        """What runs cost, as far as it is known."""
        ...

    def spent(self) -> float:
        """Return the processor seconds so far."""
        ...

    def make(self, runs: Sequence[PlannedRun], number: int | None) -> None:
        """Make the runs of the rung of this number, or of the last round."""
        ...

    def note(self) -> None:
        """Keep what was planned, which has changed."""
        ...


def planned(setting: Setting, seed: int, steps: int) -> PlannedRun:
    """Return a run as schedule.json has it."""
    return PlannedRun(setting=[*setting], seed=seed, steps=steps)


def setting_of(run: PlannedRun) -> Setting:
    """Return the setting of a run."""
    method, rank, rate = run["setting"]
    return Setting(str(method), int(rank), float(rate))


def make_rounds(
    trials: Trials, rounds: PlannedRounds, first: PlannedRun, known: Shortlist, budget: Budget
) -> None:
    """Plan and make what the budget has room for.

    Args:
        rounds: what was planned before, which stays; the rest is added.
        first: the first trial, of the first of the settings; its seconds are known.
    """

    def plan(runs: list[PlannedRun]) -> None:
        rounds["rungs"].append(runs)
        trials.note()

    if not rounds["rungs"]:
        plan(first_rung(first, known, budget, trials))
    for number in range(budget.rungs):
        if number == len(rounds["rungs"]):
            runs = next_rung(rounds["rungs"], budget, trials)
            if not runs:
                break
            plan(runs)
        trials.make(rounds["rungs"][number], number)
    if rounds["last"] is None:
        rounds["last"] = last_runs(trials.evidence, budget)
        trials.note()
    if rounds["last"]:
        trials.make(rounds["last"], None)


def first_rung(
    first: PlannedRun, known: Shortlist, budget: Budget, trials: Trials
) -> list[PlannedRun]:
    """Return the runs of the first rung."""
    others = known.allowed[1:]
    excluded = [setting for found in known.excluded.values() for setting in found]
    # what a constraint costs is worth a trial after the first few
    settings = [*others[:3], *excluded, *others[3:]]
    room = budget.first(trials.spent(), trials.seconds, 1 + len(settings))
    return [first, *(planned(setting, 0, first["steps"]) for setting in settings[: room - 1])]


def next_rung(
    rungs: Sequence[Sequence[PlannedRun]], budget: Budget, trials: Trials
) -> list[PlannedRun]:
    """Return the runs of the next rung; none if the cost has no room for it."""
    evidence, steps = trials.evidence, rungs[-1][0]["steps"]
    contenders = len(evidence.ranked())
    rung = budget.following(len(rungs), trials.spent(), trials.seconds, contenders, steps)
    if rung is None:
        return []
    tried = {trial.setting for trial in evidence.trials}
    chosen = finalists(evidence, tried, rung, budget.full / steps)
    return [planned(setting, seed, rung.steps) for setting in chosen for seed in range(rung.seeds)]


def finalists(evidence: Evidence, tried: set[Setting], rung: Rung, longer: float) -> list[Setting]:
    """Return the settings of the next rung: the best of the simplest method, and of the others.

    The rate next to the best one of the simplest method takes the last place, if there is one more
    and what it would have is not as good as the best.

    Args:
        longer: the full length, in lengths of the last rung.
    """
    ranked = evidence.ranked()
    simple = [setting for setting in ranked if setting.method == SIMPLEST]
    others = [setting for setting in ranked if setting.method != SIMPLEST]
    first = [found[0] for found in (simple, others) if found]
    chosen = [*first, *(setting for setting in ranked if setting not in first)][: rung.settings]
    beside = neighbor(simple[0], tried, longer) if simple else None
    is_free = len(chosen) > len(first) and evidence.apart(ranked[0], chosen[-1])
    if beside is not None and beside not in chosen and is_free:
        chosen[-1] = beside
    return chosen


def last_runs(evidence: Evidence, budget: Budget) -> list[PlannedRun]:
    """Return the runs of full length: of the best setting, and of the next best."""
    rung = last_round(budget.cost)
    settings = [evidence.best, evidence.next_best][: rung.settings]
    return [
        planned(setting, LAST_SEED + seed, budget.full)
        for setting in settings
        if setting is not None
        for seed in range(rung.seeds)
    ]
