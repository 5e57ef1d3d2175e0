"""Local files: csv, tsv, json, jsonl and parquet; errors name the line of an invalid row.

`datasets` reads these formats too, but its errors do not say which line is invalid.
"""

import csv
import json
import logging
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from petl.data.base import RawData
from petl.data.tabular import Tabular
from petl.data.validation import (
    LazySourceRows,
    Row,
    SourceRows,
    parse_json,
    require,
    shown,
)
from petl.errors import InputError, first_line
from petl.files.paths import file_of, path_of

Table = Iterator[tuple[int, dict[str, Any]]]  # numbered rows
BATCH = 1000  # rows of a parquet file in memory at a time; assumption: small next to a model
CHECKED = 100_000  # rows after which the memory is looked at again
MIN_FREE = 0.02  # fraction of the memory that rows must leave free; assumption
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Files(Tabular):
    """Rows of local files."""

    train: str
    test: str | None = None  # None: test_share of the training rows is held out

    def check(self) -> None:
        """Raise InputError unless both files exist and have a supported format."""
        for setting, name in (("data.train", self.train), ("data.test", self.test)):
            if name:
                data_file(setting, name)

    def read(self) -> RawData:
        """Read the files; with `streaming` the train rows are read later."""
        if self.streaming:
            return self.stream(
                LazySourceRows(
                    self.train, self.located_rows, self.train_rows, whole=partial(whole, self.train)
                ),
                self.test_file_rows(),
            )
        train = read_rows("data.train", self.train, self.columns())
        return self.assemble(train, self.test_file_rows())

    def test_file_rows(self) -> SourceRows | None:
        """Read the test file; None if `data.test` is not set."""
        if not self.test:
            return None
        test = read_rows("data.test", self.test, self.columns())
        # samefile: also through links and relative paths
        if Path(self.test).expanduser().samefile(Path(self.train).expanduser()):
            logger.warning(
                "data.test and data.train are the same file: scores measure memorization"
            )
        return test

    def located_rows(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield the train rows as they are read, each with its location for messages."""
        unit, rows = iterate_rows("data.train", self.train, columns)
        return ((f"{self.train}, {unit} {number}", row) for number, row in rows)


def read_rows(setting: str, name: str, columns: Sequence[str]) -> SourceRows:
    """Read `columns` of all rows of a file into memory.

    Raises:
        InputError: the file is missing, empty or malformed (the message names the line), or lacks a
            column.
    """
    unit, rows = iterate_rows(setting, name, columns)
    table = []
    for count, numbered_row in enumerate(rows, start=1):
        table.append(numbered_row)
        if count % CHECKED == 0:  # a compressed file of kilobytes can have billions of rows
            check_memory(f"{setting}={name}", count)
    numbers, values = [number for number, _ in table], [row for _, row in table]
    return SourceRows(name, unit, numbers, values, whole=partial(whole, name))


def whole(name: str) -> Iterator[Row]:
    """Yield the rows of a training file with all of their columns."""
    _, rows = iterate_rows("data.train", name, None)
    return (row for _, row in rows)


def check_memory(what: str, rows: int) -> None:
    """Raise InputError if the first `rows` rows of a file have filled the machine's memory."""
    memory = psutil.virtual_memory()
    if memory.available < MIN_FREE * memory.total:
        raise InputError(
            f"{what} fills the {memory.total / 1e9:,.0f} GB of memory of this machine after "
            f"{rows:,} rows: split it, or set data.streaming=true with data.test=FILE"
        )


def iterate_rows(setting: str, name: str, columns: Sequence[str] | None) -> tuple[str, Table]:
    """Open a file: the unit that numbers its rows ("line", "item", "row"), and an iterator of rows.

    Rows have these columns; for None all that there are.

    Raises:
        InputError: as `read_rows`; errors inside the file are raised while iterating.
    """
    path = data_file(setting, name)
    unit, reader = READERS[path.suffix.lower()]

    def rows() -> Table:
        number = 0  # of the last row; 0 if there is none
        try:
            # an empty file is not valid parquet or JSON: treat it as one without rows
            if path.stat().st_size:
                for number, row in reader(path, columns):
                    yield number, row
        except OSError as error:
            raise InputError(
                f"{setting}={name} cannot be read: {error.strerror or error}"
            ) from error
        if not number:
            raise InputError(f"{setting}={name} has no rows")

    return unit, rows()


def data_file(setting: str, name: str) -> Path:
    """Return the path of a data file; nothing is read.

    Raises:
        InputError: there is no such file, or its format is not supported.
    """
    path = path_of(setting, name)
    if path.suffix.lower() not in READERS:
        raise InputError(
            f"{setting}={name} is not in a supported format; available: {', '.join(READERS)}"
        )
    return file_of(setting, name, READERS)


@contextmanager
def lines_of(path: Path, newline: str) -> Generator[TextIO]:
    """Open a UTF-8 file for reading by line, without its byte order mark.

    Raises:
        InputError: a byte is not UTF-8; the message names its line.
    """
    try:
        # utf-8-sig: Excel writes a byte order mark, which would be part of the first column name
        with path.open(encoding="utf-8-sig", newline=newline) as lines:
            yield lines
    except UnicodeDecodeError as error:  # its position counts from a buffer, not from the file
        raise not_utf8(path) from error


def not_utf8(path: Path) -> InputError:
    """The error for a file that is not UTF-8, with the first such line and byte."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return InputError(
                    f"{path}, line {number}: byte {line[error.start]:#04x} is not UTF-8; "
                    "save the file as UTF-8"
                )
    return InputError(f"{path} was changed while it was read")


def read_delimited(path: Path, columns: Sequence[str] | None, delimiter: str) -> Table:
    """Rows of a csv or tsv file, numbered by the line they begin on."""
    with any_field_size(), lines_of(path, newline="") as lines:
        # strict: malformed quotes are errors
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1  # a quoted field may span several lines
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise InputError(f"{path}, line {line}: {error}; check its quotes") from error
            if fields is None:
                return
            if not fields:  # skip an empty line
                continue
            if header is None:
                header = check_header(path, fields, columns or ())
                continue
            if len(fields) != len(header):
                raise InputError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}"
                )
            row = dict(zip(header, fields, strict=True))
            yield line, {column: row[column] for column in columns or header}


def check_header(path: Path, fields: list[str], columns: Sequence[str]) -> list[str]:
    """The column names of a header, in which each of `columns` occurs exactly once."""
    # spaces after commas are common in hand-written headers
    header = [field.strip() for field in fields]
    require(columns, header, str(path))
    for column in columns:
        if header.count(column) > 1:
            raise InputError(
                f"{path} has {header.count(column)} columns named {column!r}: rename all but one"
            )
    return header


@contextmanager
def any_field_size() -> Generator[None]:
    """Inside the block, the csv module reads fields of any length (its default limit is 128 KB)."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_json(path: Path, columns: Sequence[str] | None) -> Table:
    """Rows of a JSON file that holds one list of objects, numbered from 1."""
    with lines_of(path, newline="\n") as lines:
        text = lines.read()
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object per line is .jsonl" if error.msg == "Extra data" else ""
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}{hint}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(content, list):
        raise InputError(f"{path} holds {shown(content)}, not a list of objects")
    for number, row in enumerate(content, start=1):
        yield number, select_columns(row, columns, f"{path}, item {number}")


def read_jsonl(path: Path, columns: Sequence[str] | None) -> Table:
    """Rows of a JSON Lines file, numbered by line; empty lines are skipped."""
    # newline: a JSON string may contain other characters that Unicode counts as line ends
    with lines_of(path, newline="\n") as lines:
        for line, content in enumerate(lines, start=1):
            if not content.strip():
                continue
            try:
                row = parse_json(content)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {line}: {error.msg} at column {error.colno}"
                ) from error
            except ValueError as error:
                raise InputError(f"{path}, line {line}: {error}") from error
            yield line, select_columns(row, columns, f"{path}, line {line}")


def select_columns(row: Any, columns: Sequence[str] | None, origin: str) -> dict[str, Any]:
    """The values of `columns` of one JSON object; all for None."""
    if not isinstance(row, dict):
        raise InputError(f"{origin}: {shown(row)} is not an object")
    if columns is None:
        return row
    require(columns, row, origin)
    return {column: row[column] for column in columns}


def read_parquet(path: Path, columns: Sequence[str] | None) -> Table:
    """Rows of a parquet file, numbered from 1."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names if columns is None else columns
            require(columns, file.schema_arrow.names, str(path))
            # only the columns that the task reads are decompressed
            for batch in file.iter_batches(BATCH, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except InputError:
        raise
    except (pa.ArrowException, ValueError, OverflowError) as error:  # the latter two of values
        raise InputError(
            f"{path} cannot be read as parquet: after row {number}: {first_line(error)}"
        ) from error


Reader = Callable[[Path, Sequence[str] | None], Table]
READERS: dict[str, tuple[str, Reader]] = {
    ".csv": ("line", partial(read_delimited, delimiter=",")),
    ".tsv": ("line", partial(read_delimited, delimiter="\t")),
    ".json": ("item", read_json),
    ".jsonl": ("line", read_jsonl),
    ".parquet": ("row", read_parquet),
}
