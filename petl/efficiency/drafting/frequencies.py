"""How often a drafter's guesses are right, by depth and rank, counted while it decodes."""

from collections.abc import Sequence

from petl.efficiency.drafting.tree import Path
from petl.errors import InputError

DECAY = 0.99  # weight of earlier rounds, per round
PRIOR_ROUNDS = 10.0  # weight of the frequencies before the first round; assumption


class Frequencies:
    """Fractions of positions at which the true token had a rank, given that the path was right."""

    def __init__(self, prior: Sequence[Sequence[float]]) -> None:
        self.counts = [[value * PRIOR_ROUNDS for value in row] for row in prior]
        self.totals = [PRIOR_ROUNDS] * len(self.counts)

    def add(self, depth: int, rank: int | None) -> None:
        """Count a position: the true token's rank; None: it was not among the guesses."""
        if depth < len(self.counts):
            # the total tends to 1 / (1 - DECAY) = 100, so that a text's last 100 positions rule
            self.totals[depth] = DECAY * self.totals[depth] + 1
            row = [DECAY * count for count in self.counts[depth]]
            if rank is not None and rank < len(row):
                row[rank] += 1
            self.counts[depth] = row

    def table(self) -> list[list[float]]:
        """Return the frequencies by depth, then rank."""
        # a row sums to less than 1: the rest is positions at which no guess was right
        return [
            [count / total for count in row]
            for row, total in zip(self.counts, self.totals, strict=True)
        ]

    def restore(self, table: Sequence[Sequence[float]]) -> None:
        """Begin again with these frequencies, with the weight of a prior.

        Raises:
            InputError: they are no numbers from 0 to 1, or of other depths and ranks.
        """
        shape = [len(row) for row in self.counts]
        values = [value for row in table for value in row]
        if [len(row) for row in table] != shape or not all(0 <= value <= 1 for value in values):
            raise InputError(
                f"the drafter's frequencies have {[len(row) for row in table]} ranks by depth, or "
                f"values outside of 0 to 1; its fields ask for {shape}: draft anew, or mend "
                "drafter_config.json"
            )
        self.__init__(table)


def path_probabilities(table: Sequence[Sequence[float]], paths: Sequence[Path]) -> list[float]:
    """Return the frequency of the last rank of each path, if the path before it is right."""
    return [table[len(path) - 1][path[-1]] for path in paths]
