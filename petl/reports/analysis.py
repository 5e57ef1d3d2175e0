"""What predictions show: scores by class, confusion matrix, calibration, examples.

The file is read twice, line by line: its size does not matter. It may be a stranger's.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from petl.files.read import iterate_json_lines

BINS = 10  # of equal width, in which confidence is compared with accuracy (Guo et al. 2017)
WORST, TYPICAL = 20, 5  # examples that are kept
Words = list[str | None]


# only `row` is in every line: which others there are depends on the task
class Line(TypedDict):
    """A line of predictions.jsonl: columns of the input besides, and of some tasks only."""

    row: int
    label: NotRequired[str | Real | Words]
    prediction: NotRequired[str | Real | Words | None]
    probability: NotRequired[Real | list[Real | None] | None]
    probabilities: NotRequired[dict[str, Real]]
    start: NotRequired[int | None]
    loss: NotRequired[Real]
    exact_match: NotRequired[Real]
    f1: NotRequired[Real]
    rougeL: NotRequired[Real]


@dataclass(frozen=True)
class ClassScores:
    """How well one class is predicted."""

    name: str
    precision: float
    recall: float
    f1: float
    examples: int


@dataclass
class Bin:
    """Predictions of similar confidence.

    Attributes:
        count: number of predictions.
        confidence, correct: sums of their probabilities, and of right predictions.
    """

    count: int = 0
    confidence: float = 0.0
    correct: float = 0.0


@dataclass
class Analysis:
    """The result of `analyze`.

    Attributes:
        rows: number of lines.
        classes: names in the order of the task, if the lines tell it.
        confusion: number of each pair of label and prediction, of rows or words with classes.
        bins: by confidence; all are empty if predictions have no probability.
        worst: lines with the largest loss or the lowest score.
        typical: lines in the middle of that order.
    """

    rows: int = 0
    classes: list[str] = field(default_factory=list)
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)
    bins: list[Bin] = field(default_factory=lambda: [Bin() for _ in range(BINS)])
    worst: list[dict[str, Any]] = field(default_factory=list)
    typical: list[dict[str, Any]] = field(default_factory=list)

    def by_class(self) -> list[ClassScores]:
        """Precision, recall and F1 of each class; 0 where there is nothing to divide by."""
        labels, predictions, scores = Counter(), Counter(), []
        # row and column sums of the confusion matrix
        for (label, prediction), count in self.confusion.items():
            labels[label] += count
            predictions[prediction] += count
        for name in self.classes:
            hits = self.confusion[name, name]
            precision = hits / predictions[name] if predictions[name] else 0.0
            recall = hits / labels[name] if labels[name] else 0.0
            # F1 = 2 TP / (2 TP + FP + FN), and labels + predictions = 2 TP + FP + FN
            both = labels[name] + predictions[name]
            scores.append(
                ClassScores(name, precision, recall, 2 * hits / both if both else 0.0, labels[name])
            )
        return scores

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error: mean distance of confidence and accuracy over the bins.

        None if predictions have no probability.
        """
        total = sum(each.count for each in self.bins)
        if not total:
            return None
        # sums, not means: a bin's weight n / total cancels the n of its means
        return sum(abs(each.confidence - each.correct) for each in self.bins) / total


def analyze(file: Path) -> Analysis:
    """Return the analysis of predictions.jsonl.

    Raises:
        InputError: the file cannot be read, or a line has another form.
    """
    found, badness, names = Analysis(), [], {}
    for line in iterate_json_lines(file, Line):
        found.rows += 1
        badness.append(badness_of(line))
        # a dict as an ordered set: keys are in the order of the task's classes
        names |= dict.fromkeys(line.get("probabilities", {}))
        for label, prediction, sure in classified(line):
            found.confusion[label, prediction] += 1
            note(found.bins, sure, label == prediction)
        # a span has no class, but its confidence can be compared with exact match
        if is_span(line) and "exact_match" in line:
            note(found.bins, line["probability"], line["exact_match"] == 1)
    # classes without a column of probabilities, as of taggers: alphabetical
    seen = sorted({name for pair in found.confusion for name in pair} - names.keys())
    found.classes = [*names, *seen] if found.confusion else []
    # stable: of equally bad rows, the earlier one is shown
    order = sorted(
        (i for i in range(found.rows) if badness[i] is not None), key=lambda i: -badness[i]
    )
    # around the median
    middle = max(0, len(order) // 2 - TYPICAL // 2)
    chosen = order[:WORST], order[middle : middle + TYPICAL]
    wanted = {*chosen[0], *chosen[1]}
    # second pass: badness of all lines fits in memory, the lines may not
    kept = {i: line for i, line in enumerate(iterate_json_lines(file, Line)) if i in wanted}
    found.worst, found.typical = ([kept[i] for i in part] for part in chosen)
    return found


def classified(line: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield label, prediction and its probability of a row with a class, or of each word."""
    label, prediction, sure = (line.get(k) for k in ("label", "prediction", "probability"))
    if isinstance(label, str) and isinstance(prediction, str) and isinstance(sure, Real):
        yield label, prediction, float(sure)
    elif isinstance(label, list) and isinstance(prediction, list) and isinstance(sure, list):
        # a stranger's file may have lists of different lengths
        for one, other, value in zip(label, prediction, sure, strict=False):
            # None: a word beyond `max_length`, which the model has not read
            if one is not None and other is not None and value is not None:
                yield one, other, float(value)


def is_span(line: Mapping[str, Any]) -> bool:
    """True if the prediction is a span of a context."""
    return "start" in line and isinstance(line.get("probability"), Real)


def note(bins: list[Bin], sure: float, correct: bool) -> None:
    """Count a prediction in the bin of its probability."""
    if not 0 <= sure <= 1:  # a file of a stranger
        return
    # min: a confidence of exactly 1 belongs to the last bin
    own = bins[min(int(sure * len(bins)), len(bins) - 1)]
    own.count += 1
    own.confidence += sure
    own.correct += correct


def badness_of(line: Mapping[str, Any]) -> float | None:
    """How wrong a prediction is, by the score of its task; None if it has no label."""
    # scores of the whole answer say more than the loss, so they come first
    for score in ("rougeL", "f1"):
        if score in line:
            return finite(1 - float(line[score]))
    if "loss" in line:
        return finite(float(line["loss"]))
    # fraction of wrong words; of a single class 0 or 1
    words = [label != prediction for label, prediction, _ in classified(line)]
    if words:
        return sum(words) / len(words)
    label, prediction = line.get("label"), line.get("prediction")
    if isinstance(label, Real) and isinstance(prediction, Real):
        return finite(abs(float(label) - float(prediction)))
    return None


def finite(value: float) -> float:
    """The value; infinity if it is not finite, which is the worst."""
    return value if math.isfinite(value) else math.inf
