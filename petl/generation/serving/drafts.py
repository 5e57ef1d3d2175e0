"""Drafts for a request that is alone in its batch: one pass verifies several guessed tokens.

As `petl.drafting.decode`, with the choices, the cache and the mask of a batch, so that others can
join after each pass. Shapes: T tokens of prompt and answer, N nodes of a pass, V tokens of the
vocabulary.
"""

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from petl.efficiency.drafting import tree
from petl.efficiency.drafting.cache import compact
from petl.efficiency.drafting.costs import QUICK, TYPICAL, Costs
from petl.efficiency.drafting.packing import Packing
from petl.efficiency.drafting.passes import takes_trees
from petl.efficiency.drafting.policy import switch_of
from petl.efficiency.drafting.registry import PassOutput, Root, drafter

if TYPE_CHECKING:
    from petl.generation.serving.request import Request


class Drafts:
    """The drafter of a model's lane, and the request that it guesses for."""

    def __init__(self, base: Any, name: str) -> None:
        """Build the drafter `name` for a model of transformers, with its adapters."""
        self.base = base
        self.drafter = drafter(name, model=base)
        self.switch = switch_of(self.drafter)
        self.packing = Packing(base, "auto")
        self.chains_only = not takes_trees(base)
        self.vocabulary = base.config.get_text_config().vocab_size
        self.request: Request | None = None
        self.ids: list[int] = []  # of prompt and answer

    def step(self, batch: Any) -> None:
        """Compute the next tokens of a `Batch` (petl/generation/serving/batch.py) of one row."""
        (request,) = batch.requests
        if not self.switch.is_on:
            batch.plain_step()
            self.request = None  # its tokens are not recorded
            self.switch.rest(1)
            return
        written = request.tokens
        began = time.perf_counter()
        # while others shared the batch, tokens came that are not recorded here
        if request is not self.request or len(self.ids) < len(request.prompt) + request.tokens:
            self._begin(request)
        draft = self.drafter.draft(Root(self.ids), None)
        # the last token of the answer cannot be a draft: the cache would have it
        depth = request.max_tokens - request.tokens - 1
        tokens, parents = tree.fitted(
            draft, self.vocabulary, budget=None, depth=depth, chains_only=self.chains_only
        )
        self._verify(batch, request, tokens, parents)
        cost = (self.drafter.costs or TYPICAL).ratio(len(tokens) + 1) - 1
        self.switch.add(request.tokens - written, time.perf_counter() - began, cost)
        if self.switch.is_due:
            self.switch.judge(self._costs(batch).seconds[1])

    def _begin(self, request: "Request") -> None:
        # also in the midst of an answer, when the others of a batch have ended
        self.request, self.ids = request, [*request.prompt, *request.text.ids]
        self.drafter.start(self.ids[:-1], None)

    def _verify(
        self, batch: Any, request: "Request", tokens: list[int], parents: list[int]
    ) -> None:
        """Compute root and drafts in one pass, and hand the request the tokens that are right."""
        nodes = [self.ids[-1], *tokens]
        batch.mask = pad(batch.mask, (0, 1), value=1)  # for the root
        logits = self._logits(batch, nodes, parents)
        children = tree.children(tokens, parents)
        likeliest = logits.argmax(-1).tolist()
        path: list[int] = [0]
        # the choices of plain decoding, until one of them was not drafted or ends the answer
        while True:
            node = path[-1]
            token = request.advance(likeliest[node], logits[node])
            if token is None:
                break
            self.ids.append(token)
            child = children[node].get(token)
            if child is None:
                break
            path.append(child)
        self.drafter.observe(
            PassOutput(
                torch.tensor(nodes),
                torch.tensor(parents, dtype=torch.long),
                logits if self.drafter.needs.logits else None,
                None,
                path,
            )
        )
        if token is None:
            batch.clear()
            self.request = None
            return
        # without the keys and values of drafts that were wrong
        compact(batch.cache, path, len(nodes))
        batch.mask = pad(batch.mask, (0, len(path) - 1), value=1)
        batch.last = [token]

    def _logits(self, batch: Any, nodes: list[int], parents: list[int]) -> Tensor:
        """Return the logits of all nodes, [N, V]."""
        device, count = batch.device, len(nodes)
        ids = torch.tensor([nodes], device=device)
        # behind the padding that the row may have on its left
        positions = batch.mask.sum(-1, keepdim=True) - 1
        positions = positions + torch.tensor([tree.depths(parents)], device=device)
        if tree.is_chain(parents):
            mask = pad(batch.mask, (0, count - 1), value=1)
        else:
            mask = tree.tree_mask(parents, batch.mask[0, :-1], self.base.dtype, device)
        with ExitStack() as stack:
            if count > 1:
                stack.enter_context(self.packing.classes())
                stack.enter_context(self.packing.active())
            return batch.passes.logits(ids, mask, positions, batch.cache, batch.names, keep=count)[
                0
            ]

    def _costs(self, batch: Any) -> Costs:
        """Return the costs of a pass; they are measured once, while the request waits."""
        with batch.passes.active():
            costs = Costs.measure(
                batch.passes.model.model, counts=QUICK, rounds=3, packed=self.packing.weights
            )
        self.drafter.costs = costs
        return costs
