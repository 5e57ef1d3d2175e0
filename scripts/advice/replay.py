"""Advice tried again on the table of the grid: how good it is, and how sure it was.

Nothing is trained: the procedure of `petl advise` asks for trials, and gets lines of the table. On
each task it is tried with several constraints, and with each of the three seeds in turn as the one
that is trained last. Its numbers are assumptions, not fitted to any task, so none is left out.

- regret: the mean test score of the best setting of the grid, chosen by its mean validation score,
  less that of what is advised; among the settings that the constraint allows.
- coverage: how often the 80 % interval holds the test score of the run that is trained last (of one
  more, where all trials have the full length), with an interval over tasks.
- width: of the intervals, in widths of those that three seeds of a setting give for one more.

Accuracies are in points and losses in nats; other scores are as they are. None are mixed.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from typing import NamedTuple

import pandas as pd
from scipy.special import stdtrit

from advice.grid import METHOD_RANKS, SEEDS
from petl.data.tasks.scores import LOSSES, is_percentage
from petl.experiments.advice.candidates import (
    SIMPLEST,
    Constraint,
    Shortlist,
    at,
    needs,
    shortlist,
)
from petl.experiments.advice.evidence import LEVEL, Evidence, RowErrors, Setting, Trial, row_error
from petl.experiments.advice.rounds import (
    LAST_SEED,
    PlannedRounds,
    PlannedRun,
    make_rounds,
    planned,
    setting_of,
)
from petl.experiments.advice.schedule import Budget, Seconds, first_steps
from petl.experiments.reports.formatting import Table

ENDS = "all at full length"  # the choice among trials of full length, two seeds of each
COSTS = {"--cost 2": 2.0, "--cost 3": 3.0}
BEGIN, RUN = 0.05, 0.025  # of the seconds of a job's steps, its process and each run; assumption
CONSTRAINTS = ("none", "--bytes of LoRA r 4", "--bytes below LoRA r 2", "--need merge")
RULES = {
    "LoRA r 16 at 1e-3": Setting("lora", 16, 1e-3),
    "LoRA r 8, petl's default": at("lora", 8),
    # ten times 5e-5, the default of Trainer for all weights; of the grid, the nearest rate
    "LoRA r 16 at 10 x full": at("lora", 16, -1),
}


class Line(NamedTuple):
    """A run of the table; of its scores, higher is better.

    Attributes:
        loss: of validation rows, negated.
        test: NaN of a short one.
        rows: errors for the choice of rows.
        bytes: of its file.
    """

    validation: float
    loss: float
    test: float
    rows: RowErrors
    bytes: int


@dataclass(frozen=True)
class Known:
    """The runs of a task.

    Attributes:
        lines: by setting, steps and seed, those that did not diverge.
    """

    task: str
    metric: str
    lines: Mapping[tuple[Setting, int, int], Line]

    @property
    def unit(self) -> str:
        """Of scores and regrets."""
        if is_percentage(self.metric):
            return "points"
        return "nats" if self.metric == "loss" else self.metric

    @cached_property
    def lengths(self) -> list[int]:
        """The steps of runs, the longest first."""
        return sorted({steps for _, steps, _ in self.lines}, reverse=True)

    @property
    def full(self) -> int:
        """The steps of a run of full length."""
        return self.lengths[0]

    @cached_property
    def tests(self) -> dict[Setting, list[float]]:
        """The test scores of each setting of which all seeds finished."""
        return self._of_all_seeds("test")

    @cached_property
    def validations(self) -> dict[Setting, list[float]]:
        """Their validation scores."""
        return self._of_all_seeds("validation")

    def _of_all_seeds(self, name: str) -> dict[Setting, list[float]]:
        found: dict[Setting, list[float]] = defaultdict(list)
        for (setting, steps, _), line in sorted(self.lines.items()):
            if steps == self.full:
                found[setting].append(getattr(line, name))
        return {setting: each for setting, each in found.items() if len(each) == len(SEEDS)}

    def best(self, why: Sequence[Constraint] = (), alike: tuple[str, int] | None = None) -> Setting:
        """Return the best setting by mean validation score; of a method and rank, or of all."""
        found = {
            setting: statistics.fmean(scores)
            for setting, scores in self.validations.items()
            if alike in (None, setting[:2])
            and not any(each.why(setting.method, setting.rank) for each in why)
        }
        return max(found, key=lambda setting: found[setting])

    def has(self, method: str, rank: int) -> bool:
        """Return True if a method of this rank has runs, which the task's model may refuse."""
        return any(setting[:2] == (method, rank) for setting in self.validations)

    def test(self, setting: Setting) -> float:
        """Return the mean test score of a setting; -inf if a seed diverged."""
        return statistics.fmean(self.tests[setting]) if setting in self.tests else -math.inf

    @cached_property
    def bytes(self) -> dict[tuple[str, int], int]:
        """The sizes of files, by method and rank."""
        return {
            (setting.method, setting.rank): line.bytes
            for (setting, _, _), line in self.lines.items()
        }

    def constraints(self, name: str) -> list[Constraint]:
        """Return what a name of `CONSTRAINTS` asks for."""
        if name == "none":
            return []
        if name == "--need merge":
            return [Constraint(name, refused_to_merge)]
        rank, below = (4, 0) if name == "--bytes of LoRA r 4" else (2, 1)
        limit = self.bytes[SIMPLEST, rank] - below
        sizes = defaultdict(lambda: limit + 1, self.bytes)  # the task's model refuses others
        return [Constraint(name, lambda *pair: "it is larger" if sizes[pair] > limit else "")]


@cache
def refused_to_merge(method: str, rank: int) -> str:
    """Return why a method does not merge, which is so for tasks of all types, or ""."""
    (constraint,) = needs(["merge"], None)
    return constraint.why(method, rank)


def read(table: pd.DataFrame) -> tuple[list[Known], list[str]]:
    """Return the tasks whose runs are all in the table, and the names of others that it has."""
    complete, others = [], []
    for name, rows in table.groupby("task", sort=False):
        (complete if set(rows["method"]) == set(METHOD_RANKS) else others).append(str(name))
    return [known(name, table[table["task"] == name]) for name in complete], others


def known(task: str, rows: pd.DataFrame) -> Known:
    """Return the runs of a task."""
    finished = rows.dropna(subset=["validation"])
    metric = str(finished["metric"].iloc[0])
    sign = -1 if metric in LOSSES else 1
    tests = finished.dropna(subset=["test"]).iloc[0]
    counts = {"validation": int(tests["validation_rows"]), "test": int(tests["test_rows"])}
    found = {}
    for row in finished.to_dict("records"):
        scores = {metric: row["validation"]}
        errors = (row_error(metric, scores, count) for count in counts.values())
        line = Line(
            sign * row["validation"],
            -row["validation_loss"],
            sign * row["test"],
            RowErrors(*errors, counts["validation"]),
            int(row["bytes"]),
        )
        setting = Setting(row["method"], int(row["rank"]), float(row["rate"]))
        found[setting, int(row["steps"]), int(row["seed"])] = line
    return Known(task, metric, found)


# One advice


@dataclass
class Replay:
    """Trials out of the table.

    Attributes:
        seeds: of the table, by the seed that the procedure asks for.
        made: so far.
    """

    known: Known
    settings: Shortlist
    seeds: Sequence[int]
    made: dict[tuple[Setting, int, int], Line] = field(default_factory=dict)

    def __post_init__(self) -> None:
        full = self.known.full
        self.seconds = Seconds(BEGIN * full, RUN * full, 1.0)
        self.paid = self.seconds.begin + self.seconds.of(1, first_steps(full))  # the first trial

    def spent(self) -> float:
        """Return the seconds so far, as assumed: the unit is that of a step."""
        return self.paid

    def note(self) -> None:
        """Keep nothing."""

    def make(self, runs: Sequence[PlannedRun], number: int | None) -> None:
        """Look runs up: those of the table that are not longer, of each the longest.

        One that diverged is left out, and so is a setting that the table does not have. Seeds
        change places at full length alone: of short runs, the table has those that advice makes.
        """
        self.paid += self.seconds.of(len(runs), runs[0]["steps"])
        if number == 0:
            self.paid -= self.seconds.of(len(runs), runs[0]["steps"]) / len(runs)
        for run in runs:
            setting = setting_of(run)
            for steps in self.known.lengths:
                is_full = steps == self.known.full
                seed = self.seeds[run["seed"]] if is_full else run["seed"]
                line = self.known.lines.get((setting, steps, seed))
                if steps <= run["steps"] and line is not None:
                    self.made[setting, steps, run["seed"]] = line
                    break

    @property
    def evidence(self) -> Evidence:
        """What they say."""
        trials = [
            Trial(setting, seed, steps, line.validation, line.loss)
            for (setting, steps, seed), line in self.made.items()
        ]
        excluded = {setting for found in self.settings.excluded.values() for setting in found}
        rows = [*self.made.values()][-1].rows
        return Evidence(trials, rows, self.known.full, excluded=excluded)


class Case(NamedTuple):
    """An advice, and how good it was.

    Attributes:
        turn: which seed was the last.
        regret: of the advised setting, see the module.
        width: of the interval.
        usual: width of the interval that the setting's seeds give for one more run.
    """

    task: str
    unit: str
    procedure: str
    constraint: str
    turn: int
    advised: Setting
    regret: float
    holds: bool
    width: float
    usual: float


def advised(replay: Replay, procedure: str) -> Evidence:
    """Return the evidence on which the advice stands."""
    known, settings = replay.known, replay.settings
    first = planned(settings.allowed[0], 0, first_steps(known.full))
    if procedure == ENDS:
        replay.make([planned(s, k, known.full) for s in settings.allowed for k in (0, 1)], 1)
    else:
        unit = replay.seconds.begin + replay.seconds.of(1, known.full)
        budget = Budget(COSTS[procedure], unit, known.full)
        make_rounds(replay, PlannedRounds(rungs=[], last=None), first, settings, budget)
    return replay.evidence


def cases(known: Known) -> Iterator[Case]:
    """Yield the advice on a task, in all ways in which it is tried."""
    for name in CONSTRAINTS:
        constraints = known.constraints(name)
        settings, best = shortlist(constraints), known.best(constraints)
        for procedure, turn in product([ENDS, *COSTS], SEEDS):
            # the seeds change places, so that each is once that of the last run
            seeds = [*SEEDS[turn:], *SEEDS[:turn]]
            evidence = advised(Replay(known, settings, seeds), procedure)
            chosen, (prediction, _) = evidence.best, evidence.predicted()
            tests = known.tests.get(chosen)
            if tests is None:  # the last run, or another seed of it, diverged
                yield Case(
                    *(known.task, known.unit, procedure, name, turn, chosen),
                    *(math.inf, False, math.nan, math.nan),
                )
                continue
            reach = 2 * float(stdtrit(len(tests) - 1, (1 + LEVEL) / 2))
            yield Case(
                *(known.task, known.unit, procedure, name, turn, chosen),
                known.test(best) - known.test(chosen),
                prediction.low <= tests[seeds[LAST_SEED]] <= prediction.high,
                prediction.high - prediction.low,
                reach * statistics.stdev(tests),
            )


# What they say together


class Share(NamedTuple):
    """A share with its 95 % interval over tasks; of one task, without."""

    center: float
    low: float
    high: float


def coverage(found: Sequence[Case]) -> Share:
    """Return how often intervals hold, with an interval that is clustered by task."""
    by_task: dict[str, list[bool]] = defaultdict(list)
    for case in found:
        by_task[case.task].append(case.holds)
    shares = [statistics.fmean(each) for each in by_task.values()]
    center = statistics.fmean(shares)
    if len(shares) < 2:
        return Share(center, math.nan, math.nan)
    error = statistics.stdev(shares) / math.sqrt(len(shares))
    half = float(stdtrit(len(shares) - 1, 0.975)) * error
    return Share(center, max(0.0, center - half), min(1.0, center + half))


def mean_regrets(found: Sequence[Case]) -> dict[str, float]:
    """Return the mean regret by task."""
    values: dict[str, list[float]] = defaultdict(list)
    for case in found:
        values[case.task].append(case.regret)
    return {task: statistics.fmean(each) for task, each in values.items()}


def shown(unit: str, value: float) -> str:
    """Return a difference in a unit."""
    return f"{100 * value:.1f}" if unit == "points" else f"{value:.3f}"


def regrets(unit: str, by_task: Mapping[str, float]) -> list[str]:
    """Return median and worst as cells."""
    worst = max(by_task, key=lambda task: by_task[task])
    median = statistics.median(by_task.values())
    return [shown(unit, median), f"{shown(unit, by_task[worst])} ({worst})"]


def tables(tasks: Sequence[Known]) -> Iterator[tuple[str, Table]]:
    """Yield the results with their titles: regrets and widths by unit, then the coverage."""
    tried = [case for known in tasks for case in cases(known)]
    for unit in dict.fromkeys(known.unit for known in tasks):
        own = [known for known in tasks if known.unit == unit]
        rows = []
        for procedure, name in product([ENDS, *COSTS], CONSTRAINTS):
            found = [case for case in tried if case[1:4] == (unit, procedure, name)]
            finite = [case for case in found if math.isfinite(case.width)]
            usual = sum(case.usual for case in finite)
            wider = f"{sum(case.width for case in finite) / usual:.1f}" if usual else ""
            cells = regrets(unit, mean_regrets(found))
            rows.append([f"{procedure}, {name}", *cells, wider])
        for rule, setting in RULES.items():
            by_task = {known.task: known.test(known.best()) - known.test(setting) for known in own}
            rows.append([rule, *regrets(unit, by_task), ""])
        columns = ["advice", "median regret", "worst", "width / seeds' own"]
        yield f"regret in {unit}, {len(own)} tasks", Table(columns, rows)
    rows = []
    for procedure in (ENDS, *COSTS):
        share = coverage([case for case in tried if case.procedure == procedure])
        between = f"{share.low:.0%} to {share.high:.0%}" if share.low == share.low else ""
        rows.append([procedure, f"{share.center:.0%}", between])
    title = f"coverage of 80 % intervals, {len(tasks)} tasks"
    yield title, Table(["advice", "held", "95 %, over tasks"], rows)
