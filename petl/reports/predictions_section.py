"""The part of a page about predictions: classes, confusion, calibration, examples, answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petl.files.read import iterate_json_lines
from petl.reports.analysis import Analysis, Bin, Line, analyze
from petl.reports.formatting import number
from petl.reports.page import Curve, line_chart
from petl.runs.records import BEFORE, PREDICTIONS

MAX_CLASSES = 20  # of a confusion matrix that a page shows whole
MAX_CONFUSED = 15  # most frequent confusions that it shows otherwise
LONGEST = 600  # characters of a text in an example; predictions.jsonl has all of it
NOT_INPUT = {*Line.__annotations__, "tokens_read", "rouge1", "rouge2"}


@dataclass(frozen=True)
class Section:
    """What the template `SECTION` shows.

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


def section_of(folder: Path) -> Section | None:
    """The section about the predictions in a folder; None if it has none.

    Raises:
        InputError: a file of predictions is damaged.
    """
    file = folder / PREDICTIONS
    if not file.exists():
        return None
    found = analyze(file)
    wanted = {line["row"] for line in (*found.worst, *found.typical)}
    # only tasks that generate text keep the answers before training
    before = {}
    if (folder / BEFORE).exists():
        lines = iterate_json_lines(folder / BEFORE, Line)
        # only the shown rows are kept in memory
        before = {line["row"]: line for line in lines if line["row"] in wanted}
    few = len(found.classes) <= MAX_CLASSES
    return Section(
        classes=[
            [c.name, percent(c.precision), percent(c.recall), percent(c.f1), f"{c.examples:,}"]
            for c in found.by_class()
        ],
        matrix=matrix_of(found) if found.classes and few else None,
        confused=[] if few else confused_of(found),
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
    return (
        f"Expected calibration error {percent(error)}: mean confidence {percent(sure)}, "
        f"{percent(right)} right (n = {total:,}; bins of equal width)."
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
    found: Analysis, before: Mapping[int, Mapping[str, Any]]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of the tables of examples, without tables that have none."""
    tables = []
    for title, lines in (("Worst examples", found.worst), ("Typical examples", found.typical)):
        if not lines:
            continue
        # a column that no example has is left out
        names = [name for name in COLUMNS if any(name in line for line in lines)]
        header = ["row", "input", *(HEADERS.get(name, name) for name in names)]
        rows = [
            [f"{line['row']:,}", input_of(line), *(text_of(line.get(name)) for name in names)]
            for line in lines
        ]
        if before:
            # present: only a run with predictions has answers before training
            place = header.index(HEADERS["prediction"])
            header.insert(place, "before training")
            for line, row in zip(lines, rows, strict=True):
                earlier = before.get(line["row"], {})
                row.insert(place, text_of(earlier.get("prediction")))
        tables.append((title, header, rows))
    return tables


COLUMNS = ("label", "prediction", "probability", "loss", "exact_match", "f1", "rougeL")
HEADERS = {"label": "expected", "prediction": "predicted", "exact_match": "exact match"}


def input_of(line: Mapping[str, Any]) -> str:
    """The columns of an example that the model has read, as one text."""
    given = {name: value for name, value in line.items() if name not in NOT_INPUT}
    # a stranger's column of this name may hold something else
    if isinstance(given.get("messages"), list):
        return cut(conversation_text(given["messages"]))
    if isinstance(given.get("tokens"), list):
        return cut(" ".join(map(str, given["tokens"])))
    given.pop("tokens", None)  # the number of tokens of a loss
    texts = [str(value) for value in given.values() if value is not None]
    return cut("\n".join(texts))


def conversation_text(messages: list[Any]) -> str:
    """The turns of a conversation; an answer at its end is in another column."""
    turns = [message for message in messages if isinstance(message, dict)]
    # the answer that the model was asked for, shown as "expected"
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


def text_of(value: Any) -> str:
    """A label, prediction or score as text."""
    if value is None:
        return ""
    # before the numbers: bool is a subclass of int
    if isinstance(value, bool | str):
        return cut(str(value))
    if isinstance(value, list):
        # None: a word beyond `max_length`, see `classified`
        return cut(" ".join("-" if each is None else text_of(each) for each in value))
    return number(value, 4)


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


SECTION = """\
{% if section %}
{% if section.classes %}
<h2>Classes</h2>
{% set names = ["class", "precision", "recall", "F1", "examples"] %}
{{ blocks.table(names, section.classes, kind="sortable") }}
{% endif %}
{% if section.matrix %}
<h3>Confusion matrix</h3>
<p class="sub">One row for each label, one column for each prediction.</p>
{{ blocks.matrix(section.matrix[0], section.matrix[1]) }}
{% endif %}
{% if section.confused %}
<h3>Most frequent confusions</h3>
{{ blocks.table(["label", "prediction", "examples"], section.confused) }}
{% endif %}
{% if section.calibration %}
<h2>Calibration</h2>
<p>{{ section.calibration }}</p>
<figure>{{ section.reliability | safe }}</figure>
{% endif %}
{% for title, header, rows in section.examples %}
<h2>{{ title }}</h2>
{{ blocks.table(header, rows, kind="examples") }}
{% endfor %}
{% endif %}
"""
