"""What draft heads learn from answers: batches of positions, the loss, rank frequencies.

Shapes: T tokens of answers, P positions in them, H width, D tokens of the draft vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from petl.efficiency.drafting.answers import DraftAnswers
from petl.efficiency.drafting.heads import UNKNOWN, Heads

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


def batches(
    answers: DraftAnswers, size: int, generator: torch.Generator, *, by_row: bool
) -> Iterator[Tensor]:
    """Yield positions of answers in random order.

    Args:
        size: positions of a batch.
        by_row: those of whole rows, as many as have `size` positions.
    """
    positions = answers.positions
    if not by_row:
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


def guesses(
    heads: Heads, answers: DraftAnswers, states: Tensor, positions: Tensor
) -> Iterator[Guess]:
    """Yield what each head says at some positions, after the true tokens.

    Args:
        states: that the heads read, see `states_of`.
        positions: of `answers.positions`.
    """
    # one row of what is carried for each position; each head adds the next token to it
    carry = states[positions].to(heads.dtype)
    last = len(answers.ids) - 1
    ends = answers.ends[positions]
    for i in range(1, heads.heads + 1):
        # behind the end of an answer any token will do: it is not counted
        carry = heads.enter(carry, answers.ids[(positions + i).clamp(max=last)])
        tokens = answers.ids[(positions + 1 + i).clamp(max=last)]
        is_inside = positions + 1 + i < ends
        places = heads.place[tokens].masked_fill(~is_inside, UNKNOWN)
        yield Guess(heads.logits(carry, i), places, is_inside, (positions + i).clamp(max=last))


def states_of(heads: Heads, answers: DraftAnswers, positions: Tensor) -> Tensor:
    """Return the states that the heads read, [T, H]; of rows with some of these positions."""
    if heads.reader is None:
        return answers.states
    # bucketize gives the row that a position is in
    ends = torch.tensor(answers.offsets[1:])
    chosen = set(torch.bucketize(positions.cpu(), ends, right=True).tolist())
    found = []
    for i in range(len(answers)):
        states = answers.states[answers.row(i)].to(heads.dtype)
        found.append(heads.reader.whole(states) if i in chosen else torch.zeros_like(states))
    return torch.cat(found)


def loss(
    heads: Heads, answers: DraftAnswers, positions: Tensor | None, target: Literal["hard", "soft"]
) -> Tensor:
    """Return the weighted sum of the heads' mean cross-entropies, a scalar; see `Hydra.loss`."""
    chosen = answers.positions if positions is None else positions
    device = heads.index.device
    sums = [torch.zeros((), device=device) for _ in range(heads.heads)]
    counts = [torch.zeros((), device=device) for _ in range(heads.heads)]
    states = states_of(heads, answers, chosen)
    for part in chosen.split(CHUNK):
        for i, guess in enumerate(guesses(heads, answers, states, part)):
            known = guess.places != UNKNOWN
            goal: Tensor = guess.places.clamp(min=0)
            if target == "soft":  # what the model's own head says there, restricted to D
                before = answers.states[guess.before].to(heads.dtype)
                goal = heads.ends.logits(before, heads.index).softmax(-1)
            errors = cross_entropy(guess.logits, goal, reduction="none")
            # not by indexing, which would wait for the device; no head is left without a gradient
            sums[i] = sums[i] + errors.where(known, 0).sum()
            counts[i] = counts[i] + known.sum()
    total = torch.zeros((), device=device)
    for i, (part, count) in enumerate(zip(sums, counts, strict=True)):
        total = total + WEIGHT**i * part / count.clamp(min=1)
    return total


@torch.no_grad()
def frequencies(
    heads: Heads, answers: DraftAnswers, known: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Return at which fraction of positions the true token has each rank, by head, then rank.

    Args:
        known: the frequencies so far, which a head keeps if all answers are too short for it.
    """
    ranks = len(known[0])
    hits, totals = torch.zeros(heads.heads, ranks), torch.zeros(heads.heads)
    states = states_of(heads, answers, answers.positions)
    for part in answers.positions.split(CHUNK):
        for i, guess in enumerate(guesses(heads, answers, states, part)):
            # a token outside of D has no rank, and counts as a miss
            top = guess.logits.topk(ranks).indices
            right = (top == guess.places[:, None]) & (guess.places != UNKNOWN)[:, None]
            hits[i] += right.sum(0).cpu()
            totals[i] += guess.is_inside.sum().cpu()
    return [
        (hits[i] / totals[i]).tolist() if totals[i] else list(known[i]) for i in range(heads.heads)
    ]
