"""Drafts copied from the text so far: what followed the last occurrence of the last tokens.

The idea is that of prompt lookup decoding and of "Lossless Acceleration for Seq2seq Generation with
Aggressive Decoding" (Ge et al. 2022, arXiv:2205.10350). The most recent occurrence counts, which in
dialogue and code is a better guess than the first one, which transformers takes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.efficiency.drafting import folder as files
from petl.efficiency.drafting.costs import TYPICAL
from petl.efficiency.drafting.learning import Frequencies
from petl.efficiency.drafting.registry import (
    Draft,
    Drafter,
    DrafterConfig,
    Needs,
    PassOutput,
    Root,
    auto_or_count,
    register,
)
from petl.efficiency.drafting.tree import best_length
from petl.system.values import integer

LONGEST = 15  # drafts of length="auto"
MOST_NGRAM, MOST_COPIED = 32, 1024  # of `max_ngram` and `length`
# that a copied token is right, given those before it; assumption, corrected while decoding
PRIOR = [[0.5], [0.7], [0.75], *([[0.8]] * (LONGEST - 3))]


@register("lookup")
class Lookup(Drafter):
    """Copies the tokens behind the last earlier occurrence of the last n tokens: a chain.

    It has no weights. Prompt and answer are both copied from, and what an encoder has read.
    """

    needs = Needs(encoder=True)

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        max_ngram: int = 3,
        min_ngram: int = 2,
        length: int | Literal["auto"] = "auto",
    ) -> None:
        """Take the fields; the model is not used.

        Args:
            model: of any kind, or None.
            max_ngram: tokens that must occur before, at first; up to 32.
            min_ngram: tokens that must occur before, at least.
            length: of the chain, up to 1024; "auto": by how often copied tokens were right, and
                what a pass over them costs.

        Raises:
            InputError: a value is out of range.
        """
        super().__init__()
        integer(1, MOST_NGRAM).check("max_ngram", max_ngram, int)
        integer(1, max_ngram).check("min_ngram", min_ngram, int)
        auto_or_count(MOST_COPIED).check("length", length)
        self.max_ngram, self.min_ngram, self.length = max_ngram, min_ngram, length
        self.frequencies = Frequencies(PRIOR)
        self._clear()

    def _clear(self) -> None:
        self.before: list[int] = []  # an encoder's tokens, then the text; empty without an encoder
        self.encoded = 0  # those of the encoder
        self.places: dict[tuple[int, ...], int] = {}  # the token behind the last occurrence
        self.indexed = 0  # tokens of which all n-grams that end there are known
        self.guess: tuple[int, list[int]] = (0, [])  # length of the text then, and tokens

    def start(
        self, ids: Sequence[int], states: Tensor | None, encoder: Sequence[int] | None = None
    ) -> None:
        """Forget the text before."""
        self._clear()
        self.before = [*(encoder or ())]
        self.encoded = len(self.before)

    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return the copied tokens as a chain, with how likely each is right."""
        ids = self._text(root.ids)
        self._count(ids)
        found = self.find(ids)
        self.guess = (len(ids), found)
        table = self.frequencies.table()
        chances = [table[min(i, LONGEST - 1)][0] for i in range(len(found))]
        found = found[: self._wanted(chances, budget)]
        tokens = torch.tensor(found, dtype=torch.long)
        return Draft(tokens, torch.arange(len(found)), torch.tensor(chances[: len(found)]))

    def _text(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens of the encoder, if there is one, and the text."""
        if not self.encoded:
            return ids
        self.before += ids[len(self.before) - self.encoded :]
        return self.before

    def find(self, ids: Sequence[int]) -> list[int]:
        """Return what followed the last earlier occurrence of the last tokens."""
        for end in range(self.indexed, len(ids) - 1):  # not the last: nothing follows it yet
            for n in range(self.min_ngram, min(self.max_ngram, end + 1) + 1):
                self.places[(*ids[end + 1 - n : end + 1],)] = end + 1
        self.indexed = max(self.indexed, len(ids) - 1)
        most = LONGEST if self.length == "auto" else self.length
        for n in range(min(self.max_ngram, len(ids)), self.min_ngram - 1, -1):
            place = self.places.get((*ids[len(ids) - n :],))
            if place is not None:
                # close to the end it is short: a loop in the text is not unrolled
                return list(ids[place : place + most])
        return []

    def _wanted(self, chances: Sequence[float], budget: int | None) -> int:
        if self.length != "auto":
            return self.length if budget is None else budget
        count = best_length(chances, self.costs or TYPICAL)
        return count if budget is None else min(count, budget)

    def _count(self, ids: Sequence[int]) -> None:
        """Compare the last guess, also what was not drafted of it, with what came."""
        length, guess = self.guess
        for depth, (guessed, true) in enumerate(zip(guess, ids[length:], strict=False)):
            self.frequencies.add(depth, 0 if guessed == true else None)
            if guessed != true:
                break

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the fields and the frequencies."""
        fields = {"max_ngram": self.max_ngram, "min_ngram": self.min_ngram, "length": self.length}
        files.write(folder, self.name, fields, frequencies=self.frequencies.table())

    def restore(self, config: DrafterConfig, tensors: dict[str, Tensor]) -> None:
        """Take over what `save` has written besides the fields."""
        self.frequencies.restore(config["frequencies"] or PRIOR)


class LookupFirst(Drafter):
    """Drafts the chain of `lookup` where there is one, else the tree of another drafter."""

    def __init__(self, drafter: Drafter) -> None:
        """Put lookup in front.

        Args:
            drafter: that drafts where nothing can be copied.
        """
        super().__init__()
        self.lookup, self.drafter = Lookup(), drafter
        self.needs = replace(drafter.needs, encoder=True)
        self.vocabulary = drafter.vocabulary

    def start(
        self, ids: Sequence[int], states: Tensor | None, encoder: Sequence[int] | None = None
    ) -> None:
        """Begin a row in both."""
        for part in (self.lookup, self.drafter):
            part.costs = self.costs
            part.begin(ids, states, encoder)

    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return the chain, or the tree if there is none."""
        self.lookup.costs = self.drafter.costs = self.costs
        chain = self.lookup.draft(root, budget)
        # also where it drafts nothing: it learns what came, and up to where it has read
        tree = self.drafter.draft(root, 0 if len(chain.tokens) else budget)
        return chain if len(chain.tokens) else tree

    def observe(self, seen: PassOutput) -> None:
        """Learn in both."""
        self.lookup.observe(seen)
        self.drafter.observe(seen)
