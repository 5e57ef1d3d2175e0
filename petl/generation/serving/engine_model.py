"""A language model whose answers an engine of `petl serve` computes: `generate --engine`."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from petl.efficiency.drafting.engine import Stats
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.generation.inference.grammar import vocabulary_of
from petl.generation.inference.language_model import BASE, LanguageModel
from petl.generation.inference.loading import DEFAULT
from petl.generation.inference.sampling import AnswerText, Sample, Sampling
from petl.generation.serving.choice import Chooser, TokenChooser
from petl.generation.serving.engine import AnswerEngine, ServedAdapter
from petl.generation.serving.llama_cpp import load_llama
from petl.generation.serving.request import AnswerPart, Request

AT_A_TIME = 16  # answers that are computed at the same time
Pieces = SimpleQueue[tuple[int, AnswerPart | Exception]]  # with the number of the answer


@dataclass(frozen=True, kw_only=True)
class EngineModel(LanguageModel):
    """A language model that hands encoded prompts to an engine.

    Attributes:
        served: what the engine answers with, by adapter.
        seeds: of sampling, one an answer.
        active: the adapter that writes now, as the last entry.
    """

    engine: AnswerEngine
    served: Mapping[str, ServedAdapter]
    seeds: "count[int]" = field(default_factory=count)
    active: list[str] = field(default_factory=list)

    @contextmanager
    def using(self, name: str) -> Generator[None]:
        """Answer with an adapter, or for `BASE` without one, inside the block.

        Raises:
            UnknownNameError: there is no such adapter.
        """
        if name not in self.served:
            raise UnknownNameError(f"no adapter {name!r}{did_you_mean(name, self.names)}")
        self.active.append(name)
        try:
            yield
        finally:
            self.active.pop()

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        write: Callable[[str], object] | None = None,
        stop: Event | None = None,
        stats: Stats | None = None,
    ) -> list[Sample]:
        """Answer encoded prompts, as `LanguageModel.answer`.

        Raises:
            InputError: a prompt is empty or too long, or the engine cannot choose tokens so.
        """
        if sampling.prompt_lookup is not None:
            raise InputError("prompt lookup is of --engine petl: leave --prompt-lookup out")
        served = self.served[self.active[-1]]
        pieces: Pieces = SimpleQueue()
        requests = [
            self._request(served, prompt, sampling, partial(_put, pieces, number))
            for number, prompt in enumerate(prompts)
        ]
        began = time.monotonic()
        # all at once: the engine computes them together
        self.engine.submit([(served.lane, request) for request in requests])
        texts, ended = [""] * len(requests), dict[int, Sample]()
        while len(ended) < len(requests):
            number, part = pieces.get()
            if isinstance(part, Exception):
                raise part
            texts[number] += part.text
            if write is not None:
                write(part.text)
            finish = part.finish
            # the engine notices at its next token, of which nobody reads the text
            if finish is None and stop is not None and stop.is_set():
                requests[number].cancelled.set()
                finish = "interrupted"
            if finish is not None:
                ended[number] = Sample(texts[number], part.tokens, finish)
        answers = [ended[number] for number in range(len(requests))]
        if stats is not None:
            stats.seconds += time.monotonic() - began
            stats.answers += len(answers)
            stats.tokens += sum(answer.tokens for answer in answers)
        return answers

    def _request(
        self,
        served: ServedAdapter,
        prompt: Sequence[int],
        sampling: Sampling,
        emit: Callable[[AnswerPart | Exception], object],
    ) -> Request:
        room = self.room([prompt])
        if served.positions is not None:
            room = min(room or served.positions, served.positions - len(prompt))
        if room is not None and room < 1:
            raise InputError(
                f"a prompt has {len(prompt):,} tokens, and the engine {served.positions:,} "
                "positions, for prompt and answer together: shorten it"
            )
        grammar = sampling.grammar
        vocabulary = vocabulary_of(self.tokenizer, self.ends) if grammar else None
        matcher = vocabulary.matcher(grammar) if vocabulary and grammar else None
        choosing = TokenChooser(seed=next(self.seeds), matcher=matcher)
        chooser = Chooser(sampling, choosing, self.base, prompt)
        served.lane.admit(chooser)
        text = AnswerText(self.tokenizer, sampling.stop)
        longest = chooser.max_tokens if room is None else min(chooser.max_tokens, room)
        return Request(prompt, served.adapter, chooser, text, self.ends, emit, longest)


def _put(pieces: Pieces, number: int, part: AnswerPart | Exception) -> None:
    pieces.put((number, part))


def load_engine_model(
    runs: Mapping[str, str],
    folder: Path,
    *,
    seed: int = 0,
    plain: bool | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    weights: str | None = None,
) -> EngineModel:
    """Load adapters, or a plain model, into llama.cpp; return the model that answers with it.

    Args:
        runs: as of `load_llama`, the first as `DEFAULT`.
        folder, weights: as of `load_llama`.
        plain, other_base: as of `load_language_model`.

    Raises:
        InputError: as of `load_llama`.
    """
    found, engine = load_llama(
        runs,
        folder,
        plain=plain,
        trust_remote_code=trust_remote_code,
        other_base=other_base,
        weights=weights,
        max_batch=AT_A_TIME,
        max_waiting=10**6,
    )
    engine.start()
    # by the names that `using` takes
    served = {each.adapter: each for each in found.values()}
    first = served.get(DEFAULT) or served[BASE]
    own = {each.name: getattr(first.language, each.name) for each in fields(LanguageModel)}
    paths = {name: each.path or "" for name, each in served.items() if name != BASE}
    own |= {"adapters": paths, "drafting": "none", "own_drafter": None}
    return EngineModel(**own, engine=engine, served=served, seeds=count(seed))
