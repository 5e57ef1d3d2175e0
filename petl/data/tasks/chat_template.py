"""Bounds for the chat template of a tokenizer, a program that may come from a stranger.

Its time is bounded, not its memory.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
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


@lru_cache(maxsize=8)  # it is called for each conversation
def check_template(template: str, name: str) -> None:
    """Refuse a template with an operation that no deadline can stop.

    Python computes a power or product in one instruction, during which no other thread runs, and
    numbers of many digits take hours.

    Args:
        name: of the template, for messages.

    Raises:
        InputError: it is too long, cannot be parsed, or has a power or a product of two values.
    """
    if len(template) > MAX_LENGTH:
        raise InputError(f"{name} has {len(template):,} characters; at most {MAX_LENGTH:,}")
    try:
        tokens = [token for token in Environment().lex(template) if token[1] not in NOT_CODE]
    except TemplateSyntaxError as error:
        raise InputError(f"{name} cannot be parsed: {error.message}") from error
    for before, (line, _, word), after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        unpacks = before[2] in ("(", ",")  # the arguments of a call
        is_small = word == "*" and (_is_factor(*before) or _is_factor(*after))
        if word in ("*", "**") and not unpacks and not is_small:
            raise InputError(
                f"{name} computes a power or a product of two values in line {line}, which may "
                f"take hours: only products with a number up to {MAX_FACTOR} are allowed"
            )


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
