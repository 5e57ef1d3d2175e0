"""Bound the time of regular expressions that come with an adapter.

Python's `re` tries all ways to match: `(a+)+b` takes twice the time for each further letter of a
name, and nothing interrupts it. PEFT matches the patterns of a config against the names of all
modules, so those of a stranger's file are tried in another process first, which can be stopped.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from petl.errors import InputError, shown

if TYPE_CHECKING:
    from peft import PeftConfig  # `petl check` needs none of its packages

SECONDS = 5.0  # assumption: thousands of names take some milliseconds
MAX_LENGTH = 10_000  # of a pattern; the longest in use have some hundred letters
# what PEFT makes of a pattern, matched against a complete name
PATH, KEY = "%s", r"(.*\.)?(%s)"
FORMS = {
    "target_modules": PATH,
    "exclude_modules": PATH,
    "feedforward_modules": PATH,
    "modules_to_save": r"(^|.*\.)%s($|\..*)",
    "layers_pattern": r"(?:^|.*?\.)%s\.(?P<idx>\d+)\..*",
    "exclude_params": ".*%s.*",
    "rank_pattern": KEY,
    "alpha_pattern": KEY,
    "lambda_pattern": KEY,
    "block_size_pattern": KEY,
    "n_frequency_pattern": KEY,
}
# these may take exponential time: repetition of a group, also where spaces may stand before it
# (verbose mode), and references to one
RISKY = re.compile(r"\)[*+{]|\(\?[a-zA-Z]*x|\\[1-9]|\(\?P=")
MAX_WAYS = 14  # to match a name: their base-2 logarithm
MATCH = (
    "import json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n"
    "    for name in names:\n"
    "        re.fullmatch(pattern, name)\n"
)


def patterns_of(config: "PeftConfig") -> Iterator[tuple[str, str]]:
    """Yield the patterns of a config, each with its field."""
    for field, form in FORMS.items():
        value = getattr(config, field, None) or ()
        if isinstance(value, str):
            yield field, value
        elif form is not PATH:  # a list of these holds names
            yield from ((field, pattern) for pattern in value)


def ways(pattern: str) -> int:
    """Return the base-2 logarithm of about the number of ways to match a name, without `RISKY`."""
    # a repetition ends at any of some 64 letters; a choice has two ways
    return 6 * len(re.findall(r"[*+{]", pattern)) + len(re.findall(r"[?|]", pattern))


def check_patterns(config: Any, names: Iterable[str]) -> None:
    """Raise InputError if a regular expression of a config is invalid, or takes too long.

    Args:
        config: of an adapter that was made elsewhere.
        names: those of the modules to match.
    """
    if risky := risky_patterns(config):
        _match_in_time(risky, list(names))


def risky_patterns(config: Any) -> dict[str, str]:
    """Return the expressions that may take long to match, each with how a message names it.

    Raises:
        InputError: one is invalid, or too long to be read.
    """
    risky = {}
    for field, pattern in patterns_of(config):
        if len(pattern) > MAX_LENGTH:
            raise InputError(
                f"{field} has a pattern of {len(pattern)} characters; at most {MAX_LENGTH} are read"
            )
        expression = FORMS[field] % pattern
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{field}={shown(pattern)} is not a regular expression: {error}"
            ) from error
        # the rule is a plain name, which takes no time whatever the form
        many = ways(pattern) > 0 and ways(expression) > MAX_WAYS
        if many or RISKY.search(expression):
            risky[expression] = f"{field}={shown(pattern)}"
    return risky


def _match_in_time(patterns: Mapping[str, str], names: list[str]) -> None:
    """Match expressions, each with how a message names it, in another process."""
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
        which = next(iter(patterns.values())) if len(patterns) == 1 else f"{len(patterns)} patterns"
        raise InputError(
            f"{which} took more than {SECONDS:.0f} s to match the names of {len(names)} modules; "
            "list the names of the modules instead"
        ) from error
