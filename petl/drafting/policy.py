"""Whether to draft at all, so that drafting is not slower than doing without.

Two rules. A few passes in a row without a right draft end in a short rest: they cannot have saved
anything. The clock decides about the rest: drafts may be right, and yet take longer.
"""

from typing import Any
from weakref import WeakKeyDictionary

MISSES = 8  # rounds with drafts in a row, none of them right, after which drafting rests
SHORT = 8  # tokens of the first such rest; each further one is twice as long, up to `REST`
WINDOW = 64  # rounds that are compared with plain decoding
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
        self.left = 0  # tokens of the present rest
        self.misses, self.pause = 0, SHORT  # of the next short rest
        self._begin()

    def _begin(self) -> None:
        self.rounds, self.tokens, self.seconds = 0, 0, 0.0

    @property
    def is_due(self) -> bool:
        """True if a window is complete."""
        return self.enabled and self.rounds >= WINDOW

    def add(self, tokens: int, seconds: float, drafts: int) -> None:
        """Count a round.

        Args:
            tokens: that it gave.
            seconds: that it took.
            drafts: that were verified; 0: the drafter had no guess.
        """
        self.rounds, self.tokens = self.rounds + 1, self.tokens + tokens
        self.seconds += seconds
        if tokens > 1:
            self.misses, self.pause = 0, SHORT
        elif drafts:
            self.misses += 1
        if self.enabled and self.misses == MISSES:
            # the window goes on behind it: the clock judges rounds, however far apart they are
            self._rest(self.pause)
            self.pause = min(2 * self.pause, REST)

    def judge(self, plain: float) -> None:
        """Compare the window with plain decoding, of `plain` seconds per token."""
        if self.seconds > plain * self.tokens:
            self._rest(REST)
        self._begin()

    def _rest(self, tokens: int) -> None:
        self.is_on, self.left, self.misses = False, max(self.left, tokens), 0

    def rest(self, tokens: int) -> None:
        """Count tokens of a plain round; at the end of the rest drafting begins again."""
        self.left = max(0, self.left - tokens)
        self.is_on = not self.left


_known: WeakKeyDictionary[Any, Switch] = WeakKeyDictionary()


def switch_of(drafter: Any) -> Switch:
    """Return the switch of a drafter, which goes on over calls: short answers add up to windows."""
    return _known.setdefault(drafter, Switch())
