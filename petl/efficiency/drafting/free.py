"""Drafters without training together: text that repeats is copied, other text is recycled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.core.layers.context import is_encoder_decoder
from petl.core.types import CausalModel, base_of
from petl.efficiency.drafting import folder as files
from petl.efficiency.drafting.aggressive import Aggressive
from petl.efficiency.drafting.answers import DraftAnswers
from petl.efficiency.drafting.costs import TYPICAL
from petl.efficiency.drafting.lookup import Lookup
from petl.efficiency.drafting.recycling import Recycling
from petl.efficiency.drafting.registry import (
    Draft,
    Drafter,
    DrafterConfig,
    Needs,
    PassOutput,
    Root,
    fields_of,
    register,
)
from petl.efficiency.drafting.tree import best_count
from petl.errors import InputError

PARTS = ("lookup", "aggressive", "recycling")
NOTHING = Draft(*torch.empty(2, 0, dtype=torch.long), torch.empty(0))


@register("free")
class Free(Drafter):
    """The chain that is copied, if there is one, and the tree of `recycling`, from one root.

    `lookup` copies the text of a decoder, `aggressive` the input of an encoder-decoder. Equal
    beginnings are merged, and the budget goes to the chain first.

    Attributes:
        copied: number of nodes of the last draft that are the chain's; they come first.
    """

    needs = Needs(logits=True, encoder=True)
    parts = PARTS  # whose fields it takes

    def __init__(self, model: nn.Module | None = None, **fields: Any) -> None:
        """Build both drafters.

        Args:
            model: that they draft for.
            fields: of `recycling`, and of `lookup` or `aggressive`.

        Raises:
            InputError: a value is out of range, or a field is of the one that does not copy.
        """
        super().__init__()
        lookup, aggressive, recycling = (
            # no name is a field of two, or one value would go to two drafters
            {name: value for name, value in fields.items() if name in fields_of(part)}
            for part in PARTS
        )
        is_pair = model is not None and is_encoder_decoder(base_of(model))
        unused, copies = (lookup, "aggressive") if is_pair else (aggressive, "lookup")
        if unused:
            raise InputError(
                f"{next(iter(unused))} is no field of free for {type(model).__name__}, whose text "
                f"{copies} copies: leave it out"
            )
        aggressive.setdefault("past_edits", True)
        copier = Aggressive(model, **aggressive) if is_pair else Lookup(model, **lookup)
        self.copier: Aggressive | Lookup = copier
        self.recycling = Recycling(model, **recycling)
        self.vocabulary = self.recycling.vocabulary
        self.copied, self.copies = 0, True
        self.is_planned = fields.get("nodes", "auto") == "auto" and fields.get("template") is None

    def start(
        self, ids: Sequence[int], states: Tensor | None, encoder: Sequence[int] | None = None
    ) -> None:
        """Begin a row in both."""
        # sound and embeddings have no tokens to copy
        self.copies = bool(encoder) or isinstance(self.copier, Lookup)
        for part in (self.copier, self.recycling)[not self.copies :]:
            part.costs = self.costs
            part.begin(ids, states, encoder)

    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return the chain, then nodes of the tree as long as they pay, or up to the budget."""
        self.copier.costs = self.recycling.costs = self.costs
        chain = self.copier.draft(root, budget) if self.copies else NOTHING
        merged, chances = merge(chain, self.recycling.draft(root, budget))
        count = len(merged.tokens)
        if self.is_planned:
            count = max(len(chain.tokens), best_count(chances, self.costs or TYPICAL))
        count = count if budget is None else min(count, budget)
        self.copied = min(count, len(chain.tokens))
        chance = merged.probabilities
        assert chance is not None
        return Draft(merged.tokens[:count], merged.parents[:count], chance[:count])

    def observe(self, seen: PassOutput) -> None:
        """Learn in both."""
        self.copier.observe(seen)
        self.recycling.observe(seen)

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the table and frequencies of `recycling`, and the fields of both.

        What copies counts anew in each process.
        """
        root = Path(folder)
        self.recycling.save(root, tokenizer)
        config = files.read(root)
        # overwrites the config, which is why it was read; what copies has no tensors
        self.copier.save(root)
        fields = {**files.read(root)["fields"], **config["fields"]}
        own: DrafterConfig = {**config, "name": self.name, "fields": fields}
        files.write_config(root, own)

    def fill(self, answers: DraftAnswers, model: CausalModel) -> None:
        """Learn from answers of a model, see `Recycling.fill`."""
        self.recycling.fill(answers, model)

    def restore(self, config: DrafterConfig, tensors: dict[str, Tensor]) -> None:
        """Take over what `save` has written besides the fields."""
        self.recycling.restore(config, tensors)


def merge(chain: Draft, other: Draft) -> tuple[Draft, list[float]]:
    """Put a chain and a tree together: the chain's nodes, then those of the tree by probability.

    Args:
        chain: with probabilities.
        other: a tree with probabilities.

    Returns:
        Both as one tree, and the probability that each node is right, given the root only.
    """
    tokens, parents = chain.tokens.tolist(), list(range(len(chain.tokens)))
    known = _values(chain.probabilities, len(tokens))
    right = [1.0]  # of each node, the root included
    for i, chance in enumerate(known):
        right.append(right[i] * chance)
    by_token = [{token: i + 1} for i, token in enumerate(tokens)] + [{}]
    number = [0]  # in the result, of each node of the tree
    conditional = _values(other.probabilities, len(other.tokens))
    triples = zip(other.tokens.tolist(), other.parents.tolist(), conditional, strict=True)
    for token, parent, chance in triples:
        above = number[parent]
        found = by_token[above].get(token)
        if found is None:
            # where the chain has a guess, this one is right only if that one is wrong
            missed = 1 - known[above] if above < len(known) else 1.0
            found = len(tokens) + 1
            tokens.append(token)
            parents.append(above)
            right.append(right[above] * missed * chance)
            by_token[above][token] = found
            by_token.append({})
        number.append(found)
    order = [*range(1, len(known) + 1)]
    # a node is never likelier than its parent, and the sort is stable: parents stay before children
    order += sorted(range(len(known) + 1, len(tokens) + 1), key=lambda node: -right[node])
    place = {0: 0} | {node: i for i, node in enumerate(order, start=1)}
    chances = [right[node] for node in order]
    draft = Draft(
        torch.tensor([tokens[node - 1] for node in order], dtype=torch.long),
        torch.tensor([place[parents[node - 1]] for node in order], dtype=torch.long),
        torch.tensor(chances),
    )
    return draft, chances


def _values(probabilities: Tensor | None, count: int) -> list[float]:
    assert probabilities is not None
    return probabilities.tolist()[:count]
