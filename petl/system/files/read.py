"""Read JSON, JSON Lines and YAML files that may be damaged, or come from a stranger.

A file is plain data: nothing is resolved (`${oc.env:HOME}` stays text), no object is constructed.
It is a regular file in UTF-8 of bounded size and depth, and each key of a mapping is given once.
Anything else is an `InputError` of one line that names the file, the reason and, where a `shape` is
asked for, the field.

A shape is an annotation, as `petl.system.values.type_problem` takes it.
"""

import json
import os
import re
from ast import literal_eval
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from petl.errors import InputError, described
from petl.system.files.disk import MAX_DEPTH, TOO_DEEP, check_bounds, open_regular
from petl.system.values import type_problem

MAX_BYTES = 16 * 2**20  # of a JSON file; those of large runs have less than 1 MB
MAX_YAML_BYTES = 2**19  # the slowest of this size take 4 s (measured)
MAX_LOG_BYTES = 256 * 2**20  # of a JSON Lines file, about a million lines of a log
BETWEEN = re.compile(r"""(['"])\s+(?=['"])""")  # two texts of an array
MAX_DIGITS = 70  # that 64 bits have in any notation, in binary with a sign and a prefix


# Files


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Return the text of a regular file.

    Raises:
        InputError: there is no such file, it is no regular file, has more than `limit` bytes, or is
            not UTF-8.
    """
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as opened:
            content = opened.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"{path} cannot be read: it has more than {limit:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} cannot be read: byte {error.start} ({content[error.start]:#04x}) is not UTF-8"
        ) from error


def read_json(path: Path, shape: object = Any) -> Any:
    """Return the content of a JSON file.

    Raises:
        InputError: it cannot be read, is not JSON, or does not have this shape.
    """
    text = read_text(path)
    try:
        return with_shape(parse_json(text), shape)
    except ValueError as error:
        raise InputError(f"{path} cannot be used: {error}") from error


def read_json_lines(path: Path, shape: object = Any) -> list[Any]:
    """Return the values in a JSON Lines file, one for each line.

    A last line that is incomplete, because the process that wrote it was killed, is left out.

    Raises:
        InputError: the file cannot be read, or a line is not JSON or does not have this shape.
    """
    *lines, rest = read_text(path, MAX_LOG_BYTES).split("\n")
    values = []
    for number, line in enumerate([*lines, rest] if is_json(rest) else lines, start=1):
        try:
            values.append(with_shape(parse_json(line), shape))
        except ValueError as error:
            raise InputError(f"{path}, line {number}, cannot be used: {error}") from error
    return values


def iterate_json_lines(path: Path, shape: object = Any) -> Iterator[Any]:
    """Yield the values in a complete JSON Lines file of any size, one for each line.

    Raises:
        InputError: as `read_json_lines`; a line has more than `MAX_BYTES`.
    """
    number = 0
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as opened:
            while content := opened.readline(MAX_BYTES + 1):
                number += 1
                if len(content) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
                yield with_shape(parse_json(content.decode()), shape)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # also of a byte that is not UTF-8
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}, line {number}, cannot be used: {error}") from error


def read_yaml(path: Path, shape: object = Any) -> Any:
    """Return the content of a YAML file.

    Raises:
        InputError: it cannot be read, is not YAML, has aliases or tags, or does not have this
            shape.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        return with_shape(parse_yaml(text), shape)
    except ValueError as error:
        raise InputError(f"{path} cannot be used: {error}") from error


# Texts


def parse_json(text: str) -> Any:
    """Parse JSON; unlike `json.loads`, refuse repeated keys, deep nesting and huge integers.

    Raises:
        ValueError: the reason, in one line.
    """
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        raise ValueError(f"it is not JSON ({line}column {error.colno}: {error.msg})") from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    check_bounds(value)
    return value


def parse_list(text: str) -> list[object] | None:
    """The values of a list that stands in a cell, as JSON or Python writes it; None: it is none.

    `DataFrame.to_csv` of pandas writes lists as Python does, and arrays with spaces as NumPy does.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    # Python would join the texts of an array, ['a' 'b']
    for parse, written in ((parse_json, text), (literal_eval, BETWEEN.sub(r"\1, ", text))):
        try:
            found = parse(written)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue  # of the other form, or a text in brackets
        if isinstance(found, list):
            return found
    return None


def _short(digits: str) -> str:
    """Return the digits of an integer; many of them would take long to convert."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits):,} digits")
    return digits


def is_json(text: str) -> bool:
    """Return True if a text can be parsed as JSON."""
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a mapping of the entries of a JSON object."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise _given_twice(key for key, _ in pairs)
    return mapping


def _given_twice(keys: Iterable[str]) -> ValueError:
    # a count for each key in turn would take hours for a file of a million keys
    return ValueError(f"{described(Counter(keys).most_common(1)[0][0])} is given twice")


# json.loads would make one for each line of a file
_decoder = json.JSONDecoder(object_pairs_hook=_mapping, parse_int=lambda x: int(_short(x)))


# the C parser is 10 times as fast; it belongs to the wheels of PyYAML, and may lack in others
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictYaml(_SafeLoader):
    """A YAML loader of plain data that refuses repeated keys.

    Numbers are those of JSON's syntax and of OmegaConf's files: `1e-3` is a float, dates are text.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _short(node.value)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise _given_twice(str(key.value) for key, _ in node.value)
        return mapping


_StrictYaml.add_constructor("tag:yaml.org,2002:int", _StrictYaml.construct_yaml_int)
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "int": r"[-+]?(?:0b[01_]+|0[0-7_]*|[1-9][\d_]*|0x[\da-fA-F_]+)",
    "float": r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}.items():
    # first characters None: tried for every scalar
    _StrictYaml.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), None
    )


def parse_yaml(text: str) -> object:
    """Parse YAML as plain data.

    Raises:
        ValueError: the reason, in one line.
    """
    try:
        depth = 0
        for event in yaml.parse(text, _SafeLoader):  # before an object is made
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has the alias *{event.anchor}, which is not supported")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"it has the tag {event.tag}, which is not supported")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(TOO_DEEP)
        value = _StrictYaml(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"it is not YAML ({where}{error.problem})") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"it is not YAML ({' '.join(str(error).split())})") from error
    check_bounds(value)
    return value


# Shapes


def with_shape(value: object, shape: object) -> Any:
    """Return a value that has a shape.

    Raises:
        ValueError: it has another; the message names the field.
    """
    problem = type_problem(value, shape)
    if problem:
        raise ValueError(problem)
    return value
