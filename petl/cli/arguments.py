"""What texts of a command line mean: types for `add_argument(type=...)`.

A wrong value ends the command before any work, and before torch is imported. Folders of runs and
files are looked up here for all commands that take one.
"""

import argparse
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from petl.errors import InputError, did_you_mean
from petl.system.files.disk import check_bounds
from petl.system.files.outputs import check_output, check_output_file
from petl.system.files.paths import file_of, path_of
from petl.system.values import LARGEST, Rule, convert, integer, real, type_problem
from petl.training.runs.lookup import (
    adapter_at,
    embedder_at,
    folder_at,
    model_at,
    run_at,
    writer_at,
)

Number = TypeVar("Number", int, float)
Checked = TypeVar("Checked")
# as in petl.efficiency.drafting, which imports torch
DRAFTERS = ("auto", "none", "aggressive", "free", "lookup", "recycling")
UNITS = {"": 1, "kb": 1000, "mb": 10**6, "gb": 10**9}


def number(
    kind: type[Number], low: float, high: float = math.inf, *, above: bool = False
) -> Callable[[str], Number]:
    """Return a type for numbers from `low` (with `above`: greater than it) to `high`."""
    whole = integer(int(low), int(min(high, LARGEST)))
    return by_rule(kind, whole if kind is int else real(low, high, above=above))


def by_rule(kind: type[Number], rule: Rule) -> Callable[[str], Number]:
    """Return a type for numbers for which a rule holds."""

    def parse(text: str) -> Number:
        value = convert(text, kind)
        if type_problem(value, kind) or not rule.holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule.words}")
        return value

    return parse


SEED = number(int, 0, 2**32 - 1)  # what numpy's generator takes, which `set_seed` seeds as well
COUNT = number(int, 1, 10**9)
POSITIVE = number(float, 0, above=True)
FRACTION = number(float, 0, 1)


def each(parse: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """Return a type for such values separated by commas: at least one, none of them twice."""

    def parse_all(text: str) -> list[Number]:
        values = [parse(word) for word in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} has a value twice")
        return values

    return parse_all


def some_of(options: Collection[str]) -> Callable[[str], list[str]]:
    """Return a type for names among `options`, separated by commas, at least one."""

    def parse(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]  # a comma may be the last character
        unknown = next((word for word in words if word not in options), None)
        if unknown is not None or not words:
            given = unknown or text
            raise argparse.ArgumentTypeError(f"no {given!r}{did_you_mean(given, options)}")
        return words

    return parse


def strength(text: str) -> tuple[str, float]:
    """Parse a strength to choose: a number, or limit=NUMBER."""
    kind, mark, value = text.partition("=")
    if mark and kind != "limit":
        raise argparse.ArgumentTypeError(f"{text} is neither a strength nor limit=NUMBER")
    parse = number(float, 0)
    return ("limit" if mark else "strength", parse(value if mark else text))


def alphas(text: str) -> list[float | str]:
    """Return numbers above 0, and fit, of a text with commas in between."""
    return [part if part == "fit" else POSITIVE(part) for part in text.split(",")]


def layers(text: str) -> str | list[int]:
    """Return the name of some layers, or numbers of a text with commas in between."""
    return text if text in ("second_half", "all") else each(number(int, 0))(text)


def weights(text: str) -> list[float]:
    """Return numbers of a text with commas in between; a negative one subtracts an adapter."""
    return [number(float, -1e6, 1e6)(part) for part in text.split(",")]


def divisor(text: str) -> float | str:
    """Return a fraction, or the name of a way to find one."""
    return text if text in ("auto", "dare", "searched") else FRACTION(text)


def some_text(text: str) -> str:
    """Return a text that says something."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} has no words: give a text to search for")
    try:
        check_bounds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def saved_run(text: str) -> str:
    """Return the path of the folder of a run."""
    return _found(run_at, text)


def saved_adapter(text: str) -> str:
    """Return the path of the folder of a run with an adapter, or of an adapter."""
    return _found(adapter_at, text)


def saved_model(text: str) -> str:
    """Return the path of the folder of a run, an adapter, a model or a drafter."""
    return _found(model_at, text)


def embedder(text: str) -> str:
    """Return the path of such a folder, unless its adapter has learned another task."""
    return _found(embedder_at, text)


def writer(text: str) -> str:
    """Return the path of such a folder, unless its adapter is of a kind that writes no text."""
    return _found(writer_at, text)


def named_run(text: str) -> tuple[str, str]:
    """Return the name and the folder of NAME=RUN."""
    name, separator, path = text.partition("=")  # a path may contain =, a name does not
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RUN")
    return name, saved_adapter(path)


def served_run(text: str) -> str:
    """Return [NAME=]RUN, whose folder exists."""
    _, separator, path = text.partition("=")
    # a folder may have = in its name
    saved_model(text if not separator or Path(text).exists() else path)
    return text


def repository_or_folder(text: str) -> str:
    """Return a name on the Hub, OWNER/NAME, or the path of an existing folder."""
    # a folder of this form is looked up first, and the Hub asked if there is none
    return text if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) else _found(folder_at, text)


def existing(text: str) -> str:
    """Return the path of an existing file or folder, or - for standard input."""
    _or_message(lambda: text == "-" or Path(text).is_dir() or file_to_read(text))
    return text


def table(text: str) -> str:
    """Return the path of an existing file of rows, in a format that petl reads."""
    from petl.data.files import data_file  # with pyarrow, for the commands that read rows

    _or_message(lambda: data_file("FILE", text))
    return text


def table_or_folder(text: str) -> str:
    """Return the path of an existing file of rows, or of a folder of texts."""
    return text if Path(text).is_dir() else table(text)


def drafter(text: str) -> str:
    """Return the name of a drafter that needs no training, or the path of an existing folder."""
    if text not in DRAFTERS and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither the folder of a drafter nor the name of one"
            f"{did_you_mean(text, DRAFTERS)}"
        )
    return text


def file_or_setting(text: str) -> str:
    """Return a setting such as data.text=NAME, or the path of an existing file or folder."""
    return text if text.startswith("data.") and "=" in text else existing(text)


def byte_count(text: str) -> int:
    """Return a number of bytes, of a text such as 100000, 100KB or 1.5MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]b|)", text.strip().lower())
    value = float(found[1]) * UNITS[found[2]] if found else 0
    if not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 100KB or 1.5MB")
    return int(value)


def file_to_read(text: str) -> Path:
    """Return the path of an existing file."""
    return _or_message(lambda: file_of("FILE", text, [Path(text).suffix]))


def file_to_write(text: str) -> Path:
    """Return the path of a file that can be written, before the work whose result it gets."""
    path = _or_message(lambda: path_of("the file", text))
    _or_message(lambda: check_output_file(path))
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text!r} is no file that can be written")
    _try_to_write(text, path.absolute().parent)
    return path


def folder_to_write(text: str) -> Path:
    """Return the path of a folder that can be written or made."""
    path = _or_message(lambda: path_of("the folder", text))
    # the nearest folder that exists; the others are created later
    _try_to_write(text, next(p for p in (path.absolute(), *path.absolute().parents) if p.exists()))
    return path


def new_folder_to_write(
    own: Collection[str] = (), mark: Collection[str] = ()
) -> Callable[[str], Path]:
    """Return a type for a folder that a command may write; arguments as of `check_output`."""

    def parse(text: str) -> Path:
        path = folder_to_write(text)
        _or_message(lambda: check_output(path, own, mark))
        return path

    return parse


def _found(find: Callable[[str], Path], text: str) -> str:
    _or_message(lambda: find(text))
    return text


def _or_message(check: Callable[[], Checked]) -> Checked:
    try:
        return check()
    except InputError as error:
        # argparse shows the message of this class, but not that of a ValueError
        raise argparse.ArgumentTypeError(str(error)) from error


def _try_to_write(text: str, folder: Path) -> None:
    try:
        # tried, since permissions do not tell of a read-only file system or a quota
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = str(error.strerror).lower()
        raise argparse.ArgumentTypeError(f"{text!r}: cannot write to {folder}: {reason}") from error
