"""Local files: csv, tsv, json and jsonl, also as .gz, and parquet; errors name the invalid line.

`datasets` reads these formats too, but its errors do not say which line is invalid.
"""

import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from petl.data.base import RawData
from petl.data.delimited import FOUND, Written, lines_of, read_delimited, refuse_repeated
from petl.data.faulty_rows import described
from petl.data.tabular import Tabular
from petl.data.task_columns import TaskColumns
from petl.data.validation import (
    FOLDER,
    Choose,
    FaultyRow,
    LazySourceRows,
    Row,
    SourceRows,
    Table,
    every,
    from_table,
    nested,
    placed,
    with_paths,
)
from petl.errors import InputError, first_line, shown
from petl.system.files.paths import file_of, path_of
from petl.system.files.read import parse_json
from petl.system.values import Rule, field

BATCH = 1000  # rows of a parquet file in memory at a time; assumption: small next to a model
CHECKED = 100_000  # rows after which the memory is looked at again
FIRST = 100  # rows of JSON that tell whether a file has the columns of the task
SMALL = 2**21  # bytes of files that are read before torch is imported; assumption: 0.2 s
MIN_FREE = 0.02  # fraction of the memory that rows must leave free; assumption
logger = logging.getLogger(__name__)


def is_encoding(name: str) -> bool:
    """True if Python knows an encoding of text by this name."""
    try:
        "".encode(name)
    except LookupError:
        return False
    return True


HEADER = Rule("a list of distinct names", lambda names: 0 < len(names) == len({*names}))
ENCODING = Rule("the name of an encoding, such as utf-8, cp1252 or utf-16", is_encoding)


@dataclass(kw_only=True)
class Files(Tabular):
    """Rows of local files; those of several files are read one after the other."""

    train: object  # a file, or a list of files
    test: object = None  # likewise; None: test_share of the training rows is held out
    encoding: str | None = field(None, ENCODING)  # of text; None: recognized
    # names of the columns of csv and tsv files without a line of them
    header: list[str] | None = field(None, HEADER)

    @property
    def written(self) -> Written:
        """What the settings say of text."""
        return Written(self.encoding, self.header)

    def given(self) -> Iterator[tuple[str, str, str]]:
        """Yield setting, name and suffix of each file.

        Raises:
            InputError: it is not there, or its format is not supported.
        """
        for setting, value in (("data.train", self.train), ("data.test", self.test)):
            for name in file_names(setting, value) if value else ():
                yield setting, name, suffix_of(data_file(setting, name))

    def check(self) -> None:
        """Raise InputError unless all files exist and have a supported format."""
        list(self.given())

    def check_columns(self, columns: TaskColumns | None = None) -> None:
        """Raise InputError unless a row of each file has the columns of the task, or these."""
        choose = (columns or self.task_columns).choose
        for setting, name, suffix in self.given():
            # a list in JSON is read as a whole, which may take long
            if suffix != ".json":
                rows = iterate_rows(setting, name, choose, self.written)[1]
                # faults of the first rows are told with all others
                next(
                    (row for _, row in islice(rows, FIRST) if not isinstance(row, ValueError)), None
                )

    def check_rows(self) -> None:
        """Raise InputError if rows of small files have faults, or do not suit the task."""
        names = file_names("data.train", self.train)
        files = [*names, *(file_names("data.test", self.test) if self.test else ())]
        size = sum(Path(name).expanduser().stat().st_size for name in files)
        # images are read once, with the task
        if size > SMALL or self.streaming or self.task_columns.reads_images:
            return
        self.checked(*self.loaded(names))

    def loaded(self, names: Sequence[str]) -> tuple[SourceRows, SourceRows | None]:
        """Read the training files, of these names, and the test files, if there are any."""
        train = read_rows("data.train", names, self.task_columns.choose, self.written)
        return train, self.test_file_rows(names)

    def read(self) -> RawData:
        """Read the files; with `streaming` the train rows are read later."""
        names = file_names("data.train", self.train)
        if self.streaming:
            rows = LazySourceRows(
                ", ".join(names),
                partial(located_rows, "data.train", names, written=self.written),
                self.train_rows,
                whole=partial(whole, names, self.written),
            )
            return self.stream(rows, self.test_file_rows(names))
        return self.assemble(*self.loaded(names))

    def test_file_rows(self, train: Sequence[str]) -> SourceRows | None:
        """Read the test files; None if `data.test` is not set."""
        if not self.test:
            return None
        names = file_names("data.test", self.test)
        test = read_rows("data.test", names, self.task_columns.choose, self.written)
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


def read_rows(
    setting: str, names: Sequence[str], choose: Choose, written: Written = FOUND
) -> SourceRows:
    """Read the columns that `choose` returns of all rows of the files into memory.

    Raises:
        InputError: a file is missing, empty or malformed (the message names the line), or lacks a
            column.
    """
    files, lines, numbers, values, unread = [], [], [], [], []

    def locate(position: int) -> str:
        place = next(place for start, place in reversed(files) if start <= position)
        return f"{place} {lines[position]}"

    for name in names:
        unit, rows = iterate_rows(setting, name, choose, written)
        files.append((len(lines), f"{name}, {unit}"))
        for line, row in rows:
            position = len(lines)
            lines.append(line)
            if isinstance(row, ValueError):
                unread.append(FaultyRow(position, locate(position), str(row)))
            else:
                numbers.append(position)
                values.append(row)
            if len(lines) % CHECKED == 0:  # a compressed file of kilobytes can have billions
                check_memory(f"{setting}={name}", len(lines))
    origin, all_columns = ", ".join(names), partial(whole, names, written)
    found = SourceRows(origin, numbers, values, locate, whole=all_columns, unread=unread)
    if not values:
        raise InputError(described(unread, found))
    return found


def located_rows(
    setting: str, names: Sequence[str], choose: Choose, written: Written = FOUND
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of files as they are read, each with its location for messages."""
    for name in names:
        unit, rows = iterate_rows(setting, name, choose, written)
        for number, row in rows:
            if isinstance(row, ValueError):
                raise InputError(placed(f"{name}, {unit} {number}", str(row)))
            yield f"{name}, {unit} {number}", row


def whole(names: Sequence[str], written: Written) -> Iterator[Row]:
    """Yield the rows of training files with all of their columns."""
    return (row for _, row in located_rows("data.train", names, every, written))


def check_memory(what: str, rows: int) -> None:
    """Raise InputError if the first `rows` rows of a file have filled the machine's memory."""
    memory = psutil.virtual_memory()
    if memory.available < MIN_FREE * memory.total:
        raise InputError(
            f"{what} fills the {memory.total / 1e9:,.0f} GB of memory of this machine after "
            f"{rows:,} rows: split it, or set data.streaming=true with data.test=FILE"
        )


def iterate_rows(
    setting: str, name: str, choose: Choose, written: Written = FOUND
) -> tuple[str, Table]:
    """Open a file: the unit that numbers its rows ("line", "item", "row"), and an iterator of rows.

    Args:
        written: what settings say of text.

    Raises:
        InputError: as `read_rows`; errors inside the file are raised while iterating.
    """
    path = data_file(setting, name)
    unit, reader = READERS[suffix_of(path)]
    if written.header is not None and suffix_of(path) not in TABLES:
        raise InputError(
            f"data.header={written.header} is for {' and '.join(TABLES)} files, which "
            f"{setting}={name} is not: leave it out"
        )
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
                for number, row in reader(path, columns, written):
                    has_more = more and not isinstance(row, ValueError)
                    yield number, {**row, **more} if has_more else row
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


def read_json(path: Path, choose: Choose, written: Written = FOUND) -> Table:
    """Rows of a JSON file that holds one list of objects, numbered from 1."""
    with lines_of(path, "\n", written.encoding) as lines:
        text = lines.read()
    try:
        content = parse_json(text)
    except ValueError as error:
        hint = "; a file with one object per line is .jsonl" if "Extra data" in str(error) else ""
        raise InputError(f"{path}: {error}{hint}") from error
    # such as {"version": ..., "data": [...]}
    inner = content if isinstance(content, dict) else {}
    lists = {key: value for key, value in inner.items() if isinstance(value, list)}
    if len(lists) == 1:
        ((key, content),) = lists.items()
        logger.info("%s: its rows are the list %r", path, key)
    if not isinstance(content, list):
        several = f" but {len(lists)}: {', '.join(lists)}" if lists else ""
        raise InputError(f"{path} holds {shown(content)}, not a list of objects{several}")
    yield from selected(enumerate(content, start=1), choose, f"{path}, item")


def read_jsonl(path: Path, choose: Choose, written: Written = FOUND) -> Table:
    """Rows of a JSON Lines file, numbered by line; empty lines are skipped.

    Raises:
        InputError: it begins with a list of objects.
    """

    def parsed() -> Iterator[tuple[int, object]]:
        is_first = True
        for line, content in enumerate(lines, start=1):
            if not content.strip():
                continue
            if is_first and re.match(r"\s*\[\s*(\{|$)", content):
                raise InputError(
                    f"{path} is one list, not an object per line: name it .json, as "
                    f"{path.name.replace('.jsonl', '.json')}"
                )
            is_first = False
            try:
                yield line, parse_json(content)
            except ValueError as error:
                yield line, error

    # newline: a JSON string may contain other characters that Unicode counts as line ends
    with lines_of(path, "\n", written.encoding) as lines:
        yield from selected(parsed(), choose, f"{path}, line")


def selected(rows: Iterable[tuple[int, object]], choose: Choose, origin: str) -> Table:
    """The values of JSON objects that `choose` returns the names of.

    Raises:
        InputError: the first `FIRST` rows all lack a column: the file has other columns.
    """
    first, errors, found = None, 0, False
    for number, row in rows:
        place = f"{origin} {number}"
        if isinstance(row, dict):
            try:
                columns = choose(with_paths(row, row), place)
                kept = {name: row[name] if name in row else nested(row, name) for name in columns}
            except InputError as error:
                first, errors = first or error, errors + 1
                if not found and errors == FIRST:
                    raise first from error
                kept = ValueError(str(error).removeprefix(place).lstrip(": "))
            found = found or isinstance(kept, dict)
            yield number, kept
        else:
            is_read = not isinstance(row, ValueError)
            yield number, ValueError(f"{shown(row)} is not an object") if is_read else row
    if first is not None and not found:
        raise first


def read_parquet(path: Path, choose: Choose, written: Written = FOUND) -> Table:
    """Rows of a parquet file, numbered from 1."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            top = file.schema_arrow.names
            columns = choose([*top, *paths_of(file.schema_arrow)], str(path))
            refuse_repeated(columns, top, path)
            # only the columns that the task reads are decompressed
            for batch in file.iter_batches(BATCH, columns=columns):
                for row in map(from_table, batch.to_pylist()):
                    number += 1
                    found = {n: row[n] if n in row else nested(row, n) for n in columns}
                    yield number, found
    except InputError:
        raise
    except (pa.ArrowException, ValueError, OverflowError) as error:  # the latter two of values
        raise InputError(
            f"{path} cannot be read as parquet: after row {number}: {first_line(error)}"
        ) from error


def paths_of(fields: Iterable[pa.Field], before: str = "") -> list[str]:
    """The paths with dots of what is in structs of a table."""
    paths = []
    for each in fields:
        if before:
            paths.append(f"{before}{each.name}")
        if pa.types.is_struct(each.type):
            paths += paths_of(each.type, f"{before}{each.name}.")
    return paths


Reader = Callable[[Path, Choose, Written], Table]
READERS: dict[str, tuple[str, Reader]] = {
    ".csv": ("line", partial(read_delimited, delimiter=",")),
    ".tsv": ("line", partial(read_delimited, delimiter="\t")),
    ".json": ("item", read_json),
    ".jsonl": ("line", read_jsonl),
    ".parquet": ("row", read_parquet),
}
TABLES = (".csv", ".tsv")  # also with .gz
COMPRESSIBLE = (".csv", ".tsv", ".json", ".jsonl")  # parquet compresses by itself
