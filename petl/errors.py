"""Errors of the user's input, and text of strangers in messages and markdown.

Entry points show an `InputError` as one message and exit with status 2; any other exception is a
bug of petl and keeps its traceback.
"""

import html
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")
LONGEST_WORD = 400  # characters of a value in a message; above that of any usual path
EXCERPT = 40  # characters of a value in a message about a file
NEAREST_OF = 100  # characters up to which a name is compared with others: the time is quadratic

# control characters except newline and tab, the two kinds of line break of Unicode, marks that
# reverse the direction of the text after them, and halves of a character, which cannot be encoded
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# what starts emphasis, code, a link, a formula, or another cell of a table; an underscore inside of
# a word, as in train.batch_size, starts nothing; and the parts of a bare address, which would be
# shown as a link
SPECIAL = re.compile(
    r"[\\`\[\]|~$]|(?<!\s)\*|\*(?=\S)|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)|(?<=www)\.", re.I
)


def printable(text: object) -> str:
    r"""Return the text with escapes such as `\x1b` for characters that a terminal would obey.

    All text that petl prints passes through here: labels, columns, names of tensors and paths come
    from files of strangers, and a terminal may write to the clipboard on such a command.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def markdown(text: object) -> str:
    """Return text as a line of markdown that shows it as it is: no markup, HTML or link."""
    line = " ".join(printable(text).split())
    return html.escape(SPECIAL.sub(lambda found: f"\\{found[0]}", line), quote=False)


def described(value: object) -> str:
    """Describe a value for a message, in one short line of ASCII."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = json.dumps(value, default=str)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."


def typed(setting: str, text: str) -> str:
    """A setting with a text as a shell and Hydra take it: quotes are within quotes."""
    if re.fullmatch(r"[\w./-]+", text, re.ASCII):
        return f"{setting}={text}"
    escaped = text.replace('"', '\\"')
    return shlex.quote(f'{setting}="{escaped}"')


class InputError(ValueError):
    """A value that cannot be used; the message has the value and what is allowed.

    Values in the message are shortened if they are longer than any that a user would read.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))

    def __str__(self) -> str:
        return printable(ValueError.__str__(self))  # also in a traceback


def shortened(message: str) -> str:
    """Return a message in which words longer than `LONGEST_WORD` keep their two ends only."""
    return re.sub(
        rf"\S{{{LONGEST_WORD},}}",
        lambda word: f"{word[0][:60]}...[{len(word[0]) - 80:,} characters]...{word[0][-20:]}",
        message,
    )


class UnknownNameError(InputError, KeyError):
    """A name that is not in a registry."""

    __str__ = InputError.__str__  # KeyError would show the message in quotes


class ModuleKindError(InputError, TypeError):
    """A module of a class that the method cannot adapt."""


class UnsupportedError(InputError, NotImplementedError):
    """An operation that a method does not support."""


# other words for settings of petl
MEANT = {**dict.fromkeys(("turns", "conversations", "dialog", "dialogue"), "messages")}


def did_you_mean(name: str, options: Iterable[str], *, limit: int = 40) -> str:
    """Return the end of a message about an unknown `name`: the closest options, or all of them.

    >>> did_you_mean("mloa", ["lora", "mola", "mos"])
    "; did you mean 'mola' or 'lora'?"
    >>> did_you_mean("x", ["lora", "mola"])
    '; available: lora, mola'

    Args:
        name: what was given.
        options: what is allowed.
        limit: the maximum number of options to list if none is close.
    """
    names = sorted(set(options))
    # 0.5 rather than difflib's 0.6: names of methods are short
    close = get_close_matches(name[:NEAREST_OF], names, n=3, cutoff=0.5)
    close = [MEANT[name]] if MEANT.get(name) in names else close
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    if not names:
        return "; none is available"
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f"; available: {', '.join(names[:limit])}{more}"


def choose(options: Mapping[str, T], name: object, kind: str, *, others: Iterable[str] = ()) -> T:
    """Return the option called `name`, which may be of any type.

    Args:
        options: by name, such as a registry.
        name: what was given.
        kind: what an option is, for the message.
        others: further names to suggest.

    Raises:
        UnknownNameError: there is none; the message suggests the closest matches.
    """
    if not isinstance(name, str) or name not in options:  # a list cannot be looked up
        hint = did_you_mean(str(name), [*options, *others])
        raise UnknownNameError(f"no {kind} {name!r}{hint}")
    return options[name]


class RunStopped(RuntimeError):
    """A run that ended early for a reason outside the code; entry points exit with `status`."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message, status)  # both, so that pickle restores them in other processes
        self.status = status

    def __str__(self) -> str:
        return printable(self.args[0])


class Diverged(RunStopped):
    """A training whose loss, score or weights are not finite: again, it would end the same way."""


class JobSkipped(Exception):
    """A job of a sweep that was skipped: its run is finished, or another worker has claimed it.

    Attributes:
        objective: the objective that the run has reached; NaN if it is not finished.
    """

    def __init__(self, message: str, objective: float = math.nan) -> None:
        super().__init__(message, objective)  # both, as in RunStopped
        self.objective = objective

    def __str__(self) -> str:
        return self.args[0]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the context that follows."""
    return str(error).strip().split("\n", 1)[0]


def shown(value: object, limit: int = 80) -> str:
    """Return `repr(value)` for a message, cut after `limit` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = "an integer of thousands of digits"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
