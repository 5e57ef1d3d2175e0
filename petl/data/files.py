"""Local files: csv, tsv, json and jsonl, also as .gz, and parquet; errors name the invalid line.

`datasets` reads these formats too, but its errors do not say which line is invalid.
"""

import csv
import gzip
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import TextIO

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from petl.data.base import RawData
from petl.data.tabular import Tabular
from petl.data.validation import (
    FOLDER,
    Choose,
    LazySourceRows,
    Row,
    SourceRows,
    every,
    from_table,
)
from petl.errors import InputError, first_line, shown
from petl.system.files.paths import file_of, path_of
from petl.system.files.read import parse_json

Table = Iterator[tuple[int, dict[str, object]]]  # numbered rows
BATCH = 1000  # rows of a parquet file in memory at a time; assumption: small next to a model
CHECKED = 100_000  # rows after which the memory is looked at again
MIN_FREE = 0.02  # fraction of the memory that rows must leave free; assumption
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Files(Tabular):
    """Rows of local files; those of several files are read one after the other."""

    train: object  # a file, or a list of files
    test: object = None  # likewise; None: test_share of the training rows is held out

    def check(self) -> None:
        """Raise InputError unless all files exist and have a supported format."""
        for setting, value in (("data.train", self.train), ("data.test", self.test)):
            for name in file_names(setting, value) if value else ():
                data_file(setting, name)

    def check_columns(self) -> None:
        """Raise InputError unless the first row of each file has the columns of the task."""
        for setting, value in (("data.train", self.train), ("data.test", self.test)):
            for name in file_names(setting, value) if value else ():
                # a list in JSON is read as a whole, which may take long
                if suffix_of(data_file(setting, name)) != ".json":
                    next(iterate_rows(setting, name, self.task_columns.choose)[1], None)

    def read(self) -> RawData:
        """Read the files; with `streaming` the train rows are read later."""
        names = file_names("data.train", self.train)
        if self.streaming:
            rows = LazySourceRows(
                ", ".join(names),
                partial(located_rows, "data.train", names),
                self.train_rows,
                whole=partial(whole, names),
            )
            return self.stream(rows, self.test_file_rows(names))
        train = read_rows("data.train", names, self.task_columns.choose)
        return self.assemble(train, self.test_file_rows(names))

    def test_file_rows(self, train: Sequence[str]) -> SourceRows | None:
        """Read the test files; None if `data.test` is not set."""
        if not self.test:
            return None
        names = file_names("data.test", self.test)
        test = read_rows("data.test", names, self.task_columns.choose)
        paths = [Path(name).expanduser() for name in train]
        # samefile: also through links and relative paths
        if any(Path(name).expanduser().samefile(path) for name in names for path in paths):
            what = "are the same file" if len(names) + len(paths) == 2 else "share a file"
            logger.warning("data.test and data.train %s: scores measure memorization", what)
        return test


def file_names(setting: str, value: object) -> list[str]:
    """The names of the files that a setting names, one or a list.

    Raises:
        InputError: it is neither, or names a file twice.
    """
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    if not names or isinstance(value, dict) or not all(names):
        raise InputError(f"{setting}={value} is not a file or a list of files")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{setting} names {twice[0]} twice")
    return names


def read_rows(setting: str, names: Sequence[str], choose: Choose) -> SourceRows:
    """Read the columns that `choose` returns of all rows of the files into memory.

    Raises:
        InputError: a file is missing, empty or malformed (the message names the line), or lacks a
            column.
    """
    files, numbers, values = [], [], []
    for name in names:
        unit, rows = iterate_rows(setting, name, choose)
        files.append((len(values), f"{name}, {unit}"))
        for number, row in rows:
            numbers.append(number)
            values.append(row)
            if len(values) % CHECKED == 0:  # a compressed file of kilobytes can have billions
                check_memory(f"{setting}={name}", len(values))

    def locate(position: int) -> str:
        place = next(place for start, place in reversed(files) if start <= position)
        return f"{place} {numbers[position]}"

    return SourceRows(
        ", ".join(names), range(len(values)), values, locate, whole=partial(whole, names)
    )


def located_rows(setting: str, names: Sequence[str], choose: Choose) -> Iterator[tuple[str, Row]]:
    """Yield the rows of files as they are read, each with its location for messages."""
    for name in names:
        unit, rows = iterate_rows(setting, name, choose)
        for number, row in rows:
            yield f"{name}, {unit} {number}", row


def whole(names: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of training files with all of their columns."""
    return (row for _, row in located_rows("data.train", names, every))


def check_memory(what: str, rows: int) -> None:
    """Raise InputError if the first `rows` rows of a file have filled the machine's memory."""
    memory = psutil.virtual_memory()
    if memory.available < MIN_FREE * memory.total:
        raise InputError(
            f"{what} fills the {memory.total / 1e9:,.0f} GB of memory of this machine after "
            f"{rows:,} rows: split it, or set data.streaming=true with data.test=FILE"
        )


def iterate_rows(setting: str, name: str, choose: Choose) -> tuple[str, Table]:
    """Open a file: the unit that numbers its rows ("line", "item", "row"), and an iterator of rows.

    Raises:
        InputError: as `read_rows`; errors inside the file are raised while iterating.
    """
    path = data_file(setting, name)
    unit, reader = READERS[suffix_of(path)]
    more: dict[str, object] = {}

    def columns(present: Iterable[str], origin: str) -> list[str]:
        names = choose(present, origin)
        if FOLDER in names:
            more[FOLDER] = str(path.parent)
        return [name for name in names if name != FOLDER]

    def rows() -> Table:
        number = 0  # of the last row; 0 if there is none
        try:
            # an empty file is not valid parquet or JSON: treat it as one without rows
            if path.stat().st_size:
                for number, row in reader(path, columns):
                    yield number, {**row, **more} if more else row
        except (EOFError, zlib.error) as error:  # of gzip
            raise InputError(
                f"{setting}={name} is damaged after row {number}: {first_line(error)}"
            ) from error
        except OSError as error:
            raise InputError(
                f"{setting}={name} cannot be read: {error.strerror or error}"
            ) from error
        if not number:
            raise InputError(f"{setting}={name} has no rows")

    return unit, rows()


def suffix_of(path: Path) -> str:
    """The suffix that tells the format of a file, that before .gz of a compressed one."""
    name = path.name.lower()
    if name.endswith(".gz"):
        inner = Path(name.removesuffix(".gz")).suffix
        return inner if inner in COMPRESSIBLE else ".gz"
    return Path(name).suffix


def opened(path: Path) -> gzip.GzipFile | BufferedReader:
    """Open a file, which may be compressed, to read its bytes."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def data_file(setting: str, name: str) -> Path:
    """Return the path of a data file; nothing is read.

    Raises:
        InputError: there is no such file, or its format is not supported.
    """
    path = path_of(setting, name)
    if suffix_of(path) not in READERS:
        raise InputError(
            f"{setting}={name} is not in a supported format; available: {', '.join(READERS)}, "
            f"and these with .gz: {', '.join(COMPRESSIBLE)}"
        )
    return file_of(setting, name, [*READERS, ".gz"])


@contextmanager
def lines_of(path: Path, newline: str) -> Generator[TextIO]:
    """Open a UTF-8 file for reading by line, without its byte order mark.

    Raises:
        InputError: a byte is not UTF-8; the message names its line.
    """
    try:
        # utf-8-sig: Excel writes a byte order mark, which would be part of the first column name
        with opened(path) as content:
            yield TextIOWrapper(content, encoding="utf-8-sig", newline=newline)
    except UnicodeDecodeError as error:  # its position counts from a buffer, not from the file
        raise not_utf8(path) from error


def not_utf8(path: Path) -> InputError:
    """The error for a file that is not UTF-8, with the first such line and byte."""
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return InputError(
                    f"{path}, line {number}: byte {line[error.start]:#04x} is not UTF-8; "
                    "save the file as UTF-8"
                )
    return InputError(f"{path} was changed while it was read")


def read_delimited(path: Path, choose: Choose, delimiter: str) -> Table:
    """Rows of a csv or tsv file, numbered by the line they begin on."""
    with lines_of(path, newline="") as lines:
        # strict: malformed quotes are errors
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header, columns = None, []
        while True:
            line = reader.line_num + 1  # a quoted field may span several lines
            try:
                fields = next_of_any_size(reader)
            except csv.Error as error:
                raise InputError(f"{path}, line {line}: {error}; check its quotes") from error
            if fields is None:
                return
            if not fields:  # skip an empty line
                continue
            if header is None:
                # spaces after commas are common in hand-written headers
                header = [field.strip() for field in fields]
                columns = choose(header, str(path))
                refuse_repeated(columns, header, path)
                continue
            if len(fields) != len(header):
                raise InputError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}"
                )
            row = dict(zip(header, fields, strict=True))
            yield line, {column: row[column] for column in columns}


def refuse_repeated(columns: Sequence[str], header: Sequence[str], path: Path) -> None:
    """Raise InputError if a header has one of `columns` more than once."""
    for column in columns:
        if header.count(column) > 1:
            raise InputError(
                f"{path} has {header.count(column)} columns named {column!r}: rename all but one"
            )


def next_of_any_size(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row of a csv reader, with fields of any length; None at the end."""
    # the module's limit (128 KB by default) holds for all readers, others of ours among them
    before = csv.field_size_limit(sys.maxsize)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def read_json(path: Path, choose: Choose) -> Table:
    """Rows of a JSON file that holds one list of objects, numbered from 1."""
    with lines_of(path, newline="\n") as lines:
        text = lines.read()
    try:
        content = parse_json(text)
    except ValueError as error:
        hint = "; a file with one object per line is .jsonl" if "Extra data" in str(error) else ""
        raise InputError(f"{path}: {error}{hint}") from error
    if not isinstance(content, list):
        raise InputError(f"{path} holds {shown(content)}, not a list of objects")
    for number, row in enumerate(content, start=1):
        yield number, select_columns(row, choose, f"{path}, item {number}")


def read_jsonl(path: Path, choose: Choose) -> Table:
    """Rows of a JSON Lines file, numbered by line; empty lines are skipped."""
    # newline: a JSON string may contain other characters that Unicode counts as line ends
    with lines_of(path, newline="\n") as lines:
        for line, content in enumerate(lines, start=1):
            if not content.strip():
                continue
            try:
                row = parse_json(content)
            except ValueError as error:
                raise InputError(f"{path}, line {line}: {error}") from error
            yield line, select_columns(row, choose, f"{path}, line {line}")


def select_columns(row: object, choose: Choose, origin: str) -> dict[str, object]:
    """The values of one JSON object that `choose` returns the names of."""
    if not isinstance(row, dict):
        raise InputError(f"{origin}: {shown(row)} is not an object")
    return {column: row[column] for column in choose(row, origin)}


def read_parquet(path: Path, choose: Choose) -> Table:
    """Rows of a parquet file, numbered from 1."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = choose(file.schema_arrow.names, str(path))
            refuse_repeated(columns, file.schema_arrow.names, path)
            # only the columns that the task reads are decompressed
            for batch in file.iter_batches(BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, from_table(row)
    except InputError:
        raise
    except (pa.ArrowException, ValueError, OverflowError) as error:  # the latter two of values
        raise InputError(
            f"{path} cannot be read as parquet: after row {number}: {first_line(error)}"
        ) from error


Reader = Callable[[Path, Choose], Table]
READERS: dict[str, tuple[str, Reader]] = {
    ".csv": ("line", partial(read_delimited, delimiter=",")),
    ".tsv": ("line", partial(read_delimited, delimiter="\t")),
    ".json": ("item", read_json),
    ".jsonl": ("line", read_jsonl),
    ".parquet": ("row", read_parquet),
}
COMPRESSIBLE = (".csv", ".tsv", ".json", ".jsonl")  # parquet compresses by itself
