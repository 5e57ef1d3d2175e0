"""Decoding with drafts: one pass verifies several guessed tokens; the output does not change.

`decode` is a function for `generate(custom_generate=...)` of transformers. A round is: the drafter
guesses a tree of tokens behind the last known one (the root), one pass computes all of them, and a
walk from the root takes the model's own token at each node, as long as a child has guessed it. In
sampling, each token is one draw as in plain sampling, with the same generator in the same order.
Shapes: L tokens of prompt and answer, N nodes of a pass, V tokens of the vocabulary, H width.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from petl.efficiency.drafting import tree
from petl.efficiency.drafting.cache import cache_argument
from petl.efficiency.drafting.calls import (
    GenerateCall,
    check_arguments,
    check_rows,
    each_row,
    plain_reason,
    plainly,
    reason_of_row,
    stacked,
)
from petl.efficiency.drafting.costs import QUICK, TYPICAL, Costs
from petl.efficiency.drafting.fields import check_vocabulary
from petl.efficiency.drafting.packing import Packing
from petl.efficiency.drafting.passes import DraftPasses
from petl.efficiency.drafting.policy import Switch, switch_of
from petl.efficiency.drafting.registry import Drafter, PassOutput, Root
from petl.efficiency.drafting.registry import drafter as build
from petl.errors import InputError

Tokens = list[int]


@dataclass
class Stats:
    """Counts of decoding, added up over calls.

    Attributes:
        tokens: of the answers.
        passes: after those over the prompts.
        drafted: tokens that were guessed and verified.
        accepted: those of them that were right.
        seconds: from the first token of an answer to the last, without measuring costs.
        answers: number of rows.
    """

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    answers: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of a pass after that over the prompt; 0 without such a pass."""
        # the pass over the prompt gives the first token
        return (self.tokens - self.answers) / self.passes if self.passes else 0.0


def decode(  # noqa: PLR0913 - its keywords are those of `generate`
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Drafter | str | None = None,
    nodes: int | None = None,
    stats: Stats | None = None,
    stream: Any = None,
    rows: Literal["sequential"] | None = None,
    pack: bool | Literal["auto"] = "auto",
    costs: Costs | None = None,
    clock: Callable[[], float] = time.perf_counter,
    switch: bool = True,
    **model_kwargs: Any,
) -> Any:
    """Generate with drafts: `model.generate(..., custom_generate=decode, drafter=...)`.

    transformers prepares the arguments up to `generation_config`. More than one row, beams and
    models whose cache cannot be cropped are decoded plainly, with one warning. transformers does
    not hand `tokenizer` and `assistant_model` to a function: in place of `stop_strings` pass
    `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`; an assistant is not used.

    Args:
        model: the model of transformers, with its adapters.
        input_ids: [rows, L].
        logits_processor: prepared by `generate`.
        stopping_criteria: prepared by `generate`.
        generation_config: prepared by `generate`.
        drafter: guesses; a name stands for the registered one with its defaults; None: no drafts.
        nodes: the most drafts of a pass; None: as the drafter likes.
        stats: is filled with counts, except where rows are decoded plainly.
        stream: a streamer of transformers; `streamer` itself does not reach this function.
        rows: "sequential": decode several rows one after the other, with drafts.
        pack: use packed copies of float32 weights on x86 CPUs (`petl.ops.packed`); "auto": after
            some passes, if there is memory for them.
        costs: of a pass; None: measured when they are needed.
        clock: seconds now.
        switch: stop drafting for a while where it is slower than plain decoding.
        model_kwargs: further inputs of the model.

    Returns:
        As `generate`: ids [rows, L], or with `return_dict_in_generate` an output with scores,
        logits and cache.

    Raises:
        InputError: a draft is no tree or has unknown tokens, the drafter was made for a vocabulary
            of another size, or an argument is out of range.
        UnsupportedError: `pack=True` on a machine or model without packed weights.
    """
    check_arguments(nodes, rows, pack, generation_config)
    if isinstance(drafter, str):
        drafter = build(drafter, model=model)
    for name, value, kind in (
        ("drafter", drafter, Drafter),
        ("stats", stats, Stats),
        ("costs", costs, Costs),
    ):
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name}={value!r} is no petl.drafting.{kind.__name__}")
    if drafter is not None:
        check_vocabulary(drafter.name or type(drafter).__name__, drafter.vocabulary, model)
    given = GenerateCall(model, input_ids, logits_processor, stopping_criteria, generation_config)
    settings = DecodeSettings(drafter, nodes, pack, costs, clock, switch)
    stats = stats or Stats()
    # the rows one after the other, if each of them could be drafted alone
    if len(input_ids) > 1 and rows == "sequential" and not reason_of_row(given, model_kwargs):
        check_rows(given, model_kwargs, stream)
        answers = [
            Decoding(row, kwargs, settings, stats, None).run()[0]
            for row, kwargs in each_row(given, model_kwargs)
        ]
        return stacked(answers, generation_config)
    reason = plain_reason(given, model_kwargs)
    if drafter is not None and reason:
        warnings.warn(f"decoding without drafts: {reason}", stacklevel=2)
    if reason:
        return plainly(given, stream, model_kwargs)
    return Decoding(given, model_kwargs, settings, stats, stream).run()


@dataclass
class DecodeSettings:
    """The arguments of `decode` that are its own."""

    drafter: Drafter | None
    nodes: int | None
    pack: bool | Literal["auto"]
    costs: Costs | None
    clock: Callable[[], float]
    switch: bool


class Decoding:
    """The state of one row: ids, a cache over all but the last (the root), and a drafter."""

    def __init__(
        self,
        given: GenerateCall,
        kwargs: dict[str, Any],
        settings: DecodeSettings,
        stats: Stats,
        stream: Any,
    ) -> None:
        self.given, self.settings, self.stats, self.stream = given, settings, stats, stream
        self.model: nn.Module = given.model
        self.drafter = settings.drafter
        self.ids = given.ids  # [1, L], see `_all_ids`
        self.tokens: Tokens = given.ids[0].tolist()
        self.passes = DraftPasses(given.model, kwargs)
        self.packing = Packing(given.model, settings.pack)
        has_switch = settings.switch and self.drafter is not None
        self.switch = switch_of(self.drafter) if has_switch else Switch(enabled=False)
        known = None if self.drafter is None else self.drafter.costs  # of an earlier call
        self.costs = known if settings.costs is None else settings.costs
        config = given.config
        self.samples = bool(config.do_sample)
        keeps = bool(config.return_dict_in_generate)
        self.scores: list[Tensor] | None = [] if keeps and config.output_scores else None
        self.logits: list[Tensor] | None = [] if keeps and config.output_logits else None
        self._sort_criteria()
        is_simple = not (given.processors or self.samples or keeps)
        self.is_argmax = is_simple  # the tokens are those of the largest logits
        self.measuring = 0.0  # seconds
        self.state_row = -1  # of the states of the last pass: that which chose the root
        self.vocabulary = given.model.config.get_text_config().vocab_size

    def _sort_criteria(self) -> None:
        """Split criteria into those that need the last token and the length, and others."""
        self.limit, self.ends, self.others = None, set(), StoppingCriteriaList()
        for each in self.given.criteria:
            # exact types: a subclass may decide otherwise; these two need no tensor of all ids
            if type(each) is MaxLengthCriteria:
                known = [n for n in (self.limit, each.max_length) if n is not None]
                self.limit = min(known)
            elif type(each) is EosTokenCriteria:
                self.ends |= {*each.eos_token_id.flatten().tolist()}
            else:
                self.others.append(each)

    # The loop

    @torch.no_grad()
    def run(self) -> Any:
        """Decode until a criterion ends the answer, and return what `generate` returns."""
        clock, length = self.settings.clock, len(self.tokens)
        if self.stream is not None:
            self.stream.put(self.given.ids.cpu())
        needs = None if self.drafter is None else self.drafter.needs
        with ExitStack() as stack:
            reads_states = needs is not None and (needs.last or needs.prompt)
            stack.enter_context(self.passes.capturing(states=reads_states))
            has_ended = self._begin()
            began = clock()
            # behind the prefill, as in transformers: it changes how experts are computed
            stack.enter_context(self.given.model._optimize_model_for_decode())
            stack.enter_context(self.packing.classes())
            while not has_ended:
                has_ended = self._round(clock)
        if self.stream is not None:
            self.stream.end()
        self.stats.tokens += len(self.tokens) - length
        self.stats.answers += 1
        self.stats.seconds += clock() - began - self.measuring
        return self._result()

    def _begin(self) -> bool:
        """Compute the prompt and its first token; return True if the answer ends there."""
        logits = self.passes.prefill(self.given.ids, self.given.config)
        # some caches get their layers in the first pass
        reason = self.passes.refusal(len(self.tokens))
        if reason and self.drafter is not None:
            warnings.warn(f"decoding without drafts: {reason}", stacklevel=4)
            self.drafter = None
        if self.drafter is not None:
            needs = self.drafter.needs
            self.drafter.costs = self.costs
            # a copy, as our list grows in place; `Root` shares it, for rounds of constant cost
            self.drafter.start(self.tokens[:], self.passes.states if needs.prompt else None)
        _, has_ended = self._walk([{}], logits[-1:])
        return has_ended

    def _round(self, clock: Callable[[], float]) -> bool:
        """Draft, verify and learn once; return True if the answer has ended."""
        length = len(self.tokens)
        if self.drafter is None or not self.switch.is_on:
            has_ended = self._verify([], [])
            self.switch.rest(len(self.tokens) - length)
            return has_ended
        began = clock()
        tokens, parents = self._draft(self.drafter)
        has_ended = self._verify(tokens, parents)
        cost = (self.costs or TYPICAL).ratio(len(tokens) + 1) - 1
        self.switch.add(len(self.tokens) - length, clock() - began, cost)
        # measuring, at the first judgement only, is not part of a round
        if self.switch.is_due and not has_ended:
            self.switch.judge(self._measured().seconds[1])
        return has_ended

    def _draft(self, drafter: Drafter) -> tuple[Tokens, Tokens]:
        """Return tokens and parents of the drafts that are verified."""
        budget = self.settings.nodes
        state = None if self.passes.states is None else self.passes.states[self.state_row]
        draft = drafter.draft(Root(self.tokens, state), budget)
        chains_only = self.passes.chains_only
        return tree.fitted(
            draft, self.vocabulary, budget=budget, depth=self._room(), chains_only=chains_only
        )

    def _room(self) -> int | None:
        """Return how deep drafts may be; None without a limit."""
        # the root is at len(self.tokens) - 1: the last token of the answer cannot be a draft, nor
        # one at a position that the model does not have
        limits = (self.limit, None if self.passes.limit is None else self.passes.limit + 1)
        rooms = [limit - len(self.tokens) - 1 for limit in limits if limit is not None]
        return max(0, min(rooms)) if rooms else None

    def _verify(self, tokens: Tokens, parents: Tokens) -> bool:
        """Compute root and drafts in one pass, and take over what is right."""
        count = len(tokens) + 1
        padded = count
        if count > 1 and self.costs is not None and self.passes.has_room(self.costs.padded(count)):
            padded = self.costs.padded(count)
        # a root alone takes the plain weights: faster, and rounded as in plain decoding
        copies = self.packing.active() if padded > 1 else nullcontext()
        root = self.tokens[-1]
        with copies:
            logits = self.passes.run(self._all_ids(), tokens, parents, padded)
        path, has_ended = self._walk(tree.children(tokens, parents), logits)
        # also at the end: a cache that is returned holds all ids but the last, as in `generate`
        self.passes.keep(path, padded)
        self.state_row = path[-1]
        # after the walk, which may raise in a criterion
        self.stats.passes += 1
        self.stats.drafted += len(tokens)
        self.stats.accepted += len(path) - 1
        if self.drafter is not None and self.switch.is_on:
            needs = self.drafter.needs
            # not in plain rounds: the drafter has guessed nothing there
            self.drafter.observe(
                PassOutput(
                    torch.tensor([root, *tokens]),
                    torch.tensor(parents, dtype=torch.long),
                    logits if needs.logits else None,
                    self.passes.states if needs.last else None,
                    path,
                )
            )
        return has_ended

    # Tokens

    def _walk(self, children: list[dict[int, int]], logits: Tensor) -> tuple[list[int], bool]:
        """Emit the model's tokens from the root, as far as drafts hold them.

        Args:
            children: of each node, by token.
            logits: of each node, [N, V].

        Returns:
            The numbers of the accepted nodes, 0 first, and whether the answer has ended.
        """
        likeliest = logits.argmax(-1).tolist() if self.is_argmax else None
        path = [0]
        while True:
            node = path[-1]
            token = self._chosen(logits[node]) if likeliest is None else likeliest[node]
            # the last token is never entered, even if it was drafted: the cache lacks it
            if self._emit(token):
                return path, True
            child = children[node].get(token)
            if child is None:
                return path, False
            path.append(child)

    def _chosen(self, logits: Tensor) -> int:
        """Return the token that plain decoding takes for these logits, [V]."""
        ids: Any = self._all_ids()
        # a copy, since processors may write in place; float32, as plain decoding draws from
        row = logits[None].to(copy=True, dtype=torch.float32, device=ids.device)
        scores = self.given.processors(ids, row)
        if self.logits is not None:
            self.logits.append(row)
        if self.scores is not None:
            self.scores.append(scores)
        if not self.samples:
            return int(scores.argmax(-1))
        # the call of transformers, so that the generator gives the same draw
        return int(torch.multinomial(scores.softmax(-1), num_samples=1))

    def _emit(self, token: int) -> bool:
        """Append a token to the answer; return True if it ends there."""
        self.tokens.append(token)
        if self.stream is not None:
            self.stream.put(torch.tensor([token]))
        ended = token in self.ends or (self.limit is not None and len(self.tokens) >= self.limit)
        if self.others:
            scores = None if self.scores is None else tuple(self.scores)
            ended = bool(self.others(self._all_ids(), scores).all()) or ended
        return ended

    def _all_ids(self) -> Tensor:
        """Return the ids of prompt and answer, [1, L]."""
        missing = len(self.tokens) - self.ids.shape[1]
        if missing:
            self.ids = torch.cat([self.ids, self.ids.new_tensor([self.tokens[-missing:]])], 1)
        return self.ids

    # Costs and the result

    def _measured(self) -> Costs:
        """Return the costs of a pass, measured once if they were not given."""
        if self.costs is None:
            began = self.settings.clock()
            self.costs = Costs.measure(
                self.model, counts=QUICK, rounds=3, packed=self.packing.weights
            )
            self.measuring += self.settings.clock() - began
            if self.drafter is not None:
                self.drafter.costs = self.costs
        return self.costs

    def _result(self) -> Any:
        ids: Any = self._all_ids()
        if not self.given.config.return_dict_in_generate:
            return ids
        found: dict[str, Any] = {
            "sequences": ids,
            "scores": None if self.scores is None else tuple(self.scores),
            "logits": None if self.logits is None else tuple(self.logits),
            cache_argument(self.model): self.passes.cache,
        }
        return GenerateDecoderOnlyOutput(**found)
