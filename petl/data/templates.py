r"""Texts of one or several columns: a setting that names a column, or a template with `{column}`.

In a template `{{` and `}}` are braces, `\n` is a line break, `\t` a tab and `\\` a backslash.
"""

import re
from collections.abc import Callable
from typing import TypeVar

from petl.data.validation import Row, read
from petl.errors import InputError, shown

T = TypeVar("T")
# in this order: doubled braces before a column, and a single brace, an error, last
PART = re.compile(r"(?P<twice>\{\{|\}\})|\{(?P<column>[^{}]+)\}|\\(?P<escaped>[nt\\])|[{}]")
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def is_template(value: str) -> bool:
    """Return True if a setting is a template, not the name of a column."""
    # so a column whose own name contains { cannot be named
    return "{" in value


def reads_columns(value: str) -> bool:
    """Return True if a text that is filled reads columns."""
    return any(part["column"] for part in PART.finditer(value))


def check_template(setting: str, value: str | None) -> None:
    """Raise InputError unless the setting is null, a column or a template with a column."""
    if value is None or not is_template(value):
        return
    check_braces(setting, value)
    if not columns_of(value):
        raise InputError(
            f"{setting}={value} names no column: write {{name}} where its text belongs"
        )


def check_braces(setting: str, value: str) -> None:
    """Raise InputError if a text that is filled has a single brace."""
    if any(part.group() in ("{", "}") for part in PART.finditer(value)):
        raise InputError(
            f"{setting}={value} has a single brace: columns are {{name}}, braces {{{{ and }}}}"
        )


def columns_of(value: str) -> list[str]:
    """The columns that a setting reads: those of a template, else the one that it names."""
    if not is_template(value):
        return [value]
    return [part["column"] for part in PART.finditer(value) if part["column"]]


def read_text(row: Row, value: str, parse: Callable[[object], T]) -> T:
    """Apply `parse` to what a setting makes of a row: a column's value or a filled template.

    Raises:
        ValueError: the text is not valid; the message begins with the columns.
    """
    if not is_template(value):
        return read(row, value, parse)
    columns = columns_of(value)
    try:
        # parsed after filling: a text of empty columns is refused as an empty column is
        return parse(fill(value, row))
    except ValueError as error:
        raise ValueError(f"{', '.join(columns)} in {shown(value)} {error}") from error


def fill(template: str, row: Row) -> str:
    """Fill a template; a missing value is empty, as it is in a csv file.

    Raises:
        ValueError: a value is neither text nor a number.
    """

    def filled(part: re.Match[str]) -> str:
        if part["twice"]:
            # "{{" stands for "{"
            return part["twice"][0]
        return ESCAPES[part["escaped"]] if part["escaped"] else as_text(part["column"], row)

    return PART.sub(filled, template)


def as_text(column: str, row: Row) -> str:
    """A value of a row as part of a text."""
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"has {shown(value)} in {column}, not text")
