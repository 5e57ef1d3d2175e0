"""Write rows to a csv, tsv, jsonl or parquet file while they are made; the suffix is the format."""

import csv
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from petl.data.tasks.base import Row
from petl.errors import UNPRINTABLE, InputError, RunStopped, first_line
from petl.system.files.disk import atomic_file
from petl.system.files.paths import path_of


class RowWriter(ABC):
    """Writes rows to an open file; the first rows determine the columns of a table."""

    def __init__(self, opened: BinaryIO) -> None:
        self.opened = opened

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Append rows.

        Raises:
            InputError: the format cannot hold a value, or a table has no such column.
        """

    @abstractmethod
    def close(self) -> None:
        """Write what is left; the file stays open."""


class JsonLines(RowWriter):
    """One object a line."""

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        self.opened.writelines(f"{as_line(row)}\n".encode() for row in rows)

    def close(self) -> None:
        """Write nothing: each row is complete."""


class CsvTable(RowWriter):
    """A table with a header; lists and mappings are JSON text."""

    def __init__(self, opened: BinaryIO, delimiter: str) -> None:
        super().__init__(opened)
        # the csv module ends lines itself
        self.text = TextIOWrapper(opened, encoding="utf-8", newline="", write_through=True)
        # Python 3.11 quotes \r and \n only if they are in the terminator, which is cut to \n then
        lines: Any = SimpleNamespace(
            write=lambda line: self.text.write(line.removesuffix("\r\n") + "\n")
        )
        self.writer = csv.writer(lines, delimiter=delimiter, lineterminator="\r\n")
        self.columns: list[str] | None = None

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        if self.columns is None:
            self.columns = columns_of(rows)
            self.writer.writerow(self.columns)
        refuse_new(rows, self.columns)
        self.writer.writerows([cell(row.get(name)) for name in self.columns] for row in rows)

    def close(self) -> None:
        """Write what is left."""
        self.text.flush()
        self.text.detach()  # else the file is closed with it


class Parquet(RowWriter):
    """A parquet file; columns of an input in parquet keep their types."""

    def __init__(self, opened: BinaryIO, schema: pa.Schema | None = None) -> None:
        super().__init__(opened)
        self.given = schema
        self.writer: pq.ParquetWriter | None = None

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.opened, self.schema_of(rows))
        # the first rows have determined the columns for the whole file
        schema = self.writer.schema
        refuse_new(rows, schema.names)
        for name in schema.names:  # pyarrow would leave out what a struct lacks
            for row in rows:
                refuse_new_keys(row.get(name), schema.field(name).type, name)
        try:
            self.writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))
        # OverflowError: an integer of more than 64 bits
        except (pa.ArrowException, OverflowError) as error:
            raise InputError(
                f"{first_line(error)}: the first rows have other types; {JSONL}"
            ) from (error)

    def schema_of(self, rows: Sequence[Row]) -> pa.Schema:
        """The types of the columns: those of the input, others from the rows."""
        known = {} if self.given is None else {field.name: field for field in self.given}
        # of all rows at hand: the first may have no value in a column
        columns = {name: [row.get(name) for row in rows] for name in columns_of(rows)}
        try:
            types = {n: pa.array(values).type for n, values in columns.items() if n not in known}
        except (pa.ArrowException, OverflowError) as error:
            raise InputError(
                f"{first_line(error)}: columns of parquet have one type; {JSONL}"
            ) from (error)
        # a column without values may get texts
        kinds = {n: pa.string() if pa.types.is_null(kind) else kind for n, kind in types.items()}
        return pa.schema([known[n] if n in known else pa.field(n, kinds[n]) for n in columns])

    def close(self) -> None:
        """Write the footer."""
        if self.writer is not None:
            self.writer.close()


JSONL = "write to a .jsonl file, whose rows may differ"
WRITERS: dict[str, Callable[..., RowWriter]] = {
    ".csv": partial(CsvTable, delimiter=","),
    ".tsv": partial(CsvTable, delimiter="\t"),
    ".jsonl": JsonLines,
    ".parquet": Parquet,
}


def check_format(path: Path) -> None:
    """Raise InputError unless rows can be written in the format of this suffix."""
    if path.suffix.lower() not in WRITERS:
        raise InputError(
            f"--out={path} is not in a supported format; available: {', '.join(WRITERS)}"
        )


def keep_inputs(path: Path, names: Iterable[str | Path]) -> None:
    """Raise InputError if a file to write is one of those that are read."""
    for name in names:
        source = path_of("FILE", str(name))
        # also by another path or a link
        if path.exists() and source.exists() and path.samefile(source):
            raise InputError(f"--out={path} is the file that is read: name another one")


@contextmanager
def reported(path: Path) -> Generator[None]:
    """Inside the block, turn an error of writing a file into a RunStopped."""
    try:
        yield
    except OSError as error:  # such as a full disk
        raise RunStopped(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def new_table(path: Path, schema: pa.Schema | None = None) -> Generator[RowWriter]:
    """A writer of the file, which is complete at the end of the block, and absent before.

    Args:
        schema: of columns that a parquet file keeps.

    Raises:
        RunStopped: the file cannot be opened or closed; whoever writes rows reports that.
    """
    stack = ExitStack()
    with reported(path):
        writer = stack.enter_context(_opened(path, schema))
    try:
        # outside of `reported`: other files may fail in the block, such as those that are read
        yield writer
    except BaseException:
        with reported(path):  # closing fails again on a full disk, without the file's name
            stack.__exit__(*sys.exc_info())
        raise
    with reported(path):
        stack.close()


@contextmanager
def _opened(path: Path, schema: pa.Schema | None) -> Generator[RowWriter]:
    suffix = path.suffix.lower()
    given = {"schema": schema} if suffix == ".parquet" else {}
    with atomic_file(path) as opened:
        writer = WRITERS[suffix](opened, **given)
        try:
            yield writer
        finally:  # also before an error removes the file: parquet's writer would close it later
            writer.close()


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of rows, each once, in the order in which they occur."""
    return list(dict.fromkeys(name for row in rows for name in row))


def refuse_new(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Raise InputError if a row has a column that the first rows of a table lack."""
    new = [name for name in columns_of(rows) if name not in columns]
    if new:
        raise InputError(f"a row has the column {new[0]!r}, which the first rows lack; {JSONL}")


def refuse_new_keys(value: object, kind: pa.DataType, column: str) -> None:
    """Raise InputError if an object has a key that those of the first rows of a table lack."""
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        for key, inner in value.items():
            if kind.get_field_index(key) < 0:
                raise InputError(
                    f"column {column!r} has an object with {key!r}, which those of the first rows "
                    f"lack; {JSONL}"
                )
            refuse_new_keys(inner, kind.field(key).type, column)
    if pa.types.is_list(kind) and isinstance(value, list):
        for inner in value:
            refuse_new_keys(inner, kind.value_type, column)


def cell(value: object) -> object:
    """A value as a field of a csv file."""
    # of bytes, csv would write Python's b'...'; they are refused as in JSON lines
    return as_json(value) if isinstance(value, list | Mapping | bytes) else value


def as_json(value: object) -> str:
    """Format a value as JSON on one line; dates and decimals are text.

    Raises:
        InputError: it cannot be written, such as bytes.
    """
    return json.dumps(value, ensure_ascii=False, default=_as_text)


def _as_text(value: object) -> str:
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise InputError(f"a {type(value).__name__} cannot be written as text; write to .parquet")


def as_line(row: Row) -> str:
    """Format a row as JSON; characters that a terminal would obey are escaped."""
    # JSON readers turn \uXXXX into the character again
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", as_json(row))
