"""Drafts copied from the input of an encoder-decoder, for answers that mostly repeat it.

Sun et al., "Instantaneous Grammatical Error Correction with Shallow Aggressive Decoding", ACL 2021
(arXiv:2106.04970), and Ge et al., "Lossless Acceleration for Seq2seq Generation with Aggressive
Decoding" (arXiv:2205.10350): the input counts as drafted until the model writes another token; then
the place in the input is found again by the last tokens of the answer. The paper waits until they
occur once in the input; here the nearest place behind the last copied token is taken, since a
repeated word would block it for long.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petl.core.layers.context import is_encoder_decoder
from petl.core.types import base_of
from petl.efficiency.drafting import folder as files
from petl.efficiency.drafting.costs import TYPICAL
from petl.efficiency.drafting.learning import Frequencies
from petl.efficiency.drafting.registry import (
    Draft,
    Drafter,
    DrafterConfig,
    Needs,
    Root,
    register,
    vocabulary_of,
)
from petl.efficiency.drafting.tree import best_length
from petl.errors import InputError, UnsupportedError
from petl.system.values import FREE, integer

MOST = 63  # drafts of most=None
MOST_NGRAM, MOST_COPIED = 32, 1024  # of `longest` and `most`
OFTEN = 2  # a single token that occurs more often in the input tells no place
# that a copied token is right, by the tokens that were copied before it; assumption, corrected
# while decoding
PRIOR = [[0.6], [0.8], [0.9]]


@register("aggressive")
class Aggressive(Drafter):
    """Copies the encoder's input: a chain.

    It has no weights.
    """

    needs = Needs(encoder=True)

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        most: int | None = None,
        longest: int = 3,
        shortest: int = 1,
        past_edits: bool = False,
    ) -> None:
        """Take the fields.

        Args:
            model: an encoder-decoder, whose end token and vocabulary are read.
            most: tokens of a draft, up to 1024; None: by how often copied tokens were right, and
                what a pass over them costs, at most 63.
            longest: tokens at the end of the answer by which the place in the input is found, at
                first; up to 32.
            shortest: tokens by which it is found, at least.
            past_edits: a token that is not in the input, behind a copied one, is taken to replace
                a token of it: what follows that token is drafted at once. False: nothing is
                drafted until the place is found, as in the papers.

        Raises:
            InputError: a value is out of range, or there is no model.
            UnsupportedError: the model is a decoder.
        """
        super().__init__()
        if most is not None:
            integer(1, MOST_COPIED).check("most", most, int)
        integer(1, MOST_NGRAM).check("longest", longest, int)
        integer(1, longest).check("shortest", shortest, int)
        FREE.check("past_edits", past_edits, bool)
        self.vocabulary = vocabulary_of(model)
        assert model is not None
        base = base_of(model)
        if not is_encoder_decoder(base):
            raise UnsupportedError(
                f"aggressive copies what an encoder has read, and {type(base).__name__} is a "
                "decoder: use lookup, which copies its prompt"
            )
        self.most, self.longest, self.shortest = most, longest, shortest
        self.past_edits = past_edits
        self.specials, self.ends = _special_tokens(base)
        self.frequencies = Frequencies(PRIOR)
        self._begin([], 0)

    def _begin(self, source: list[int], length: int) -> None:
        self.source = source  # x: what can be copied
        self.counts = Counter(source)
        # of each n-gram of x, the numbers of tokens up to its ends, rising
        self.places: dict[tuple[int, ...], list[int]] = {}
        for end in range(1, len(source)):  # not the last: nothing follows it
            for n in range(self.shortest, min(self.longest, end) + 1):
                self.places.setdefault((*source[end - n : end],), []).append(end)
        self.first = self.read = length  # tokens before the answer, and those that were compared
        self.place, self.is_copying = 0, True  # p: tokens of x up to the last copied one
        self.run = 0  # tokens that were copied since the place was found
        self.guess: tuple[int, list[int]] = (0, [])  # length of the text then, and tokens

    def start(
        self, ids: Sequence[int], states: Tensor | None, encoder: Sequence[int] | None = None
    ) -> None:
        """Take the encoder's tokens.

        Raises:
            InputError: there are none.
        """
        if encoder is None:
            raise InputError(
                f"encoder_input_ids={encoder}: aggressive copies the tokens that the encoder "
                "has read, and this call has none: pass them as encoder_input_ids=IDS, or choose "
                "recycling"
            )
        self._begin(self._content(encoder), len(ids))

    def _content(self, encoder: Sequence[int]) -> list[int]:
        """Return the tokens without special ones at both ends, and the end token behind them."""
        kept = [i for i, token in enumerate(encoder) if token not in self.specials]
        if not kept:
            return []
        behind = [token for token in encoder[kept[-1] + 1 :] if token in self.ends]
        return [*encoder[kept[0] : kept[-1] + 1], *(behind or self.ends)[:1]]

    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return what follows in the input as a chain, with how likely each token is right."""
        self._count(root.ids)
        self._follow(root.ids)
        most = MOST if self.most is None else self.most
        found = self.source[self.place : self.place + most] if self.is_copying else []
        self.guess = (len(root.ids), found)
        table = self.frequencies.table()
        chances = [table[self._row(depth)][0] for depth in range(len(found))]
        found = found[: self._wanted(chances, budget)]
        tokens = torch.tensor(found, dtype=torch.long)
        return Draft(tokens, torch.arange(len(found)), torch.tensor(chances[: len(found)]))

    def _follow(self, ids: Sequence[int]) -> None:
        """Move behind the tokens of the answer that are copied, or find the place anew."""
        ended = -1  # the token with which copying ended
        for i in range(self.read, len(ids)):
            # start and forced tokens before the answer are not copied
            if i == self.first and ids[i] in self.specials:
                self.first += 1
            elif self.is_copying and ids[i : i + 1] == self.source[self.place : self.place + 1]:
                self.place += 1
                self.run += 1
            else:
                self.is_copying, ended = False, i if self.is_copying else ended
        self.read = len(ids)
        if self.is_copying or self._synchronise(ids[max(self.first, len(ids) - self.longest) :]):
            return
        if self.past_edits and self.run and ended == len(ids) - 1:
            self.place += 1
            self.is_copying, self.run = True, 0

    def _synchronise(self, last_tokens: Sequence[int]) -> bool:
        """Take the place of the longest end of the answer that occurs in the input, if one does."""
        for n in range(len(last_tokens), self.shortest - 1, -1):
            last = (*last_tokens[len(last_tokens) - n :],)
            if n == 1 and self.counts[last[0]] > OFTEN:
                continue
            places = self.places.get(last)
            if places is not None:
                # the first behind the last copied token, else the last one
                behind = bisect_right(places, self.place)
                self.place = places[min(behind, len(places) - 1)]
                self.is_copying, self.run = True, 0
                return True
        return False

    def _row(self, depth: int) -> int:
        return min(self.run + depth, len(PRIOR) - 1)

    def _wanted(self, chances: Sequence[float], budget: int | None) -> int:
        if self.most is not None:
            return self.most if budget is None else budget
        count = best_length(chances, self.costs or TYPICAL)
        return count if budget is None else min(count, budget)

    def _count(self, ids: Sequence[int]) -> None:
        """Compare the last guess, also what was not drafted of it, with what came."""
        length, guess = self.guess
        for depth, (guessed, true) in enumerate(zip(guess, ids[length:], strict=False)):
            self.frequencies.add(self._row(depth), 0 if guessed == true else None)
            if guessed != true:
                break

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the fields and the frequencies."""
        names = ("most", "longest", "shortest", "past_edits")
        fields = {name: getattr(self, name) for name in names}
        table = self.frequencies.table()
        files.write(folder, self.name, fields, vocabulary=self.vocabulary, frequencies=table)

    def restore(self, config: DrafterConfig, tensors: dict[str, Tensor]) -> None:
        """Take over what `save` has written besides the fields."""
        self.frequencies.restore(config["frequencies"] or PRIOR)


def _special_tokens(model: PreTrainedModel) -> tuple[set[int], list[int]]:
    """Return the special tokens at the ends of a model's texts, and those that end them."""
    found: dict[str, list[int]] = {}
    for name in ("bos", "eos", "pad", "decoder_start", "forced_bos"):
        values = (getattr(config, f"{name}_token_id", None) for config in _configs(model))
        first = next((value for value in values if value is not None), [])
        found[name] = [first] if isinstance(first, int) else [*first]
    return {token for tokens in found.values() for token in tokens}, found["eos"]


def _configs(model: PreTrainedModel) -> list[object]:
    return [each for each in (getattr(model, "generation_config", None), model.config) if each]
