"""What predictions show, and the part of a page that shows it.

Scores by class, confusion matrix, calibration, examples, answers. The file of predictions is read
twice, line by line: its size does not matter. It may be a stranger's.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import NotRequired, TypedDict

from petl.data.tasks.base import Prediction
from petl.experiments.reports.formatting import number
from petl.experiments.reports.page import Curve, line_chart
from petl.system.files.read import iterate_json_lines
from petl.system.progress import ProgressItems
from petl.training.runs.predicted_classes import has_several
from petl.training.runs.records import BEFORE, PREDICTIONS, of_task

ABSENT = ""  # in place of a class that a row does not have
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
    ndcg_at_10: NotRequired[Real]
    rank: NotRequired[Real | None]
    similarity: NotRequired[Real]
    nearest_relevant: NotRequired[Real]
    nearest_other: NotRequired[Real | None]


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
        several: True if a row has any number of classes; the confusion of a class is then that with
            its absence, `ABSENT`.
    """

    rows: int = 0
    classes: list[str] = field(default_factory=list)
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)
    bins: list[Bin] = field(default_factory=lambda: [Bin() for _ in range(BINS)])
    worst: list[Prediction] = field(default_factory=list)
    typical: list[Prediction] = field(default_factory=list)
    several: bool = False

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
    lines = iterate_json_lines(file, Line)
    for line in ProgressItems(lines, "analyzing predictions", unit="examples", quiet=True):
        found.rows += 1
        badness.append(badness_of(line))
        # a dict as an ordered set: keys are in the order of the task's classes
        names |= dict.fromkeys(of_task(line, name) for name in line.get("probabilities", {}))
        if has_several(line):
            found.several = True
            count_several(found, line)
            continue
        for label, prediction, sure in classified(line):
            found.confusion[label, prediction] += 1
            note(found.bins, sure, label == prediction)
        # a span has no class, but its confidence can be compared with exact match
        if is_span(line) and "exact_match" in line:
            note(found.bins, line["probability"], line["exact_match"] == 1)
    # classes without a column of probabilities, as of taggers: alphabetical
    seen = sorted({name for pair in found.confusion for name in pair} - {*names, ABSENT})
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


def classified(line: Prediction) -> Iterator[tuple[str, str, float]]:
    """Yield label, prediction and its probability of a row with a class, or of each word."""
    label, prediction, sure = (line.get(k) for k in ("label", "prediction", "probability"))
    if isinstance(label, str) and isinstance(prediction, str) and isinstance(sure, Real):
        yield of_task(line, label), of_task(line, prediction), float(sure)
    elif isinstance(label, list) and isinstance(prediction, list) and isinstance(sure, list):
        # a stranger's file may have lists of different lengths
        for one, other, value in zip(label, prediction, sure, strict=False):
            # None: a word beyond `max_length`, which the model has not read
            if one is not None and other is not None and value is not None:
                yield one, other, float(value)


def count_several(found: Analysis, line: Prediction) -> None:
    """Count the classes of a row that may have any number of them."""
    label, prediction = {*line["label"]}, {*line["prediction"]}
    for name in label | prediction:
        pair = name if name in label else ABSENT, name if name in prediction else ABSENT
        found.confusion[pair] += 1
    for name, probability in line["probabilities"].items():
        note(found.bins, float(probability), name in label)


def is_span(line: Prediction) -> bool:
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


def badness_of(line: Prediction) -> float | None:
    """How wrong a prediction is, by the score of its task; None if it has no label."""
    # scores of the whole answer say more than the loss, so they come first
    for score in ("rougeL", "f1", "ndcg_at_10"):
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


# The section of a page

MAX_CLASSES = 20  # of a confusion matrix that a page shows whole
MAX_CONFUSED = 15  # most frequent confusions that it shows otherwise
LONGEST = 600  # characters of a text in an example; predictions.jsonl has all of it
NOT_INPUT = {*Line.__annotations__, "tokens_read", "rouge1", "rouge2"}


@dataclass(frozen=True)
class PredictionsSection:
    """What predictions.html shows.

    Attributes:
        classes: rows of the table of scores by class; empty without classes.
        matrix: header and rows of cells (text, share of the row), of few classes.
        confused: most frequent confusions, of many classes.
        calibration: what the chart of reliability shows, in a sentence.
        examples: title, header and rows of each table of examples.
    """

    classes: list[list[str]]
    matrix: tuple[list[str], list[tuple[str, list[tuple[str, float]]]]] | None
    confused: list[list[str]]
    calibration: str
    reliability: str
    examples: list[tuple[str, list[str], list[list[str]]]]


def section_of(folder: Path) -> PredictionsSection | None:
    """The section about the predictions in a folder; None if it has none.

    Raises:
        InputError: a file of predictions is damaged.
    """
    file = folder / PREDICTIONS
    if not file.exists():
        return None
    found = analyze(file)
    wanted = {line["row"] for line in (*found.worst, *found.typical)}
    # some tasks keep the predictions before training
    before = {}
    if (folder / BEFORE).exists():
        lines = iterate_json_lines(folder / BEFORE, Line)
        # only the shown rows are kept in memory
        before = {line["row"]: line for line in lines if line["row"] in wanted}
    few = len(found.classes) <= MAX_CLASSES and not found.several
    return PredictionsSection(
        classes=[
            [c.name, percent(c.precision), percent(c.recall), percent(c.f1), f"{c.examples:,}"]
            for c in found.by_class()
        ],
        matrix=matrix_of(found) if found.classes and few else None,
        confused=[] if few or found.several else confused_of(found),
        calibration=calibration_text(found),
        reliability=reliability_chart(found.bins) if found.calibration_error is not None else "",
        examples=examples_of(found, before),
    )


def percent(value: float) -> str:
    """Format a proportion."""
    return f"{100 * value:.1f} %"


def matrix_of(found: Analysis) -> tuple[list[str], list[tuple[str, list[tuple[str, float]]]]]:
    """Names of the classes, and the cells of each label: count, and share of the label's row."""
    rows = []
    for label in found.classes:
        counts = [found.confusion[label, prediction] for prediction in found.classes]
        # a class that occurs only as a prediction has an empty row
        total = max(1, sum(counts))
        rows.append((label, [(f"{count:,}" if count else "", count / total) for count in counts]))
    return found.classes, rows


def confused_of(found: Analysis) -> list[list[str]]:
    """The most frequent pairs of a label and another prediction."""
    # the diagonal holds the right predictions
    wrong = [(pair, n) for pair, n in found.confusion.most_common() if pair[0] != pair[1]]
    return [[label, other, f"{count:,}"] for (label, other), count in wrong[:MAX_CONFUSED]]


def calibration_text(found: Analysis) -> str:
    """What the calibration error is; "" without probabilities."""
    error = found.calibration_error
    if error is None:
        return ""
    total = sum(each.count for each in found.bins)
    # means over predictions, not over bins
    sure, right = (
        sum(getattr(each, name) for each in found.bins) / total
        for name in ("confidence", "correct")
    )
    # of several classes a row, the probabilities are those of each class
    hits = "of the classes apply" if found.several else "right"
    return (
        f"Expected calibration error {percent(error)}: mean confidence {percent(sure)}, "
        f"{percent(right)} {hits} (n = {total:,}; bins of equal width)."
    )


def reliability_chart(bins: list[Bin]) -> str:
    """The accuracy of predictions against their confidence, as SVG."""
    points = [
        (100 * each.confidence / each.count, 100 * each.correct / each.count)
        for each in bins
        # a bin without predictions has no point
        if each.count
    ]
    curves = [Curve("predictions", points), Curve("calibrated", [(0, 0), (100, 100)])]
    return line_chart(curves, "Reliability", x="confidence (%)", y="right (%)", maximum=100.0)


# Examples


def examples_of(
    found: Analysis, before: Mapping[int, Prediction]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of the tables of examples, without tables that have none."""
    tables = []
    for title, lines in (("Worst examples", found.worst), ("Typical examples", found.typical)):
        if not lines:
            continue
        # a column that no example has is left out
        names = [name for name in COLUMNS if any(name in line for line in lines)]
        header = ["row", "input", *(HEADERS.get(name, name) for name in names)]
        # words of a text, or classes whose names may have spaces
        between = ", " if found.several else " "
        rows = [
            [
                f"{line['row']:,}",
                input_of(line),
                *(text_of(line.get(name), between) for name in names),
            ]
            for line in lines
        ]
        if before and "prediction" in names:
            place = header.index(HEADERS["prediction"])
            header.insert(place, "before training")
            for line, row in zip(lines, rows, strict=True):
                earlier = before.get(line["row"], {})
                row.insert(place, text_of(earlier.get("prediction")))
        tables.append((title, header, rows))
    return tables


REWARDS = ("reward", "chosen_reward", "rejected_reward", "margin")  # of preferences
COLUMNS = ("label", "prediction", "probability", "loss", "exact_match", "f1", "rougeL", *REWARDS)
HEADERS = {
    "label": "expected",
    "prediction": "predicted",
    "exact_match": "exact match",
    "chosen_reward": "reward of chosen",
    "rejected_reward": "of rejected",
}


def input_of(line: Prediction) -> str:
    """The columns of an example that the model has read, as one text."""
    given = {name: value for name, value in line.items() if name not in NOT_INPUT}
    # a stranger's column of this name may hold something else
    if isinstance(given.get("messages"), list):
        return cut(conversation_text(given["messages"]))
    if isinstance(given.get("tokens"), list):
        return cut(" ".join(map(str, given["tokens"])))
    given.pop("tokens", None)  # the number of tokens of a loss
    if "ndcg_at_10" in line:  # each is a query
        given.pop("role", None)
    if not line.keys().isdisjoint(REWARDS):
        given = {k: v for k, v in given.items() if k not in (*REWARDS, "accuracy", "length")}
    texts = [named_text(*each) for each in given.items() if each[1] is not None]
    return cut("\n".join(texts))


def named_text(name: str, value: object) -> str:
    """A column as text; of a conversation the turns, those of an answer with the column's name."""
    is_conversation = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
    if not is_conversation:
        return str(value)
    is_answer = len(value) == 1 and value[0].get("role") == "assistant"
    return f"{name}: {value[0].get('content')}" if is_answer else turns_text(value)


def conversation_text(messages: list[object]) -> str:
    """The turns of a conversation; an answer at its end is in another column."""
    turns = [message for message in messages if isinstance(message, dict)]
    # the answer that the model was asked for, shown as "expected"
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    return turns_text(turns)


def turns_text(turns: list[dict[str, object]]) -> str:
    """The turns of a conversation with their roles."""
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


def text_of(value: object, between: str = " ") -> str:
    """A label, prediction or score as text.

    Args:
        between: the items of a list.
    """
    if value is None:
        return ""
    # before the numbers: bool is a subclass of int
    if isinstance(value, bool | str):
        return cut(str(value))
    if isinstance(value, list):
        # None: a word beyond `max_length`, see `classified`
        return cut(between.join("-" if each is None else text_of(each) for each in value))
    assert isinstance(value, int | float)
    return number(value, 4)


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"
