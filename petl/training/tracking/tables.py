"""Tables of a run's predictions, for trackers: predictions, answers, confusion matrix."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from petl.core.types import Record
from petl.training.runs.predicted_classes import Line, classes_of, lines_of
from petl.training.runs.records import ADAPTER, BEFORE, PREDICTIONS
from petl.training.tracking.base import Tracker, TrackerTable, named

ROWS = 1000  # of the test examples that a table shows; the file in the run's folder has all
CLASSES = 50  # of a confusion matrix; it has a column for each
LONGEST = 2000  # characters of a cell


def send_results(tracker: Tracker, run: Path, scores: Record) -> None:
    """Give a tracker the results in the folder of a finished run.

    Args:
        scores: numbers and texts by name, some in groups.
    """
    tracker.end(named(scores), sorted(run.glob("*.png")), run / ADAPTER, tables_of(run))


def tables_of(run: Path) -> dict[str, TrackerTable]:
    """Return the tables of a finished run by name; none without predictions.

    Raises:
        InputError: a file of predictions is damaged.
    """
    if not (run / PREDICTIONS).exists():
        return {}
    lines = list(islice(lines_of(run / PREDICTIONS), ROWS))
    before = run / BEFORE
    if before.exists():
        earlier = {line["row"]: line.get("prediction") for line in lines_of(before)}
        lines = [{**line, "before": earlier.get(line["row"])} for line in lines]
    tables = {"predictions": table(lines)} if lines else {}
    confusion = Counter(pair for line in lines_of(run / PREDICTIONS) for pair in classes_of(line))
    names = sorted({name for pair in confusion for name in pair})
    if 0 < len(names) <= CLASSES:
        rows = [[one, *(confusion[one, other] for other in names)] for one in names]
        tables["confusion matrix"] = TrackerTable(["label", *names], rows)
    return tables


def table(lines: Iterable[Line]) -> TrackerTable:
    """Return lines as a table; a cell is empty if a line has no such entry."""
    lines = list(lines)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    # of one type each, as trackers want it
    numeric = {c: all(isinstance(line.get(c), int | float) for line in lines) for c in columns}
    rows = [[cell(line.get(c), numeric=numeric[c]) for c in columns] for line in lines]
    return TrackerTable(columns, rows)


def cell(value: object, *, numeric: bool) -> object:
    """Return a value as a number or as text."""
    if numeric:
        return value
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:LONGEST]
