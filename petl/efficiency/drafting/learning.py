"""What draft heads learn from answers: batches of positions, the loss, rank frequencies.

Shapes: T tokens of answers, P positions in them, H width, D tokens of the draft vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from petl.efficiency.drafting.answers import DraftAnswers
from petl.efficiency.drafting.heads import UNKNOWN, DraftHeads
from petl.efficiency.drafting.tree import Path
from petl.errors import InputError

DECAY = 0.99  # weight of earlier rounds, per round
PRIOR_ROUNDS = 10.0  # weight of the frequencies before the first round; assumption


class Frequencies:
    """Fractions of positions at which the true token had a rank, given that the path was right.

    By depth and rank, counted while a model decodes.
    """

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


WEIGHT = 0.8  # of a head's loss, over that of the head before
CHUNK = 1024  # positions whose logits exist at a time, where all are computed


class Guess(NamedTuple):
    """What a head says at some positions of answers.

    Attributes:
        logits: [P, D].
        places: of the true tokens in D; -1: not in D, or behind the end of the answer, [P].
        is_inside: where there is a true token, bool [P].
        before: the number of the state that chose the true token, [P].
    """

    logits: Tensor
    places: Tensor
    is_inside: Tensor
    before: Tensor


class LearningHeads(DraftHeads):
    """Heads with what they learn.

    Attributes:
        frequencies: how often each rank of a head was right.
    """

    frequencies: Frequencies

    def batches(
        self, answers: DraftAnswers, size: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Yield positions of answers in random order, about `size` at a time."""
        positions = answers.positions
        if self.reader is None:
            order = torch.randperm(len(positions), generator=generator).to(positions.device)
            yield from positions[order].split(size)
            return
        # the prefix layer reads a row up to its last position, whatever positions are asked for
        rows = [row for row in positions.split(answers.counts) if len(row)]
        batch: list[Tensor] = []
        for i in torch.randperm(len(rows), generator=generator).tolist():
            batch.append(rows[i])
            if sum(map(len, batch)) >= size:
                yield torch.cat(batch)
                batch = []
        if batch:
            yield torch.cat(batch)

    def by_head(self, answers: DraftAnswers, states: Tensor, positions: Tensor) -> Iterator[Guess]:
        """Yield what each head says at some positions, after the true tokens.

        Args:
            states: that the heads read, see `states_of`.
            positions: of `answers.positions`.
        """
        # one row of what is carried for each position; each head adds the next token to it
        carry = states[positions].to(self.dtype)
        last = len(answers.ids) - 1
        ends = answers.ends[positions]
        for i in range(1, self.heads + 1):
            # behind the end of an answer any token will do: it is not counted
            carry = self.enter(carry, answers.ids[(positions + i).clamp(max=last)])
            tokens = answers.ids[(positions + 1 + i).clamp(max=last)]
            is_inside = positions + 1 + i < ends
            places = self.place[tokens].masked_fill(~is_inside, UNKNOWN)
            yield Guess(self.logits(carry, i), places, is_inside, (positions + i).clamp(max=last))

    def states_of(self, answers: DraftAnswers, positions: Tensor) -> Tensor:
        """Return the states that the heads read, [T, H]; of rows with some of these positions."""
        if self.reader is None:
            return answers.states
        # bucketize gives the row that a position is in
        ends = torch.tensor(answers.offsets[1:])
        chosen = set(torch.bucketize(positions.cpu(), ends, right=True).tolist())
        found = []
        for i in range(len(answers)):
            states = answers.states[answers.row(i)].to(self.dtype)
            found.append(self.reader.whole(states) if i in chosen else torch.zeros_like(states))
        return torch.cat(found)

    def loss(
        self,
        answers: DraftAnswers,
        positions: Tensor | None = None,
        *,
        target: Literal["hard", "soft"] = "hard",
    ) -> Tensor:
        """Return the weighted sum of the heads' mean cross-entropies, a scalar.

        Args:
            answers: of the model.
            positions: some of `answers.positions`; None: all.
            target: "hard": the tokens; "soft": the model's distribution over D.
        """
        chosen = answers.positions if positions is None else positions
        device = self.index.device
        sums = [torch.zeros((), device=device) for _ in range(self.heads)]
        counts = [torch.zeros((), device=device) for _ in range(self.heads)]
        states = self.states_of(answers, chosen)
        for part in chosen.split(CHUNK):
            for i, guess in enumerate(self.by_head(answers, states, part)):
                known = guess.places != UNKNOWN
                goal: Tensor = guess.places.clamp(min=0)
                if target == "soft":  # what the model's own head says there, restricted to D
                    before = answers.states[guess.before].to(self.dtype)
                    goal = self.ends.logits(before, self.index).softmax(-1)
                errors = cross_entropy(guess.logits, goal, reduction="none")
                # not by indexing, which would wait for the device; each head gets a gradient
                sums[i] = sums[i] + errors.where(known, 0).sum()
                counts[i] = counts[i] + known.sum()
        total = torch.zeros((), device=device)
        for i, (part, count) in enumerate(zip(sums, counts, strict=True)):
            total = total + WEIGHT**i * part / count.clamp(min=1)
        return total

    @torch.no_grad()
    def count(self, answers: DraftAnswers) -> None:
        """Count rank frequencies on answers, which the heads should not have been trained on.

        A head keeps what is known if all answers are too short for it.
        """
        known = self.frequencies.table()
        ranks = len(known[0])
        hits, totals = torch.zeros(self.heads, ranks), torch.zeros(self.heads)
        states = self.states_of(answers, answers.positions)
        for part in answers.positions.split(CHUNK):
            for i, guess in enumerate(self.by_head(answers, states, part)):
                # a token outside of D has no rank, and counts as a miss
                top = guess.logits.topk(ranks).indices
                right = (top == guess.places[:, None]) & (guess.places != UNKNOWN)[:, None]
                hits[i] += right.sum(0).cpu()
                totals[i] += guess.is_inside.sum().cpu()
        self.frequencies.restore([
            (hits[i] / totals[i]).tolist() if totals[i] else known[i] for i in range(self.heads)
        ])  # fmt: skip
