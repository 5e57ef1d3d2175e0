"""A batch of answers in progress: requests join it after a pass over their prompts, and leave it.

A row that is alone is decoded with drafts, as by `petl.drafting.decode`, with the choices, the
cache and the mask of the batch, so that others can join after each pass. Shapes: B rows, T tokens
of prompt and answer, Q tokens of a pass, N nodes of one over drafts, V tokens of the vocabulary.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from petl.core.layers.mixed_batch import AdapterRows
from petl.core.masks import positions_in
from petl.core.parameters import max_positions
from petl.core.types import Arguments, CausalModel
from petl.data.tasks.base import pad_id
from petl.data.tasks.image_text.prompt import ImagePrompt
from petl.efficiency.drafting import tree
from petl.efficiency.drafting.cache import compact
from petl.efficiency.drafting.calls import why_plain
from petl.efficiency.drafting.passes import counts_places, has_position_table, takes_trees
from petl.efficiency.drafting.registry import drafter
from petl.efficiency.drafting.rounds import Rounds, Take
from petl.efficiency.in_place_cache import cache_argument
from petl.errors import UnsupportedError, printable
from petl.generation.inference.language_model import BASE, LanguageModel
from petl.generation.serving import kv_cache
from petl.generation.serving.prefixes import BLOCK, PrefixCache, PromptBlock, fill
from petl.generation.serving.request import Request
from petl.training.generation import padded

NO_ADAPTER = "__base__"  # PEFT's word
# of logits, relative; assumption: rounding to 8 bits makes less, another text more
GAP = 0.2
logger = logging.getLogger(__name__)


def name_of(adapter: str) -> str:
    """Return PEFT's name of what a request chooses."""
    return NO_ADAPTER if adapter == BASE else adapter


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of a difference of logits, relative to that of their spread."""
    return float((found - expected).norm() / (expected - expected.mean(-1, True)).norm())


class BatchPasses:
    """Forward passes of a model for the next token of several rows.

    Attributes:
        adapter: the one adapter of all rows; None: each row has its own.
        count: number of passes so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        adapter: str | None,
        *,
        drafter: str | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Prepare passes of a model.

        Args:
            model: with its adapters.
            adapter: the one adapter of all rows; None: each row has its own.
            drafter: what guesses tokens of a row that is alone, as of `petl.drafting.drafter`, if
                the model can verify guesses; None: nothing.
            prefixes: known beginnings of prompts, if passes behind them are right; None: none.
        """
        self.model, self.adapter = model, adapter
        self.count = 0
        self.mergeable = kv_cache.holds_only_keys_and_values(model.base.config)
        accepted = inspect.signature(model.base.forward).parameters
        self.cache_argument = cache_argument(model.base)
        self.takes_positions = "position_ids" in accepted
        self.has_keep = "logits_to_keep" in accepted
        # the module of a model whose positions depend on its images, and which stores their shift
        modules = model.base.modules()
        self.shifting: Any = next((m for m in modules if hasattr(m, "rope_deltas")), None)
        # passes over several tokens behind a cache are right
        goes_on = self.mergeable and not why_plain(model.base)
        self.prefixes = prefixes if goes_on else None
        self.counts_places = counts_places(model.base)
        can_draft = drafter is not None and goes_on
        self.drafts = Drafts(model.base, str(drafter)) if can_draft else None

    def check(self, ids: Sequence[int], adapter: str) -> None:
        """Compare passes behind a cache, and beside a longer row, with those over whole rows.

        Where padding changes logits, rows are not put together from now on.

        Args:
            ids: of a text, three or more.
            adapter: of all rows, unless these passes have one.

        Raises:
            UnsupportedError: passes behind a cache differ: the model has states that it lacks.
        """
        rows = [ids, ids[:-2]] if self.mergeable else [ids]
        try:
            expected = [self._last_logits([row], 0, adapter) for row in rows]
            gap = relative(self._last_logits(rows, len(ids) - 1, adapter), torch.cat(expected))
            if gap > GAP and self.mergeable:
                gap = relative(self._last_logits([ids], len(ids) - 1, adapter), expected[0])
                self.mergeable = gap > GAP
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._unserved(f"it has no cache to go on behind ({printable(error)})") from error
        if not gap < GAP:
            raise self._unserved(
                f"behind a cache its logits are others, by {gap:.2g} of their norm"
            )
        if len(rows) > 1 and not self.mergeable:
            logger.info("requests are answered one after the other: padding changes the logits")

    def _unserved(self, reason: str) -> UnsupportedError:
        name = type(self.model.base).__name__
        return UnsupportedError(
            f"petl serve cannot answer with {name}: {reason}; use petl generate"
        )

    def _last_logits(self, rows: Sequence[Sequence[int]], known: int, adapter: str) -> Tensor:
        """Return the logits behind rows, [B, V], in one pass, or in two, the first over `known`."""
        inputs = padded(rows, pad_id(self.model.tokenizer), on_left=True)
        ids, mask = (each.to(self.model.base.device) for each in inputs.values())
        names = AdapterRows([name_of(adapter)] * len(rows), is_generation_call=True)
        cache, shifts = self.new_cache(), [0] * len(rows)
        if known:
            self.next_logits(ids[:, :known], mask[:, :known], cache, names, shifts)
        return self.next_logits(ids[:, known:], mask, cache, names, shifts)

    def new_cache(self) -> DynamicCache:
        """An empty cache for these passes."""
        return kv_cache.new_cache(self.model.base.config, mergeable=self.mergeable)

    def known(self, request: Request) -> list[PromptBlock]:
        """Return the known blocks at the beginning of a prompt of text."""
        if self.prefixes is None or isinstance(request.prompt, ImagePrompt):
            return []
        return self.prefixes.find((id(self), request.adapter), request.prompt)

    def remember(self, batch: "Batch", known: int) -> None:
        """Keep the beginnings of the prompts that a batch has just read.

        Args:
            known: tokens of each that it has not computed.
        """
        if self.prefixes is None:
            return
        # virtual tokens have entries, too
        if {layer.keys.shape[2] for layer in kv_cache.filled(batch.cache)} != {batch.mask.shape[1]}:
            return
        # layers of a method's own, such as the states of a router, have more to keep
        if not kv_cache.has_plain_layers(batch.cache):
            return
        for row, request in enumerate(batch.requests):
            owner = id(self), request.adapter
            self.prefixes.add(owner, request.prompt, batch.cache, row, known)

    def next_logits(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: DynamicCache,
        names: AdapterRows,
        shifts: Sequence[int],
    ) -> Tensor:
        """Return the logits of the next tokens, [B, V].

        Args:
            ids: the tokens that are not in the cache, [B, Q].
            mask: 0 at padding, [B, T], with the tokens in the cache.
            names: the adapter of each row.
            shifts: of the positions of each row, from `read_images`.
        """
        # positions count the row's own tokens, without the padding on its left
        positions = positions_in(mask)[:, -ids.shape[1] :]
        positions = positions + torch.tensor(shifts, device=ids.device)[:, None]
        # only the last position: the logits of a long prompt would take much memory
        return self.logits(ids, mask, positions, cache, names, keep=1)[:, -1]

    def read_images(
        self, prompt: ImagePrompt, cache: DynamicCache, names: AdapterRows
    ) -> tuple[Tensor, int]:
        """Return the logits of the next token of a prompt with images, [1, V].

        And the shift of the positions of its next tokens against their number, which is 0 but for
        models whose images take fewer positions than tokens.
        """
        device = self.model.base.device
        more = {name: value.to(device) for name, value in prompt.inputs().items()}
        ids, mask = more.pop("input_ids"), more.pop("attention_mask")
        # such models compute the positions of images themselves
        own = self.shifting is not None and bool(prompt.images)
        positions = None if own else positions_in(mask)
        logits = self.logits(ids, mask, positions, cache, names, keep=1, more=more)[:, -1]
        return logits, int(self.shifting.rope_deltas.sum()) if own else 0

    def logits(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: DynamicCache,
        names: AdapterRows,
        *,
        keep: int,
        more: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the logits after the last `keep` tokens, [B, keep, V].

        Args:
            ids: the tokens that are not in the cache, [B, Q].
            mask: 0 at padding, [B, T]; or the mask of a tree, [B, 1, Q, T]; None: no padding.
            positions: of the tokens, [B, Q]; None: the model computes them.
            names: the adapter of each row.
            more: other inputs.
        """
        inputs: Arguments = {
            "input_ids": ids,
            "attention_mask": mask,
            self.cache_argument: cache,
        }
        inputs |= more or {}
        if self.takes_positions and positions is not None:
            inputs["position_ids"] = positions
        if self.has_keep:
            inputs["logits_to_keep"] = keep
        if self.adapter is None:
            inputs["adapter_names"] = names
        self.count += 1
        model = self.model.model
        with torch.no_grad(), self.active():
            return model(**inputs, use_cache=True).logits[:, -keep:]

    def active(self) -> AbstractContextManager[None]:
        """Activate the adapter inside the block, if all rows have the same one."""
        return nullcontext() if self.adapter is None else self.model.using(self.adapter)


class Batch:
    """Rows that are computed together, token by token."""

    def __init__(self, passes: BatchPasses) -> None:
        self.passes = passes
        self.device = passes.model.base.device
        self.requests: list[Request] = []
        self.clear()

    def clear(self) -> None:
        """Drop all rows."""
        self.requests = []
        self.cache = self.passes.new_cache()
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.last: list[int] = []  # the last token of each row, which is not in the cache
        self.shifts: list[int] = []  # of the positions of each row
        self.names = AdapterRows([])

    def join(self, requests: Sequence[Request]) -> None:
        """Compute the first token of new requests in one pass, and add those that go on."""
        # a batch of its own for one pass: prompts have many tokens, running rows one
        newcomers = Batch(self.passes)
        newcomers.requests = [*requests]
        newcomers._read()
        if not self.requests:
            self.requests, self.cache, self.mask = (
                newcomers.requests,
                newcomers.cache,
                newcomers.mask,
            )
            self.shifts = []
        elif newcomers.requests:  # some are left; the others ended at their first token
            kv_cache.append(self.cache, newcomers.cache)
            length = max(self.mask.shape[1], newcomers.mask.shape[1])
            masks = (self.mask, newcomers.mask)
            # padding on the left, as in `kv_cache.append`
            self.mask = torch.cat([pad(mask, (length - mask.shape[1], 0)) for mask in masks])
            self.requests += newcomers.requests
        self.last += newcomers.last
        self.shifts += newcomers.shifts
        self._rename()

    def _read(self) -> None:
        """Run the pass over the prompts of requests: of one with images, or of several texts."""
        first = self.requests[0].prompt
        if isinstance(first, ImagePrompt):
            assert len(self.requests) == 1, "each by itself, see Slot.advance"
            self._rename()
            logits, shift = self.passes.read_images(first, self.cache, self.names)
            # of one prompt: no padding
            self.mask = torch.ones(1, len(first), dtype=torch.long, device=self.device)
            self.shifts = [shift]
            self._take(logits)
            return
        blocks = [self.passes.known(request) for request in self.requests]
        # of all as much as of the one with the least: see `Slot.advance`
        count = min(map(len, blocks))
        # prompts of different lengths have padding behind what is known
        if self.passes.counts_places and len({len(r.prompt) for r in self.requests}) > 1:
            count = 0
        if count:
            fill(self.cache, [each[:count] for each in blocks])
        known = count * BLOCK
        inputs = padded(
            [request.prompt[known:] for request in self.requests],
            pad_id(self.passes.model.tokenizer),
            on_left=True,  # so that the newest token of each row is in the last column
        )
        self.mask = pad(inputs["attention_mask"].to(self.device), (known, 0), value=1)
        self.shifts = [0] * len(self.requests)
        logits = self._next(inputs["input_ids"].to(self.device))
        self.passes.remember(self, known)
        for request in self.requests:
            request.cached = known
        self._take(logits)

    def step(self) -> None:
        """Compute the next token of all rows in one pass, and drafts if there is one row."""
        drafts = self.passes.drafts
        is_alone = len(self.requests) == 1
        if drafts is not None and is_alone and not isinstance(self.requests[0].prompt, ImagePrompt):
            drafts.step(self)
            return
        self.mask = pad(self.mask, (0, 1), value=1)  # for the tokens of `self.last`
        self._take(self._next(torch.tensor(self.last, device=self.device)[:, None]))

    def _next(self, ids: Tensor) -> Tensor:
        """Return the logits of the next tokens, [B, V], behind a pass over `ids`, [B, Q]."""
        if len(self.names) != len(self.requests):  # at the first pass of newcomers
            self._rename()
        return self.passes.next_logits(ids, self.mask, self.cache, self.names, self.shifts)

    def _take(self, logits: Tensor) -> None:
        """Hand each request its token, and drop those that are finished."""
        likeliest = logits.argmax(-1).tolist()  # of all rows, in one transfer from the device
        self.last, going_on = [], []
        for row, request in enumerate(self.requests):
            token = request.advance(likeliest[row], logits[row])
            if token is not None:
                going_on.append(row)
                self.last.append(token)
        if len(going_on) < len(self.requests):
            self._keep(going_on)

    def _keep(self, rows: list[int]) -> None:
        """Keep these rows only, without the padding that all of them have."""
        requests = [self.requests[row] for row in rows]
        self.shifts = [self.shifts[row] for row in rows]
        if not rows:
            self.clear()
            return
        self.requests = requests
        index = torch.tensor(rows, device=self.device)
        mask = self.mask[index]
        # argmax of equal values is the first: the column in which some row has its first token
        start = int(mask.any(0).int().argmax()) if self.passes.mergeable else 0
        self.mask = mask[:, start:]
        kv_cache.keep(self.cache, index, start)
        self._rename()

    def _rename(self) -> None:
        """Begin a new list of adapters, with which the layers' stacked weights are kept."""
        names = [name_of(request.adapter) for request in self.requests]
        self.names = AdapterRows(names, is_generation_call=True)


class Drafts:
    """The drafter of a model's lane, and the passes over the request that it guesses for."""

    states: Tensor | None = None  # drafters of requests read tokens and logits only
    batch: Batch

    def __init__(self, base: CausalModel, name: str) -> None:
        """Build the drafter `name` for a model of transformers, with its adapters."""
        self.base = base
        self.rounds = Rounds(base, drafter(name, model=base))
        self.chains_only = not takes_trees(base)
        self.limit = max_positions(base) if has_position_table(base) else None
        self.request: Request | None = None
        self.ids: list[int] = []  # of prompt and answer

    def step(self, batch: Batch) -> None:
        """Compute the next tokens of the only row of a batch."""
        self.batch, (request,) = batch, batch.requests
        # while others shared the batch, tokens came that are not recorded here
        if request is not self.request or len(self.ids) < len(request.prompt) + request.tokens:
            self.request, self.ids = request, [*request.prompt, *request.text.ids]
            self.rounds.start(self.ids[:-1], None)
        # the last token of the answer cannot be a draft: the cache would have it
        depth = request.max_tokens - request.tokens - 1
        found = self.rounds.run(self, self.ids, self._choose, depth=depth)
        if self.rounds.switch.is_due:
            self.rounds.judge()
        if found.has_ended:
            batch.clear()
            self.request = None
        else:
            batch.last = self.ids[-1:]

    def _choose(self, logits: Tensor) -> Take:
        likeliest = logits.argmax(-1).tolist()

        def take(node: int) -> int | None:
            # the choice of plain decoding
            (request,) = self.batch.requests
            token = request.advance(likeliest[node], logits[node])
            if token is not None:
                self.ids.append(token)
            return token

        return take

    # The passes of a round, see `Passes` of petl/efficiency/drafting/rounds.py

    def has_room(self, count: int) -> bool:
        """Return True if there are positions for a pass over `count` tokens."""
        return self.limit is None or self.batch.cache.get_seq_length() + count <= self.limit

    def run(
        self, ids: Sequence[int], tokens: Sequence[int], parents: Sequence[int], count: int
    ) -> Tensor:
        """Return the logits of a root and its drafts, [N, V]."""
        batch, nodes = self.batch, [ids[-1], *tokens]
        filled = torch.tensor([nodes + [0] * (count - len(nodes))], device=batch.device)
        # behind the padding that the row may have on its left
        depths = torch.tensor([tree.padded_depths(parents, count)], device=batch.device)
        positions = batch.mask.sum(-1, keepdim=True) + depths
        mask = tree.extended_mask(
            pad(batch.mask, (0, 1), value=1), parents, count, batch.mask.shape[1], self.base
        )
        with ExitStack() as stack:
            if count > 1:
                stack.enter_context(self.rounds.packing.classes())
            logits = batch.passes.logits(
                filled, mask, positions, batch.cache, batch.names, keep=count
            )
        return logits[0, : len(nodes)]

    def keep(self, path: Sequence[int], count: int) -> None:
        """Keep the accepted nodes: without the keys and values of drafts that were wrong."""
        compact(self.batch.cache, path, count)
        self.batch.mask = pad(self.batch.mask, (0, len(path)), value=1)
