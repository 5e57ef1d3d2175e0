"""Tables in text: encoding, delimiter and quotes of csv and tsv files are recognized, and said.

What is recognized stands in the first `SAMPLE` bytes. A file is UTF-8 unless it is seen to be
something else; the delimiter is the usual one of its suffix unless its header has another. A row
with malformed quotes is a fault of one line: the lines after it are read for themselves.
"""

import codecs
import csv
import gzip
import logging
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader, StringIO, TextIOWrapper
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from petl.data.validation import Choose, Table
from petl.errors import InputError, shown

SAMPLE = 2**18  # assumption: what is unusual about a file shows in its first bytes
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SEPARATOR = re.compile(r"sep=([,;\t|])\r?\n")  # a first line that Excel reads, no header
WESTERN = "cp1252"  # what Windows and older spreadsheets write in Western Europe and America
logger = logging.getLogger(__name__)


class Written(NamedTuple):
    """What settings say of a file of text; None: it is recognized, or in its first line."""

    encoding: str | None = None
    header: Sequence[str] | None = None  # names of the columns of a table without them


FOUND = Written()


class FileLines(Iterator[str]):
    """The lines of a file, in parts: one can be read again without its first line.

    Attributes:
        number: of the next line, from 1.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.number = 1
        self._lines, self._part, self._again = iter(lines), list[str](), list[str]()

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self.number += 1
        self._part.append(line)
        return line

    def begin(self) -> int:
        """Begin a part; return the number of its first line."""
        self._part = []
        return self.number

    def back(self) -> None:
        """Go back to the second line of the part."""
        self._again += reversed(self._part[1:])
        self.number -= len(self._part) - 1


@dataclass(frozen=True)
class Quotes:
    """How a field that has the delimiter or a line end is written."""

    char: str = '"'
    escape: str | None = None  # before a quote in a quoted field; None: the quote is doubled
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
    said: str = ""

    def reader(self, lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
        """A reader of fields; malformed quotes are errors."""
        doubled = self.escape is None
        return csv.reader(
            lines, delimiter=delimiter, strict=True, quotechar=self.char,
            doublequote=doubled, escapechar=self.escape, quoting=self.quoting,
        )  # fmt: skip


QUOTES = (
    Quotes(),
    Quotes(escape="\\", said="quotes in quoted fields have a backslash before them"),
    Quotes(quoting=csv.QUOTE_NONE, said="quotes are part of the texts"),
)
SINGLE = Quotes("'", said="fields are in single quotes")
MOST = 0.9  # of the lines have a field in single quotes; assumption: others have a fault


def opened(path: Path) -> gzip.GzipFile | BufferedReader:
    """Open a file, which may be compressed, to read its bytes."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def encoding_of(path: Path) -> str:
    """The encoding of a file, which is said if it is not UTF-8."""
    with opened(path) as content:
        sample = content.read(SAMPLE)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        logger.info("%s is read as UTF-16", path)
        return "utf-16"
    try:
        # final=False: the sample may end within a character
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError as error:
        if is_mostly_utf8(sample):
            raise not_decoded(path, "utf-8-sig") from error
        start = max(sample.rfind(b" ", 0, error.start), sample.rfind(b"\n", 0, error.start)) + 1
        word = sample[start : error.end + 20].decode(WESTERN, "replace").split()[0]
        logger.info(
            "%s is not UTF-8: it is read as Windows-1252, by which line %d has %s; data.encoding "
            "names another encoding",
            path,
            sample.count(b"\n", 0, error.start) + 1,
            shown(word),
        )
        return WESTERN
    # Excel writes a byte order mark, which would be part of the first column name
    return "utf-8-sig"


def is_mostly_utf8(sample: bytes) -> bool:
    """True for UTF-8 with single bytes that are not: of other encodings hardly a byte is valid."""
    text = sample.decode("utf-8", "surrogateescape")
    wrong = sum("\udc80" <= letter <= "\udcff" for letter in text)
    return sum(letter > "\x7f" for letter in text) > 2 * wrong


@contextmanager
def lines_of(path: Path, newline: str, encoding: str | None = None) -> Generator[TextIO]:
    """Open a file for reading by line, without its byte order mark.

    Args:
        encoding: None: that of `encoding_of`.

    Raises:
        InputError: a byte is not of the encoding; the message names its line.
    """
    encoding = encoding or encoding_of(path)
    try:
        with opened(path) as content:
            yield TextIOWrapper(content, encoding=encoding, newline=newline)
    except UnicodeError as error:  # its position counts from a buffer, not from the file
        raise not_decoded(path, encoding) from error


def not_decoded(path: Path, encoding: str) -> InputError:
    """The error for a file that is not of its encoding, with the first such line."""
    name = "UTF-8" if encoding == "utf-8-sig" else encoding
    way_out = "save the file as UTF-8, or name its encoding: data.encoding=cp1252"
    with opened(path) as lines:
        # the lines of other encodings are no lines of bytes
        for number, line in enumerate(lines if "16" not in encoding else (), start=1):
            try:
                line.decode(encoding)
            except UnicodeError as error:
                at = getattr(error, "start", 0)
                byte = f"byte {line[at]:#04x}"
                return InputError(f"{path}, line {number}: {byte} is not {name}; {way_out}")
    return InputError(f"{path} is not {name}; {way_out}")


def read_delimited(
    path: Path, choose: Choose, written: Written = FOUND, *, delimiter: str
) -> Table:
    """Rows of a csv or tsv file, numbered by the line they begin on.

    Args:
        delimiter: the usual one of such files.
    """
    with lines_of(path, "", written.encoding) as file:
        sample = file.read(SAMPLE)
        is_whole = not file.read(1)
        file.seek(0)
        lines, header = FileLines(file), written.header
        named = SEPARATOR.match(sample)
        if named:
            delimiter, sample = named[1], sample[named.end() :]
            next(lines)
        delimiter, columns = delimiter_of(path, sample, choose, delimiter, written.header)
        reader = quotes_of(path, sample, delimiter, is_whole=is_whole).reader(lines, delimiter)
        while True:
            line = lines.begin()  # a quoted field may span several lines
            try:
                fields = next_of_any_size(reader)
            # the module begins another row with the next call
            except csv.Error as error:
                # a quote that is not closed takes lines that are rows of their own
                lines.back()
                yield line, ValueError(f"{error}; check its quotes")
                continue
            if fields is None:
                return
            if not fields:  # skip an empty line
                continue
            if header is None:
                header = names_of(fields)
                refuse_repeated(columns, header, path)
                continue
            is_given = written.header is not None
            # of one column, a row may well be its name
            if names_of(fields) == [*header] and (is_given or len(fields) > 1):
                more = ": leave data.header out" if is_given else ", once more"
                yield line, ValueError(f"the names of the columns{more}")
                continue
            if len(fields) != len(header):
                message = f"{len(fields)} in place of the {len(header)} fields of the header"
                yield line, ValueError(message)
                continue
            row = dict(zip(header, fields, strict=True))
            yield line, {column: row[column] for column in columns}


def names_of(fields: Sequence[str]) -> list[str]:
    """The names of a header."""
    # spaces after commas are common in hand-written headers
    return [re.sub("^'(.+)'$", r"\1", field.strip()) for field in fields]


def delimiter_of(
    path: Path, sample: str, choose: Choose, usual: str, header: Sequence[str] | None
) -> tuple[str, list[str]]:
    """The delimiter of a file, and the columns that `choose` returns of its header.

    It is the usual one unless the header lacks columns by it and has them by another.

    Args:
        header: None: the first line.

    Raises:
        InputError: it has them by none.
    """
    present = [each for each in DELIMITERS if each in header_line(sample)]
    order = sorted(present or [usual], key=lambda each: each != usual)
    refused = None
    for delimiter in order:
        try:
            rows = QUOTES[0].reader(StringIO(sample, newline=""), delimiter)
            first = next((row for row in rows if row), [])
            if header is not None and len(header) != len(first):
                named = f"data.header has {len(header)} names, and line 1 of {path}"
                raise InputError(f"{named} {len(first)} fields")
            columns = choose(header or names_of(first), str(path))
        except (InputError, csv.Error) as error:
            refused = refused or error
            continue
        if delimiter != usual:
            logger.info("%s is separated by %s", path, DELIMITERS[delimiter])
        return delimiter, columns
    if isinstance(refused, csv.Error):
        raise InputError(f"{path}, line 1: {refused}; check its quotes") from refused
    assert refused is not None, "there is at least the usual delimiter"
    fields = header_line(sample).split(order[0])
    if header is None and recurs(fields, sample, order[0]):
        names = ",".join(["NAME"] * len(fields))
        raise InputError(
            f"{refused}.\nLine 1 looks like a row: put one with the names of the columns before "
            f"it, or give them, data.header=[{names}]"
        ) from refused
    raise refused


def recurs(fields: Sequence[str], sample: str, delimiter: str) -> bool:
    """True if a field of the first line is a number, or is in its column again."""
    rows = [line.split(delimiter) for line in sample.splitlines()[1:]]
    same = (field in (row[i] for row in rows if i < len(row)) for i, field in enumerate(fields))
    return any(same) or any(re.fullmatch(r"-?[\d.]+", field) for field in fields)


def header_line(sample: str) -> str:
    """The first line of a file that is not empty."""
    return next((line for line in sample.splitlines() if line.strip()), "")


def quotes_of(path: Path, sample: str, delimiter: str, *, is_whole: bool) -> Quotes:
    """How fields are quoted: the first way of `QUOTES` by which all rows have equal fields.

    The first of them if none does, so that its errors name the lines.
    """
    if is_single_quoted(sample, delimiter):
        logger.info("%s: %s", path, SINGLE.said)
        return replace(SINGLE, escape="\\") if "\\'" in sample else SINGLE
    # quotes that are part of a text are usual in tsv files alone; in others one is missing
    escaped = QUOTES[1:2] if '\\"' in sample else ()
    possible = [QUOTES[0], *escaped, *(QUOTES[2:] if delimiter == "\t" else ())]
    for quotes in possible:
        if is_readable(sample, quotes, delimiter, is_whole=is_whole):
            if quotes.said:
                logger.info("%s: %s", path, quotes.said)
            return quotes
    return QUOTES[0]


def is_single_quoted(sample: str, delimiter: str) -> bool:
    """True if nearly each line but the first has a field in single quotes."""
    # apostrophes at both ends of a field, next to delimiters or the ends of the line
    end = re.escape(delimiter)
    field = re.compile(rf"(^|{end})'.*'($|{end})")
    lines = [line for line in sample.splitlines()[1:] if line.strip()]
    return len(lines) > 1 and sum(map(bool, map(field.search, lines))) > MOST * len(lines)


def is_readable(sample: str, quotes: Quotes, delimiter: str, *, is_whole: bool) -> bool:
    """True if no quote is malformed in a sample, and another way of quoting is one of its rows."""
    rows = FileLines(StringIO(sample, newline=""))
    reader = quotes.reader(rows, delimiter)
    widths: set[int] = set()
    try:
        while (fields := next_of_any_size(reader)) is not None:
            if fields:
                widths.add(len(fields))
            plain = quotes.quoting == csv.QUOTE_NONE
            if plain and any(len(f) > 1 and f[0] == f[-1] == '"' for f in fields):
                return False  # the quotes are not part of the texts
    except csv.Error:
        lines = sample.count("\n") + sample.count("\r")
        # the last row of a part of a file may end within quotes
        return not is_whole and rows.number > lines
    return quotes is QUOTES[0] or len(widths) == 1


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
