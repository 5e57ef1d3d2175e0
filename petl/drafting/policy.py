"""Whether to draft at all: the clock decides, so that drafting is not slower than doing without."""

from typing import Any
from weakref import WeakKeyDictionary

WINDOW = 64  # rounds with drafts that are compared with plain decoding
REST = 128  # tokens of plain decoding after a window that was slower


class Switch:
    """Turns drafting off for a while where it costs more time than it saves.

    Attributes:
        is_on: True if the next round has drafts.
        is_due: True if a window is complete: `judge` it.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.is_on = True
        self._begin()

    def _begin(self) -> None:
        self.rounds, self.tokens, self.seconds, self.rested = 0, 0, 0.0, 0

    @property
    def is_due(self) -> bool:
        """True if a window is complete."""
        return self.enabled and self.rounds >= WINDOW

    def add(self, tokens: int, seconds: float) -> None:
        """Count a round with drafts: tokens that it gave, and the time that it took."""
        self.rounds, self.tokens = self.rounds + 1, self.tokens + tokens
        self.seconds += seconds

    def judge(self, plain: float) -> None:
        """Compare the window with plain decoding, of `plain` seconds per token."""
        self.is_on = self.seconds <= plain * self.tokens
        self._begin()

    def rest(self, tokens: int) -> None:
        """Count tokens of a plain round; after `REST` of them drafting begins again."""
        self.rested += tokens
        if self.rested >= REST:
            self.is_on = True
            self._begin()


_known: WeakKeyDictionary[Any, Switch] = WeakKeyDictionary()


def switch_of(drafter: Any) -> Switch:
    """Return the switch of a drafter, which goes on over calls: short answers add up to windows."""
    return _known.setdefault(drafter, Switch())
