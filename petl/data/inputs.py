"""Rows of files for a task that exists already: to predict, without labels, or to score."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from petl.config.schema import read_fields
from petl.data.files import Files, located_rows
from petl.data.tabular import TASK_COLUMNS
from petl.data.task_columns import ClassLabelColumns
from petl.data.validation import LazySourceRows, Row, every
from petl.errors import InputError
from petl.tasks.base import Task


def read_inputs(
    names: Sequence[str],
    task: Task,
    settings: Mapping[str, Any],
    *,
    labels: bool = False,
    setting: str = "FILE",
) -> Iterator[tuple[Row, Row]]:
    """Yield the rows of files, with all of their columns and as `task.encode_rows` reads them.

    They are read as they are needed, so that files may be larger than memory.

    Args:
        names: files in the formats of `petl.data.files`.
        settings: those under `data` of the run that the task is of, which name columns.
        labels: True if rows have labels, answers or targets; else these columns need not exist, and
            are absent from the task's rows. Of a conversation the last answer is then left out.
        setting: that names the files, for messages.

    Raises:
        InputError: the task reads no tables; when a file or row that is not valid is reached.
    """
    if task.name not in TASK_COLUMNS:
        raise InputError(f"data.task={task.name} reads files in folders, not {names[0]}")
    kind = TASK_COLUMNS[task.name]
    given = {key: settings[key] for key in kind.own_settings if key in settings}
    given |= {"labels": task.labels} if "labels" in kind.own_settings else {}
    base = {"name": "files", "source": "files", "task": task.name, "train": list(names)}
    source = read_fields(Files, {**given, **base}, "data")
    columns = kind(source, labeled=labels)

    def choose(present: Iterable[str], origin: str) -> list[str]:
        found = list(present)
        columns.choose(found, origin)
        return every(found, origin)

    rows = LazySourceRows(", ".join(names), lambda choose: located_rows(setting, names, choose))
    if labels and isinstance(columns, ClassLabelColumns):
        columns.task(rows)  # the numbers of the classes, all of which `labels` has
    numbers = count()
    return rows.map(lambda row: (row, source.numbered(next(numbers), columns.convert(row))), choose)
