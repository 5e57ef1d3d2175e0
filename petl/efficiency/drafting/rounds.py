"""A round of drafting: guess a tree of tokens, verify it in one pass, and learn from the pass.

`petl.drafting.decode` and `petl serve` make their rounds here, each with passes over a cache of its
own. Shapes: N nodes of a pass (the root, then the drafts), V tokens of the vocabulary, H width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor, nn

from petl.core.types import CausalModel
from petl.efficiency.drafting import tree
from petl.efficiency.drafting.costs import TYPICAL, UNPACKED, Costs, LearnedCosts
from petl.efficiency.drafting.policy import Switch, switch_of
from petl.efficiency.drafting.registry import Drafter, PassOutput, Root, vocabulary_of
from petl.errors import UnsupportedError
from petl.ops.packed import is_supported, packable, packed_classes, packed_weights

SHORTEST = 1e-9  # seconds of a pass, by a clock that has not moved
# from the number of a node to the model's own token behind it; None: the answer ends with it
Take = Callable[[int], int | None]


class Passes(Protocol):
    """Passes over one row behind a cache, which has all tokens but the root.

    Attributes:
        chains_only: True if the model cannot compute a tree.
        states: outputs of the final norm in the last pass, [N, H]; None unless they are captured.
    """

    chains_only: bool
    states: Tensor | None

    def has_room(self, count: int) -> bool:
        """Return True if there are positions for a pass over `count` tokens."""
        ...

    def run(
        self, ids: Sequence[int], tokens: Sequence[int], parents: Sequence[int], count: int
    ) -> Tensor:
        """Return the logits of a root, the last of `ids`, and its drafts, [N, V].

        The pass has `count` tokens; those beyond root and drafts only fill it up.
        """
        ...

    def keep(self, path: Sequence[int], count: int) -> None:
        """Keep the accepted nodes of a pass over `count` tokens in the cache; 0 is the first."""


class Round(NamedTuple):
    """What a round gave.

    Attributes:
        drafted: number of drafts.
        tokens: number of tokens of the answer.
        has_ended: True if the answer ends with the last of them.
    """

    drafted: int
    tokens: int
    has_ended: bool


class Rounds:
    """Rounds of a drafter on a model.

    Attributes:
        drafter: None: each round gives one token.
        switch: rests the drafter where it is slower than plain decoding.
        packing: of the model's weights, in passes over several tokens.
        costs: of a pass; learned from the rounds unless they are given.
    """

    def __init__(
        self,
        model: CausalModel,
        drafter: Drafter | None,
        *,
        pack: bool | Literal["auto"] = "auto",
        costs: Costs | None = None,
        clock: Callable[[], float] = time.perf_counter,
        switch: bool = True,
    ) -> None:
        """Prepare rounds; arguments as of `petl.drafting.decode`."""
        self.model, self.drafter, self.clock = model, drafter, clock
        self.vocabulary = vocabulary_of(model)
        self.packing = WeightPacking(model, pack, clock)
        has_switch = switch and drafter is not None
        self.switch = switch_of(drafter) if has_switch else Switch(enabled=False)
        known = None if drafter is None else drafter.costs  # of an earlier call
        expected = UNPACKED if self.packing.is_possible else TYPICAL
        self.costs = costs or known or LearnedCosts(expected)

    def start(
        self, ids: Sequence[int], states: Tensor | None, encoder: Sequence[int] | None = None
    ) -> None:
        """Begin a row, as `Drafter.start`."""
        self.state_row = -1  # of the states of the last pass: that which chose the root
        if self.drafter is not None:
            self.drafter.costs = self.costs
            self.drafter.begin(ids, states, encoder)

    def run(
        self,
        passes: Passes,
        ids: Sequence[int],
        choose: Callable[[Tensor], Take],
        *,
        budget: int | None = None,
        depth: int | None = None,
    ) -> Round:
        """Draft, verify and learn once.

        Args:
            passes: over the row.
            ids: all tokens, of which the last is the root; `choose` may append to them.
            choose: takes the logits of all nodes, [N, V].
            budget: number of drafts at most; None: as the drafter likes.
            depth: how deep they may be; None: no limit.
        """
        # a window that is due waits for a plain pass, to be compared with
        waits = self.switch.is_due and self.costs.plain is None
        drafter = self.drafter if self.switch.is_on and not waits else None
        began = self.clock()
        tokens, parents = [], []
        if drafter is not None:
            state = None if passes.states is None else passes.states[self.state_row]
            tokens, parents = tree.fitted(
                drafter.draft(Root(ids, state), budget)[:2],
                self.vocabulary,
                budget=budget,
                depth=depth,
                chains_only=passes.chains_only,
            )
        nodes = torch.tensor([ids[-1], *tokens])
        count = len(nodes)
        if count > 1 and passes.has_room(self.costs.padded(count)):
            count = self.costs.padded(count)
        drafted = self.clock() - began
        # a root alone takes the plain weights: faster, and rounded as in plain decoding
        with self.packing.active() if count > 1 else nullcontext():
            entered = self.clock()
            logits = passes.run(ids, tokens, parents, count)
        path, has_ended = accepted(tree.children(tokens, parents), choose(logits))
        # an accelerator has computed the pass once tokens are chosen, not when the call returns
        taken = self.clock() - entered
        if isinstance(self.costs, LearnedCosts):
            self.costs.add(count, max(taken, SHORTEST))
        if count > 1 and self.costs.plain is not None:
            self.packing.lose(taken - TYPICAL.ratio(count) * self.costs.plain)
        # also at the end: a cache that is returned holds all ids but the last, as in `generate`
        passes.keep(path, count)
        self.state_row = path[-1]
        if drafter is None:  # it has guessed nothing, so it learns nothing
            self.switch.rest(len(path))
            return Round(0, len(path), has_ended)
        needs, edges = drafter.needs, torch.tensor(parents, dtype=torch.long)
        shown = logits if needs.logits else None, passes.states if needs.last else None
        drafter.observe(PassOutput(nodes, edges, *shown, path))
        cost = self.costs.ratio(len(nodes)) - 1
        # without packing, which is done once and has its own measure of what it is worth
        self.switch.add(len(path), drafted + self.clock() - entered, cost)
        return Round(len(tokens), len(path), has_ended)

    def judge(self) -> None:
        """Compare a window that is due with plain decoding, once its time is known."""
        if self.costs.plain is not None:
            self.switch.judge(self.costs.plain)


def accepted(children: Sequence[Mapping[int, int]], take: Take) -> tuple[list[int], bool]:
    """Take the model's tokens from the root, as far as drafts hold them.

    Args:
        children: of each node, by token.

    Returns:
        The numbers of the accepted nodes, 0 first, and whether the answer has ended.
    """
    path = [0]
    while True:
        token = take(path[-1])
        # the last token is never entered, even if it was drafted: the cache lacks it
        if token is None:
            return path, True
        child = children[path[-1]].get(token)
        if child is None:
            return path, False
        path.append(child)


# When decoding packs the linear weights of a model, see `petl.ops.packed`


# of what passes with plain weights have lost: packing all of them takes as long as 8 to 35 passes
# over one token, which pays when about as much was lost
SHARE = 1 / 3


class WeightPacking:
    """The packed weights of a model while it decodes."""

    def __init__(
        self, model: nn.Module, pack: bool | Literal["auto"], clock: Callable[[], float]
    ) -> None:
        """Decide whether weights may be packed.

        Args:
            model: with its adapters.
            pack: True: from the first pass on; "auto": little by little, for a share of what
                passes lose without copies, if these take less than half of the free memory.
            clock: seconds now.

        Raises:
            UnsupportedError: `pack` is True, and there is nothing that can be packed.
        """
        self.model, self.clock, self._at_once = model, clock, pack is True
        layers = packable(model) if pack and is_supported() else []
        if pack is True and not layers:
            raise UnsupportedError(
                f"pack=True needs float32 nn.Linear layers on an x86 CPU with oneDNN, and "
                f"{type(model).__name__} on {getattr(model, 'device', 'this device')} in "
                f"{getattr(model, 'dtype', 'its dtype')} has none here; leave it at 'auto'"
            )
        if pack == "auto":
            unique: dict[int, Tensor] = {id(layer.weight): layer.weight for layer in layers}
            size = sum(weight.nbytes for weight in unique.values())
            layers = layers if 2 * size < psutil.virtual_memory().available else []
        self._layers, self._is_checked = layers, False
        self._copies = packed_weights(model) if layers else None

    @property
    def is_possible(self) -> bool:
        """True if passes over several tokens would be faster with copies, which there may be."""
        return self._copies is not None

    def classes(self) -> AbstractContextManager[None]:
        """Let linear layers look for packed copies inside the block."""
        return nullcontext() if self._copies is None else packed_classes(self.model)

    def lose(self, seconds: float) -> None:
        """Count what a pass took beyond one with packed weights."""
        if self._copies is not None:
            self._copies.lost += max(0.0, seconds)

    def active(self) -> AbstractContextManager[None]:
        """Use copies for a pass over several tokens, as far as they are worth making."""
        copies = self._copies
        if copies is None:
            return nullcontext()
        worth = math.inf if self._at_once else SHARE * copies.lost - copies.seconds
        if self._is_checked or not (copies.copies or worth > 0):
            copies.pack(self._layers, worth, self.clock)
        else:  # once per call: weights may have changed since
            copies.update(self.model, worth, self.clock)
            self._is_checked = True
        return copies.active() if copies.copies else nullcontext()
