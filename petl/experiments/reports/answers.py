"""Where the predictions of two runs differ on the same test examples."""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from numbers import Real
from pathlib import Path
from statistics import fmean

from petl.data.tasks.base import Prediction
from petl.errors import InputError
from petl.experiments.reports.formatting import Table, sign_test
from petl.experiments.reports.predictions_section import (
    NOT_INPUT,
    Line,
    badness_of,
    input_of,
    text_of,
)
from petl.system.files.read import iterate_json_lines
from petl.system.progress import ProgressItems
from petl.training.runs.records import EVALUATED, PREDICTIONS

FIRST, SECOND, BOTH, NEITHER = "first", "second", "both", "neither"
NDCG = "ndcg_at_10"  # of the ranking of a query
CLEAR = 0.05  # p-value below which a difference is called clear
Lines = tuple[Prediction, Prediction]  # of one example, from both runs


@dataclass
class Differences:
    """How the predictions of two runs compare, example by example.

    Attributes:
        names: of the runs.
        is_graded: True if answers are right or wrong, False if only a loss tells how good they are.
        outcomes: number of examples of which the first is right (has the lower loss), the second,
            both (equal losses), or neither.
        changed: number of examples with different predictions.
        missing: number of examples that only one of the runs has a prediction of.
        gained: of queries, nDCG@10 of the second less that of the first.
        examples: those that tell the runs apart most, by the run that they favor.
    """

    names: tuple[str, str]
    is_graded: bool = True
    outcomes: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    missing: int = 0
    gained: list[float] = field(default_factory=list)
    examples: dict[str, list[Lines]] = field(default_factory=dict)

    def table(self) -> Table:
        """The number of examples by outcome."""
        first, second = self.names
        # without grades there is no "neither": one loss is lower, or both are equal
        if self.is_graded:
            words = {
                BOTH: "both right",
                FIRST: f"only {first} right",
                SECOND: f"only {second} right",
                NEITHER: "both wrong",
            }
        else:
            words = {FIRST: f"{first} better", SECOND: f"{second} better", BOTH: "equal"}
        rows = [[text, f"{self.outcomes[outcome]:,}"] for outcome, text in words.items()]
        return Table(["test examples", "number"], rows)

    def sentences(self) -> list[str]:
        """What the numbers mean."""
        one, other = self.outcomes[FIRST], self.outcomes[SECOND]
        # examples on which both agree say nothing about which is better
        p = sign_test(one, other)
        verdict = "a clear difference" if p < CLEAR else "no clear difference"
        test = "McNemar's exact test" if self.is_graded else "sign test"
        found = [f"{one:,} against {other:,} examples: {verdict} ({test}, p = {p:.2g})."]
        found.append(f"Predictions that differ: {self.changed:,} of {self.outcomes.total():,}.")
        if len(self.gained) > 1:
            from petl.data.tasks.retrieval.scores import half_interval  # with torch

            mean, half = fmean(self.gained), half_interval(self.gained)
            found.append(
                f"nDCG@10 of {self.names[1]} less that of {self.names[0]}: {mean:+.4f}, 95 % "
                f"interval {mean - half:+.4f} to {mean + half:+.4f}, paired over "
                f"{len(self.gained):,} queries."
            )
        if self.missing:
            found.append(f"Examples with a prediction of one run only: {self.missing:,}.")
        return found

    def tables(self) -> dict[str, Table]:
        """Examples by title: input, right answer, and both predictions."""
        title = "Only {} is right" if self.is_graded else "{} is better"
        sides = zip((FIRST, SECOND), self.names, strict=True)
        return {
            title.format(name): self._table(self.examples[side])
            for side, name in sides
            # `get`: no examples were asked for
            if self.examples.get(side)
        }

    def _table(self, pairs: list[Lines]) -> Table:
        # without predictions, as of plain texts, the losses tell what differs
        key = "prediction" if "prediction" in pairs[0][0] else "loss"
        columns = ["row", "input", "right", *(f"{name}: {key}" for name in self.names)]
        rows = [
            [f"{one['row']:,}", input_of(one), *map(text_of, (one.get("label"), *values))]
            for one, other in pairs
            for values in [(one.get(key), other.get(key))]
        ]
        return Table(columns, rows)


def compare_answers(first: Path, second: Path, examples: int) -> Differences:
    """Compare the predictions of two runs on the same test examples.

    Args:
        first: folder of a run, as `second`.
        examples: how many to keep on each side, those that tell the runs apart most.

    Raises:
        InputError: a run has no predictions, a file of them is damaged, or the runs were tested on
            different examples.
    """
    found = Differences((str(first), str(second)))
    kept: dict[str, list[tuple[float, int, Lines]]] = {FIRST: [], SECOND: []}
    numbers = count()  # of equal gaps, the earlier example is kept
    pairs = pairs_of(first, second)
    for one, other in ProgressItems(pairs, "comparing answers", unit="examples", quiet=True):
        if one is None or other is None:
            found.missing += 1
            continue
        rights = is_right(one), is_right(other)
        found.is_graded &= None not in rights
        if NDCG in one and NDCG in other:
            found.gained.append(other[NDCG] - one[NDCG])
        # positive: the first run is better
        bad, good = badness_of(other) or 0.0, badness_of(one) or 0.0
        # both may be infinite, whose difference is NaN
        gap = 0.0 if bad == good else bad - good
        outcome = outcome_of(rights, gap)
        found.outcomes[outcome] += 1
        found.changed += one.get("prediction") != other.get("prediction")
        if outcome in kept:
            # the counter breaks ties: dicts cannot be compared
            entry = (abs(gap), -next(numbers), (one, other))
            # a heap of bounded size: its smallest gap is at the top
            push = heapq.heappush if len(kept[outcome]) < examples else heapq.heappushpop
            push(kept[outcome], entry)
    found.examples = {
        # a heap is only partly sorted
        side: [lines for *_, lines in sorted(entries, reverse=True)]
        for side, entries in kept.items()
    }
    return found


def outcome_of(rights: tuple[bool | None, bool | None], gap: float) -> str:
    """Which run an example favors, by its answers if they are right or wrong, else by the gap."""
    # one run without a grade is enough: then both are compared by the loss
    if None in rights:
        return BOTH if gap == 0 else (FIRST if gap > 0 else SECOND)
    return {(True, True): BOTH, (True, False): FIRST, (False, True): SECOND}.get(rights, NEITHER)


def is_right(line: Prediction) -> bool | None:
    """True if a prediction is right; None if it is neither right nor wrong, such as a number."""
    if "exact_match" in line:
        return line["exact_match"] == 1
    label, prediction = line.get("label"), line.get("prediction")
    if label is None or isinstance(label, Real):
        return None
    return label == prediction


def pairs_of(first: Path, second: Path) -> Iterator[tuple[Prediction | None, Prediction | None]]:
    """Yield the predictions of each test example; None in place of one that a run has not made.

    Raises:
        InputError: as `compare_answers`.
    """
    ones, others = lines_of(first), lines_of(second)
    one, other = next(ones, None), next(others, None)
    # merge of two ascending sequences: neither file is held in memory
    while one or other:
        if one and other and one["row"] == other["row"]:
            check_same(one, other, first, second)
            yield one, other
            one, other = next(ones, None), next(others, None)
        elif other is None or (one and one["row"] < other["row"]):
            yield one, None
            one = next(ones, None)
        else:
            yield None, other
            other = next(others, None)


def lines_of(run: Path) -> Iterator[Prediction]:
    """Yield the predictions of a run, whose rows ascend."""
    files = (run / PREDICTIONS, run / EVALUATED / PREDICTIONS)
    file, last = next((file for file in files if file.exists()), None), -1
    if file is None:
        raise InputError(
            f"{run} has no {PREDICTIONS}: `petl eval {run}` writes the predictions of a run with "
            "train.test=false"
        )
    for line in iterate_json_lines(file, Line):
        # the merge needs ascending rows
        if line["row"] <= last:
            raise InputError(f"{file} cannot be used: row {line['row']} is after row {last}")
        last = line["row"]
        yield line


def check_same(one: Prediction, other: Prediction, first: Path, second: Path) -> None:
    """Raise InputError unless two predictions are about the same example."""
    given, expected = asked(one), asked(other)
    for name in dict.fromkeys((*given, *expected)):
        if given.get(name) != expected.get(name):
            raise InputError(
                f"{first} and {second} were tested on different examples: {name} of row "
                f"{one['row']} is not the same"
            )


def asked(line: Prediction) -> Prediction:
    """The columns of a prediction that are given: the input and the label."""
    return {
        name: value
        for name, value in line.items()
        # a number of tokens, next to a loss, depends on the tokenizer; a list of them is the input
        if name == "label" or (name not in NOT_INPUT and not isinstance(value, int))
    }
