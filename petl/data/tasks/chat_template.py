"""Bounds for the chat template of a tokenizer, a program that may come from a stranger.

Its time is bounded, not its memory.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from jinja2 import Environment, TemplateSyntaxError

from petl.errors import InputError

T = TypeVar("T")
DEADLINE = 30.0  # seconds for one conversation, which takes milliseconds
MAX_LENGTH = 2**18  # characters; the longest in use have about 30,000
MAX_FACTOR = 1000
FACTORS = {str(number) for number in range(MAX_FACTOR + 1)}
NOT_CODE = {"data", "whitespace", "comment"}  # tokens of jinja's lexer
# operators of two values: what they compute
COSTLY = {
    "*": "a power or a product",
    "**": "a power or a product",
    "//": "a quotient or a remainder",
    "%": "a quotient or a remainder",
}
# filters, tests and methods whose one instruction takes a time, or a memory, that an argument gives
BOUNDED = {
    *("batch", "center", "expandtabs", "indent", "ljust", "rjust", "to_bytes", "zfill"),  # padding
    *("round", "divisibleby"),  # a power of ten, a remainder
    *("rfind", "rindex", "rpartition", "rsplit"),  # the product of two lengths
}
BY_NAME = {"map", "select", "reject"}  # filters that apply the one that they are given
MAX_ARGUMENTS = 32  # tokens of the arguments of one
CONSTANTS = {"true", "false", "none", "True", "False", "None"}
Token = tuple[int, str, str]  # line, kind, text
END: Token = (0, "end", "")


@lru_cache(maxsize=8)  # it is called for each conversation
def check_template(template: str, name: str) -> None:
    """Refuse a template with an operation that no deadline can stop.

    Python computes a power, product or quotient in one instruction, during which no other thread
    runs, and numbers of many digits take hours. So do a few filters and methods.

    Args:
        name: of the template, for messages.

    Raises:
        InputError: it is too long, cannot be parsed, or has such an operation of two values, or
            another argument of such a filter than a small literal.
    """
    if len(template) > MAX_LENGTH:
        raise InputError(f"{name} has {len(template):,} characters; at most {MAX_LENGTH:,}")
    try:
        tokens = [token for token in Environment().lex(template) if token[1] not in NOT_CODE]
    except TemplateSyntaxError as error:
        raise InputError(f"{name} cannot be parsed: {error.message}") from error
    around = [END, END, *tokens, END, END, END]
    for i, (line, kind, word) in enumerate(tokens, start=2):
        if kind == "operator" and word in COSTLY and not _is_cheap(around[i - 2 : i + 3]):
            raise InputError(
                f"{name} computes {COSTLY[word]} of two values in line {line}, which may take "
                f"hours: only those with a number up to {MAX_FACTOR} are allowed"
            )
        if _is_unbounded(*around[i - 1 : i + MAX_ARGUMENTS]):
            raise InputError(
                f"{name} has {word} in line {line}, which may take hours or all memory: allowed "
                f"are literal arguments, numbers up to {MAX_FACTOR} and texts as long"
            )


def _is_cheap(around: Sequence[Token]) -> bool:
    """Return True if an operator has a small operand, or is not one of two values.

    Args:
        around: two tokens before it, it, and two after it.
    """
    outer, before, (_, _, word), after, following = around
    # not 2 in n * 2 * m, nor 0 in n * 0|default(m)
    left = _is_factor(*before) and outer[2] not in (*COSTLY, "/")
    right = _is_factor(*after) and following[2] not in ("|", ".", "(", "[", "**")
    if word == "%":
        return before[1] == "string" or right  # a text: its placeholders are filled
    if word in ("*", "**") and before[2] in ("(", ","):  # unpacks the arguments of a call
        return True
    return (word != "**" and right) or (word == "*" and left)


def _is_unbounded(before: Token, token: Token, *rest: Token) -> bool:
    """Return True if a token names a filter, test or method of `BOUNDED` and its arguments do not.

    Args:
        *rest: the tokens behind it.
    """
    _, kind, word = token
    if kind == "string":  # map('round', 9), x['ljust']
        return before[2] in ("(", "[", ",") and _text(word) in BOUNDED
    if before[2] not in ("|", ".", "is", "not", "filter"):
        return False
    opens = rest[0][2] == "("
    if word in BY_NAME and opens:
        (_, first, _), (_, _, second) = rest[1:3]
        ends = {"string": (",", ")"), "name": ("=",)}  # a literal alone, or attribute=
        return rest[1][2] != ")" and second not in ends.get(first, ())
    if word not in BOUNDED:
        return False
    if not opens:  # a test has its argument without them, a method is called later
        return before[2] == "." or (word == "divisibleby" and not _is_literal(*rest[:2]))
    depth = 0
    for own, following in pairwise(rest):
        depth += {"(": 1, ")": -1}.get(own[2], 0)
        if not depth:
            return False
        if own[2] not in ("(", ")", ",", "=") and not _is_literal(own, following):
            return True
    return True


def _is_literal(token: Token, following: Token) -> bool:
    """Return True if a token is a small constant, or the name of an argument."""
    _, kind, word = token
    if kind == "name":
        return word in CONSTANTS or following[2] == "="
    return word in FACTORS or kind == "float" or (kind == "string" and len(word) <= MAX_FACTOR)


def _text(word: str) -> str:
    """The text of a string token, in which characters may be escaped."""
    return word[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


def _is_factor(_line: int, kind: str, word: str) -> bool:
    """Return True if a token is a number by which others stay short."""
    return kind == "float" or word in FACTORS


def within_deadline(render: Callable[[], T], name: str) -> T:
    """Return what `render` returns, which runs a template.

    It runs in a thread, the one way that works in DataLoader workers and on Windows, too: signals
    reach only the main thread, and those workers cannot start processes of `multiprocessing`.

    Args:
        name: of the template, for messages.

    Raises:
        InputError: it takes longer than `DEADLINE`.
    """
    results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            results.put((render(), None))
        except BaseException as error:
            results.put((None, error))

    thread = Thread(target=run, daemon=True)  # it does not keep the process alive
    thread.start()
    try:
        result, error = results.get(timeout=DEADLINE)
    except Empty:
        # ends its loops, where it goes on in a notebook
        ident, reason = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, reason)
        raise InputError(
            f"{name} did not end within {DEADLINE:g} seconds; use another tokenizer, or data with "
            "plain text (data.text=...)"
        ) from None
    if error is not None:
        raise error
    return result
