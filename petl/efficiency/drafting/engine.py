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
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import (
    BaseStreamer,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

from petl.core.layers.context import is_encoder_decoder
from petl.core.types import CausalModel
from petl.efficiency.drafting.calls import (
    GenerateCall,
    ModelInputs,
    check_arguments,
    plain_reason,
    plainly,
)
from petl.efficiency.drafting.costs import Costs
from petl.efficiency.drafting.pairs import GivenIds, encoder_ids
from petl.efficiency.drafting.passes import DraftPasses
from petl.efficiency.drafting.registry import Drafter, check_vocabulary
from petl.efficiency.drafting.registry import drafter as build
from petl.efficiency.drafting.rounds import Rounds, Take
from petl.efficiency.in_place_cache import cache_argument, write_in_place
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
        seconds: from the first token of an answer to the last.
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
    model: CausalModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Drafter | str | None = None,
    nodes: int | None = None,
    stats: Stats | None = None,
    stream: BaseStreamer | None = None,
    pack: bool | Literal["auto"] = "auto",
    costs: Costs | None = None,
    clock: Callable[[], float] = time.perf_counter,
    switch: bool = True,
    encoder_input_ids: GivenIds | None = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: object,
) -> object:
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
        pack: use packed copies of float32 weights on x86 CPUs (`petl.ops.packed`); "auto": after
            some passes, if there is memory for them.
        costs: of a pass; None: learned from the passes.
        clock: seconds now.
        switch: stop drafting for a while where it is slower than plain decoding.
        encoder_input_ids: tokens that the encoder of an encoder-decoder has read, for drafters that
            copy them, [1, S] or a list; needed where `generate` gets `encoder_outputs` in their
            place.
        inputs_tensor: of the encoder, as `generate` hands them on.
        model_kwargs: further inputs of the model.

    Returns:
        As `generate`: ids [rows, L], or with `return_dict_in_generate` an output with scores,
        logits and cache.

    Raises:
        InputError: a draft is no tree or has unknown tokens, the drafter was made for a vocabulary
            of another size, or an argument is out of range.
        UnsupportedError: `pack=True` on a machine or model without packed weights.
    """
    check_arguments(nodes, pack, generation_config)
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
    inputs = (encoder_input_ids, inputs_tensor)
    if encoder_input_ids is not None and not is_encoder_decoder(model):
        raise InputError(
            f"encoder_input_ids: {type(model).__name__} has no encoder; leave them out"
        )
    stats = stats or Stats()
    write_in_place(model_kwargs.get(cache_argument(model)))
    reason = plain_reason(given, model_kwargs)
    if drafter is not None and reason:
        warnings.warn(f"decoding without drafts: {reason}", stacklevel=2)
    if reason:
        return plainly(given, stream, model_kwargs)
    return Decoding(given, model_kwargs, settings, stats, stream, inputs).run()


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
        kwargs: ModelInputs,
        settings: DecodeSettings,
        stats: Stats,
        stream: BaseStreamer | None,
        inputs: tuple[GivenIds | None, Tensor | None],
    ) -> None:
        self.given, self.settings, self.stats, self.stream = given, settings, stats, stream
        self.tokens: Tokens = given.ids[0].tolist()
        self.passes = DraftPasses(given.model, given.ids, kwargs)
        self.encoder: list[int] | None = None
        if self.passes.is_pair:
            self.encoder = encoder_ids(given.model, *inputs, kwargs.get("attention_mask"))
        self.rounds = Rounds(
            given.model,
            settings.drafter,
            pack=settings.pack,
            costs=settings.costs,
            clock=settings.clock,
            switch=settings.switch,
        )
        config = given.config
        self.samples = bool(config.do_sample)
        keeps = bool(config.return_dict_in_generate)
        self.scores: list[Tensor] | None = [] if keeps and config.output_scores else None
        self.logits: list[Tensor] | None = [] if keeps and config.output_logits else None
        self._sort_criteria()
        is_simple = not (given.processors or self.samples or keeps)
        self.is_argmax = is_simple  # the tokens are those of the largest logits

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
    def run(self) -> object:
        """Decode until a criterion ends the answer, and return what `generate` returns."""
        clock, length = self.settings.clock, len(self.tokens)
        if self.stream is not None:
            self.stream.put(self.given.ids.cpu())
        drafter = self.settings.drafter
        with ExitStack() as stack:
            reads_states = drafter is not None and (drafter.needs.last or drafter.needs.prompt)
            stack.enter_context(self.passes.capturing(states=reads_states))
            has_ended = self._begin()
            began = clock()
            # behind the prefill, as in transformers: it changes how experts are computed
            stack.enter_context(self.given.model._optimize_model_for_decode())
            stack.enter_context(self.rounds.packing.classes())
            while not has_ended:
                has_ended = self._round()
        if self.stream is not None:
            self.stream.end()
        self.stats.tokens += len(self.tokens) - length
        self.stats.answers += 1
        self.stats.seconds += clock() - began
        return self._result()

    def _begin(self) -> bool:
        """Compute the prompt and its first token; return True if the answer ends there."""
        logits = self.passes.prefill(self.given.config)
        # some caches get their layers in the first pass
        reason = self.passes.refusal(len(self.tokens))
        drafter = self.rounds.drafter
        if reason and drafter is not None:
            warnings.warn(f"decoding without drafts: {reason}", stacklevel=4)
            self.rounds.drafter = drafter = None
        reads_prompt = drafter is not None and drafter.needs.prompt
        # a copy, as our list grows in place; `Root` shares it, for rounds of constant cost
        states = self.passes.states if reads_prompt else None
        self.rounds.start(self.tokens[:], states, self.encoder)
        return self._choose(logits[-1:])(0) is None

    def _round(self) -> bool:
        """Make a round; return True if the answer has ended."""
        # the root is at len(self.tokens) - 1: the last token of the answer cannot be a draft, nor
        # one at a position that the model does not have
        limits = (self.limit, None if self.passes.limit is None else self.passes.limit + 1)
        rooms = [limit - len(self.tokens) - 1 for limit in limits if limit is not None]
        depth = max(0, min(rooms)) if rooms else None
        found = self.rounds.run(
            self.passes, self.tokens, self._choose, budget=self.settings.nodes, depth=depth
        )
        self.stats.passes += 1
        self.stats.drafted += found.drafted
        self.stats.accepted += found.tokens - 1
        if self.rounds.switch.is_due and not found.has_ended:
            self.rounds.judge()
        return found.has_ended

    # Tokens

    def _choose(self, logits: Tensor) -> Take:
        """Return what emits the model's own token behind a node, by its logits of [N, V]."""
        likeliest = logits.argmax(-1).tolist() if self.is_argmax else None

        def take(node: int) -> int | None:
            token = self._chosen(logits[node]) if likeliest is None else likeliest[node]
            return None if self._emit(token) else token

        return take

    def _chosen(self, logits: Tensor) -> int:
        """Return the token that plain decoding takes for these logits, [V]."""
        ids: Any = self.passes.all_ids(self.tokens)
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
            ids = self.passes.all_ids(self.tokens)
            ended = bool(self.others(ids, scores).all()) or ended
        return ended

    def _result(self) -> object:
        ids = self.passes.all_ids(self.tokens)
        if not self.given.config.return_dict_in_generate:
            return ids
        found: ModelInputs = {
            "sequences": ids,
            "scores": None if self.scores is None else tuple(self.scores),
            "logits": None if self.logits is None else tuple(self.logits),
            self.passes.cache_name: self.passes.cache,
        }
        kind = GenerateEncoderDecoderOutput if self.passes.is_pair else GenerateDecoderOnlyOutput
        return kind(**found)
