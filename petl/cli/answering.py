"""What an answer prints in the terminal while it is written, and Ctrl-C that ends it."""

import logging
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from petl.cli.table import LLAMA, EngineOptions
from petl.errors import InputError, printable

if TYPE_CHECKING:
    from petl.generation.inference.sampling import Sample
    from petl.ops.small_weights import Kind

logger = logging.getLogger("petl")


def own_weights(options: EngineOptions) -> "Kind | None":
    """Return the bits in which petl's engine has the weights; None: as they are.

    Raises:
        InputError: they are of another engine.
    """
    from petl.ops.small_weights import KINDS

    found = next((kind for kind in KINDS if kind == options.weights), None)
    if options.weights != found:
        raise InputError(f"--weights={options.weights} is for --engine {LLAMA}")
    return found


def show(text: str) -> None:
    """Print a piece of an answer at once, control characters escaped."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()  # the text has no line break, which would flush it


def text_of(read: Callable[[], str]) -> str:
    """Return the text that `read` gets from the terminal, standard input or the command line.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        text = read()
        text.encode()  # in some locales a wrong byte is read as half a character
    except UnicodeError as error:
        raise InputError(f"the text is not UTF-8 ({error})") from error
    return text


def tell_if_cut(answer: "Sample") -> None:
    """Log that an answer ended at the limit of tokens."""
    if answer.finish == "length":
        logger.info("the answer was cut after %d tokens, see --max-new-tokens", answer.tokens)


@contextmanager
def stopping() -> Generator[Event]:
    """Yield an event that Ctrl-C sets inside the block; a second one raises KeyboardInterrupt."""
    event = Event()

    def stop(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt  # the pass that runs now may take long
        event.set()

    before = signal.signal(signal.SIGINT, stop)  # Python allows it in the main thread only
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
