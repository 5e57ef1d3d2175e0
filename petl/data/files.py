"""The reader's own files: csv, tsv, json, jsonl and parquet, with the place of every fault."""

import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from petl.data.base import RawData
from petl.data.rows import Rows, require, shown
from petl.data.tabular import Tabular
from petl.errors import InputError, near
from petl.fields import first_line

Table = list[tuple[int, dict[str, Any]]]  # rows with their numbers
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Files(Tabular):
    """Rows of local files."""

    train: str
    test: str | None = None  # None: test_share of train is held out

    def read(self) -> RawData:
        train = read_rows("data.train", self.train, self.columns())
        if not self.test:
            return self.assemble(train, None)
        test = read_rows("data.test", self.test, self.columns())
        if Path(self.test).expanduser().samefile(Path(self.train).expanduser()):
            logger.warning("data.test is data.train: scores tell what was memorised")
        return self.assemble(train, test)


def read_rows(setting: str, given: str, columns: Sequence[str]) -> Rows:
    """The rows of a file with at least `columns`.

    Raises:
        InputError: missing, empty, malformed (which line), or without one of the columns.
    """
    path = Path(given).expanduser()
    if path.suffix.lower() not in READERS:
        raise InputError(f"{setting}={given} does not end in {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"{setting}={given} {absent(path)}")
    unit, reader = READERS[path.suffix.lower()]
    try:
        table = reader(path, columns) if path.stat().st_size else []
    except OSError as error:
        raise InputError(f"{setting}={given} cannot be read: {error.strerror or error}") from error
    if not table:
        raise InputError(f"{setting}={given} has no rows")
    return Rows(given, unit, [number for number, _ in table], [row for _, row in table])


def absent(path: Path) -> str:
    """What there is in place of a file that is not there."""
    if path.is_dir():
        return "is a folder, not a file"
    if not path.parent.is_dir():
        return f"does not exist, nor does its folder {path.parent}"
    others = [file.name for file in path.parent.iterdir() if file.suffix.lower() in READERS]
    return f"does not exist{near(path.name, others) if others else ''}"


def decoded(path: Path) -> str:
    """The text of a file in UTF-8, without its byte order mark."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is not UTF-8; "
            "save the file as UTF-8"
        ) from error


def read_delimited(path: Path, columns: Sequence[str], delimiter: str) -> Table:
    """Rows numbered by the line they begin on."""
    table: Table = []
    with any_field_size(), io.StringIO(decoded(path), newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise InputError(f"{path}, line {line}: {error}; check its quotes") from error
            if fields is None:
                return table
            if not fields:  # an empty line
                continue
            if header is None:
                header = check_header(path, fields, columns)
                continue
            if len(fields) != len(header):
                raise InputError(
                    f"{path}, line {line}: {len(fields)} fields where the header has {len(header)}"
                )
            row = dict(zip(header, fields, strict=True))
            table.append((line, {column: row[column] for column in columns}))


def check_header(path: Path, fields: list[str], columns: Sequence[str]) -> list[str]:
    """The names of the columns, each of which is asked for at most once."""
    header = [field.strip() for field in fields]
    require(columns, header, str(path))
    for column in columns:
        if header.count(column) > 1:
            raise InputError(f"{path} has {header.count(column)} columns {column!r}")
    return header


@contextmanager
def any_field_size() -> Generator[None]:
    """Lets the csv module read fields of any length inside the block."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_json(path: Path, columns: Sequence[str]) -> Table:
    """Rows of one list of objects, numbered from 1."""
    try:
        content = json.loads(decoded(path))
    except json.JSONDecodeError as error:
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else ""
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}{hint}"
        ) from error
    if not isinstance(content, list):
        raise InputError(f"{path} holds {shown(content)}, not a list of objects")
    return [
        (number, chosen(row, columns, f"{path}, item {number}"))
        for number, row in enumerate(content, start=1)
    ]


def read_jsonl(path: Path, columns: Sequence[str]) -> Table:
    """Rows of one object a line, numbered by line; empty lines are passed over."""
    table: Table = []
    # not splitlines: a JSON string may hold other characters that Unicode counts as line ends
    for line, content in enumerate(decoded(path).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {line}: {error.msg} at column {error.colno}") from error
        table.append((line, chosen(row, columns, f"{path}, line {line}")))
    return table


def chosen(row: Any, columns: Sequence[str], origin: str) -> dict[str, Any]:
    """The columns of one JSON object."""
    if not isinstance(row, dict):
        raise InputError(f"{origin}: {shown(row)} is not an object")
    require(columns, row, origin)
    return {column: row[column] for column in columns}


def read_parquet(path: Path, columns: Sequence[str]) -> Table:
    """Rows of a parquet file, numbered from 1."""
    try:
        file = pq.ParquetFile(path)
        require(columns, file.schema_arrow.names, str(path))
        rows = file.read(columns=list(columns)).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read as parquet: {first_line(error)}") from error
    return list(enumerate(rows, start=1))


Reader = Callable[[Path, Sequence[str]], Table]
READERS: dict[str, tuple[str, Reader]] = {
    ".csv": ("line", partial(read_delimited, delimiter=",")),
    ".tsv": ("line", partial(read_delimited, delimiter="\t")),
    ".json": ("item", read_json),
    ".jsonl": ("line", read_jsonl),
    ".parquet": ("row", read_parquet),
}
