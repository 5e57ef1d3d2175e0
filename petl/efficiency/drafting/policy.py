"""Whether to draft at all, so that drafting is not slower than doing without.

Two rules. Where no draft is right, passes cost more than plain ones and save nothing: the rest
begins as soon as one pass is lost, by the measured costs, so that a short text is not much slower
either; what a right draft has saved just before may be lost, too. Where some drafts are right the
clock decides, over a longer stretch.
"""

from weakref import WeakKeyDictionary

from torch import nn

# passes over one token that drafts in a row, none of them right, may cost; and as much again of
# what the last right one has saved
LOSS = 1.0
# tokens of the rest after it; the next one, with half the loss before it, is twice as long
SHORT = 8
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
        self._hit()
        self._begin()

    def _begin(self) -> None:
        self.rounds, self.tokens, self.seconds = 0, 0, 0.0

    def _hit(self) -> None:
        # what was lost since the last right draft, what may be, and the tokens of the rest after it
        self.lost, self.allowed, self.pause = 0.0, LOSS, SHORT

    @property
    def is_due(self) -> bool:
        """True if a window is complete."""
        return self.enabled and self.rounds >= WINDOW

    def add(self, tokens: int, seconds: float, cost: float) -> None:
        """Count a round.

        Args:
            tokens: that it gave.
            seconds: that it took.
            cost: of its pass beyond one over a single token, in such passes.
        """
        self.rounds, self.tokens = self.rounds + 1, self.tokens + tokens
        self.seconds += seconds
        if tokens > 1:
            self._hit()
            self.lost = -min(LOSS, max(0.0, tokens - 1 - cost))
            return
        self.lost += cost
        if self.enabled and self.lost >= self.allowed:
            # the window goes on behind it: the clock judges rounds, however far apart they are
            self._rest(self.pause)
            # all losses of a text without a right draft together stay below 2 LOSS
            self.allowed, self.pause = self.allowed / 2, min(2 * self.pause, REST)

    def judge(self, plain: float) -> None:
        """Compare the window with plain decoding, of `plain` seconds per token."""
        if self.seconds > plain * self.tokens:
            self._rest(REST)
        self._begin()

    def _rest(self, tokens: int) -> None:
        self.is_on, self.left, self.lost = False, max(self.left, tokens), 0.0

    def rest(self, tokens: int) -> None:
        """Count tokens of a plain round; at the end of the rest drafting begins again."""
        self.left = max(0, self.left - tokens)
        self.is_on = not self.left


_known: WeakKeyDictionary[nn.Module, Switch] = WeakKeyDictionary()


def switch_of(drafter: nn.Module) -> Switch:
    """Return the switch of a drafter, which goes on over calls: short answers add up to windows."""
    return _known.setdefault(drafter, Switch())
