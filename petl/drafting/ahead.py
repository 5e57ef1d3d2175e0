"""Lookup in front of a trained drafter: text that repeats is copied, other text is guessed."""

from collections.abc import Sequence

from torch import Tensor

from petl.drafting.lookup import Lookup
from petl.drafting.registry import Draft, Drafter, Root, Seen


class LookupFirst(Drafter):
    """Drafts the chain of `lookup` where there is one, else the tree of another drafter."""

    def __init__(self, drafter: Drafter) -> None:
        """Put lookup in front.

        Args:
            drafter: that drafts where nothing can be copied.
        """
        super().__init__()
        self.lookup, self.drafter, self.needs = Lookup(), drafter, drafter.needs

    def start(self, ids: Sequence[int], states: Tensor | None) -> None:
        """Begin a row in both."""
        for part in (self.lookup, self.drafter):
            part.costs = self.costs
            part.start(ids, states)

    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return the chain, or the tree if there is none."""
        self.lookup.costs = self.drafter.costs = self.costs
        chain = self.lookup.draft(root, budget)
        # also where it drafts nothing: it learns what came, and up to where it has read
        tree = self.drafter.draft(root, 0 if len(chain.tokens) else budget)
        return chain if len(chain.tokens) else tree

    def observe(self, seen: Seen) -> None:
        """Learn in both."""
        self.lookup.observe(seen)
        self.drafter.observe(seen)
