"""Bound the time of regular expressions that come with an adapter.

Python's `re` tries all ways to match: `(a+)+b` takes twice the time for each further letter of a
name, and nothing interrupts it. PEFT matches the patterns of a config against the names of all
modules, so those of a stranger's file are tried in another process first, which can be stopped.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from petl.errors import InputError, shown

SECONDS = 5.0  # assumption: thousands of names take some milliseconds
MAX_LENGTH = 10_000  # of a pattern; the longest in use have some hundred letters
FIELDS = ("target_modules", "exclude_modules", "layers_pattern", "exclude_params")
# repetition of a group, and references to one: these may take exponential time
RISKY = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=")
MATCH = (
    "import json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n"
    "    for name in names:\n"
    "        re.fullmatch(pattern, name)\n"
)


def patterns_of(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the regular expressions of a config, each with its field, as PEFT matches them."""
    for field in FIELDS:
        value = getattr(config, field, None)
        # a list of targets holds names; other lists hold patterns
        is_names = field in ("target_modules", "exclude_modules") and not isinstance(value, str)
        for pattern in () if is_names or value is None else _as_list(value):
            yield (
                field,
                f".*{pattern}.*" if field in ("layers_pattern", "exclude_params") else pattern,
            )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or ():
            yield field, rf"(.*\.)?({pattern})"


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def check_patterns(config: Any, names: Iterable[str]) -> None:
    """Raise InputError if a regular expression of a config is invalid, or takes too long.

    Args:
        config: of an adapter that was made elsewhere.
        names: those of the modules to match.
    """
    risky = {}
    for field, pattern in patterns_of(config):
        if len(pattern) > MAX_LENGTH:
            raise InputError(
                f"{field} has a pattern of {len(pattern)} characters; at most {MAX_LENGTH} are read"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{field}={shown(pattern)} is not a regular expression: {error}"
            ) from error
        # two repetitions take at most the cube of a name's length
        if RISKY.search(pattern.removeprefix(r"(.*\.)?")) or len(re.findall(r"[*+{]", pattern)) > 2:
            risky[pattern] = field
    if risky:
        _match_in_time(risky, list(names))


def _match_in_time(patterns: dict[str, str], names: list[str]) -> None:
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCH],
            input=json.dumps([list(patterns), names]),
            text=True,
            check=True,
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        pattern, field = next(iter(patterns.items()))
        which = f"{field}={shown(pattern)}" if len(patterns) == 1 else f"{len(patterns)} patterns"
        raise InputError(
            f"{which} took more than {SECONDS:.0f} s to match the names of {len(names)} modules; "
            "list the names of the modules instead"
        ) from error
