"""Rows of files for a task that exists already: to predict, without labels, or to score."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from petl.data.answer_columns import CausalLMColumns
from petl.data.files import READERS, Files, located_rows, suffix_of
from petl.data.folders import IMAGES, SOUNDS, labeled_files, visible_files
from petl.data.multitask_columns import MultitaskColumns
from petl.data.tabular import TASK_COLUMNS, columns_of
from petl.data.task_columns import ClassLabelColumns, TaskColumns
from petl.data.tasks.base import Task
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.media import AudioClassification, MediaTask
from petl.data.tasks.multitask import MultitaskClassification
from petl.data.validation import (
    FOLDER,
    Choose,
    LazySourceRows,
    Row,
    every,
    label,
    read,
    require,
    text,
    without_paths,
)
from petl.errors import InputError, did_you_mean, shown
from petl.system.files.disk import check_bounds, sha256
from petl.system.files.paths import file_of, path_of
from petl.system.values import read_fields


@dataclass
class Inputs:
    """Rows with all of their columns, each with what `Task.encode_rows` reads of it.

    Attributes:
        rows: starts an iterator over them.
        locate: gives the place of a row by its number, for messages; None: rows are files.
    """

    rows: Callable[[], Iterator[tuple[Row, Row]]]
    locate: Callable[[int], str] | None = None

    def __iter__(self) -> Iterator[tuple[Row, Row]]:
        return self.rows()


def read_inputs(
    names: Sequence[str],
    task: Task,
    settings: Mapping[str, object],
    *,
    rows: Iterable[Mapping[str, object]] | None = None,
    labels: bool = False,
    any_kind: bool = False,
    setting: str = "FILE",
) -> Inputs:
    """Return the rows of files, with all of their columns and as `task.encode_rows` reads them.

    They are read as they are needed, so that files may be larger than memory.

    Args:
        names: files in the formats of `petl.data.files`.
        rows: given in place of files, whose `names` are not read then.
        settings: those under `data` of the run that the task is of, which name columns.
        labels: True if rows have labels, answers or targets; else these columns need not exist, and
            are absent from the task's rows. Of a conversation the last answer is then left out.
        any_kind: True if both conversations and plain texts may be read, whichever of the two the
            task learns.
        setting: that names the files, for messages.

    Raises:
        InputError: when a file or row that is not valid is reached.
    """
    if isinstance(task, MediaTask):
        return Inputs(partial(media_inputs, names, task, rows, labels=labels, setting=setting))
    name = task.file_kind or task.name
    kind = TASK_COLUMNS[name]
    given = {key: settings[key] for key in kind.own_settings if key in settings}
    # the task's own classes: the run's setting may be null, with classes found in its rows
    given |= {"labels": task.labels} if "labels" in kind.own_settings else {}
    if task.tasks:
        column = settings.get("task_column", "task")
        given |= {"tasks": list(task.tasks), "task_column": column}
    # whatever source the run had (a Hub data set, a folder), new rows come from files
    base = {"name": "files", "source": "files", "task": name, "train": list(names)}
    source = read_fields(Files, {**given, **base}, "data")
    if isinstance(task, MultitaskClassification):
        columns: TaskColumns = MultitaskColumns(source, task, labeled=labels)
    else:
        columns = columns_of(source, labeled=labels)
    columns.of_run = True
    if isinstance(columns, CausalLMColumns) and isinstance(task, CausalLM) and not any_kind:
        columns.restrict(task)

    def choose(present: Iterable[str], origin: str) -> list[str]:
        found = list(present)
        # raises for missing columns; its result is not used, since all columns are yielded
        own = columns.choose(found, origin)
        return every(dict.fromkeys([*without_paths(found), *own]), origin)

    opened = (
        partial(located_rows, setting, names) if rows is None else partial(located_in_memory, rows)
    )
    lazy = LazySourceRows(", ".join(names), opened)
    if labels and isinstance(columns, ClassLabelColumns):
        columns.task(lazy)  # the numbers of the classes, all of which `labels` has
        columns.where_unknown = (
            f"is none of the adapter's ({', '.join(task.labels or ())}): rename it"
        )

    def convert(row: Row) -> tuple[Row, Row]:
        own = {
            n: v for n, v in row.items() if n != FOLDER and n.partition(".")[0] not in {*row} - {n}
        }
        try:
            return own, columns.convert(row)
        except ValueError as error:
            if labels:
                raise
            # each row gets a prediction: data.bad_rows is for training
            raise ValueError(f"{error}; correct this row, or remove it") from error

    return Inputs(partial(numbered, source, partial(lazy.map, convert, choose)), lazy.locate)


def numbered(
    source: Files, converted: Callable[[], Iterator[tuple[Row, Row]]]
) -> Iterator[tuple[Row, Row]]:
    """Yield rows, those for the task with their numbers over all files where it reads them."""
    for number, (own, found) in enumerate(converted()):
        yield own, source.numbered(number, found)


def located_in_memory(
    rows: Iterable[Mapping[str, object]], choose: Choose
) -> Iterator[tuple[str, Row]]:
    """Yield rows in memory, as `located_rows` those of files."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"row {number} is {shown(row)}, not a mapping from columns to values, such as "
                '{"text": "..."}'
            )
        origin = f"row {number}"
        choose(row, origin)
        found = {name: plain(value) for name, value in row.items()}
        try:
            check_bounds(found)
        except ValueError as error:
            raise InputError(f"{origin}: {error}; correct this row, or remove it") from error
        yield origin, found


def plain(value: object) -> object:
    """A value as Python's own type, if it is one of NumPy."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def media_inputs(
    names: Sequence[str],
    task: MediaTask,
    rows: Iterable[Mapping[str, object]] | None = None,
    *,
    labels: bool,
    setting: str,
) -> Iterator[tuple[Row, Row]]:
    """Yield images or sounds, as `read_inputs`: files, and those of folders, tables and rows.

    A table has the column `path`, relative to its folder, and `label` with the name of the class.
    The paths of rows in memory are relative to the working directory.
    With labels, a folder has one subfolder for each class.
    """
    # a MediaTask classifies either sounds or images
    suffixes = SOUNDS if isinstance(task, AudioClassification) else IMAGES
    numbers = {name: number for number, name in enumerate(task.classes)}
    if rows is not None:
        found = listed_files(located_in_memory(rows, every), Path(), labels=labels)
    else:
        each = (media_files(name, suffixes, labels=labels, setting=setting) for name in names)
        found = chain.from_iterable(each)
    for raw, file, own in found:
        if own is None:
            yield raw, {"path": str(file)}
            continue
        if own not in numbers:
            raise InputError(
                f"{file} has the class {own!r}, which is none of the adapter's"
                f"{did_you_mean(own, numbers)}"
            )
        # of the content, for the cache of encoded rows
        digest = sha256(file)
        yield raw, {"path": str(file), "sha256": digest, "label": numbers[own]}


def media_files(
    name: str, suffixes: Sequence[str], *, labels: bool, setting: str
) -> Iterator[tuple[Row, Path, str | None]]:
    """Yield the row, the file and the class of images or sounds; None without `labels`."""
    path = path_of(setting, name)
    if path.is_dir() and labels:
        for file, own in labeled_files(setting, name, suffixes):
            yield {"path": str(file), "label": own}, file, own
    elif path.is_dir():
        yield from (({"path": str(file)}, file, None) for file in media(path, suffixes))
    elif suffix_of(path) in READERS:
        yield from listed_files(located_rows(setting, [name], every), path.parent, labels=labels)
    elif labels:
        raise InputError(
            f"{setting}={name} has no labels: give a folder with one subfolder per class, or a "
            "table with the columns path and label"
        )
    else:
        yield {"path": name}, file_of(setting, name), None


def listed_files(
    rows: Iterable[tuple[str, Row]], folder: Path, *, labels: bool
) -> Iterator[tuple[Row, Path, str | None]]:
    """Yield the files that rows name, as `media_files`.

    Args:
        folder: which their paths are relative to.
    """
    for origin, raw in rows:
        require(["path", "label"] if labels else ["path"], raw, origin)
        try:
            # an absolute path in the table replaces the folder, as `/` of pathlib does
            file = folder / read(raw, "path", text)
            own = read(raw, "label", label) if labels else None
        except ValueError as error:
            raise InputError(f"{origin}: {error}") from error
        yield raw, file_of(f"path of {origin}", str(file)), own


def media(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files with one of `suffixes` in a folder, at any depth, sorted.

    Raises:
        InputError: there is none.
    """
    found = [file for file in visible_files(folder) if file.suffix.lower() in suffixes]
    if not found:
        raise InputError(f"{folder} has no file of the types {', '.join(suffixes)}")
    # rglob yields files in the order of the file system, which differs between machines
    return sorted(found, key=lambda file: file.relative_to(folder).parts)
