"""A language model with adapters, one of which writes at a time."""

import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

from peft import PeftModel
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from petl.core.model.modes import has_enabled_adapter
from petl.core.parameters import max_positions
from petl.core.spec.facts import modifies_base_weights
from petl.core.types import CausalModel, Settings, base_of
from petl.data.conversations import IMAGE, Part, with_parts
from petl.data.tasks import TOOLS, Message
from petl.data.tasks.base import pad_id
from petl.data.tasks.chat import answer_ends, question
from petl.data.tasks.image_text import prompt_of
from petl.data.tasks.image_text.images import ImageSource
from petl.data.tasks.image_text.prompt import Conversation, ImagePrompt, ImageTextProcessor
from petl.efficiency.drafting.calls import why_plain
from petl.efficiency.drafting.engine import Stats, decode
from petl.efficiency.drafting.folder import load_drafter
from petl.efficiency.drafting.lookup import LookupFirst
from petl.efficiency.drafting.registry import Drafter, drafter, untrained
from petl.efficiency.in_place_cache import cache_arguments
from petl.errors import InputError, UnknownNameError, UnsupportedError, did_you_mean, first_line
from petl.generation.inference.grammar import GrammarMask, vocabulary_of
from petl.generation.inference.sampling import (
    Sample,
    Sampling,
    StopEvent,
    StopTexts,
    TextStream,
    before_stop,
)
from petl.training.generation import batched_prompts, behind_prefix, encoder_in

BASE = "base"  # the name of the model without an adapter
NO_DRAFTS = "none"  # the value of `drafting` for plain decoding
COPYING = ("free", "lookup")  # drafters that copy text by themselves
Prompt = str | list[Message] | Conversation


@dataclass(frozen=True)
class LanguageModel:
    """A language model, its tokenizer, and its adapters.

    Attributes:
        adapters: folder of each adapter by its name; the first writes by default.
        is_chat: True if prompts are turns of the chat template, False if they are plain text.
        system: the system prompt of chats that have none, as in training.
        prefix: put before each text of an encoder-decoder, as in training.
        columns: the settings under `data` of the run that name the columns of rows.
        processor: reads conversations with images; None: the model reads texts alone.
        drafting: what guesses tokens of single answers ahead (petl.drafting): "auto" is
            `own_drafter` for the first adapter, behind "lookup", and else "free"; "none"; a drafter
            without training; or the folder of a drafter.
        own_drafter: folder of the drafter that was trained for the first adapter, or for the model
            if it is a plain one.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    is_chat: bool
    adapters: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    prefix: str = ""
    columns: Settings = field(default_factory=dict)
    processor: ImageTextProcessor | None = None
    drafting: str = "auto"
    own_drafter: str | None = None

    @property
    def drafter(self) -> Drafter | None:
        """What guesses tokens of the active adapter's single answers; None: they are plain.

        Raises:
            InputError: there is no drafter in the folder, it belongs to another model, or the model
                cannot be decoded with drafts, and `drafting` is not "auto".
        """
        has_own = self.drafting == "auto" and self.own_drafter is not None
        # heads that one adapter's answers have trained guess little of what another one writes
        return self._free if has_own and not self._writes_first else self._chosen

    @cached_property
    def _free(self) -> Drafter | None:
        """The drafter without training; None if the model cannot be decoded with drafts."""
        return None if why_plain(self.base) else drafter("free", model=self.base)

    @cached_property
    def _chosen(self) -> Drafter | None:
        """The drafter of `drafting`."""
        reason = why_plain(self.base)
        if self.drafting == NO_DRAFTS or (reason and self.drafting == "auto"):
            return None
        if reason:
            raise UnsupportedError(reason)
        if self.drafting == "auto" and self.own_drafter is None:
            return self._free
        if self.drafting == "auto":
            found = load_drafter(str(self.own_drafter), self.base, self.tokenizer)
            return found if found.name in COPYING else LookupFirst(found)
        known = untrained()
        if self.drafting in known:
            return drafter(self.drafting, model=self.base)
        if not Path(self.drafting).exists():
            known = [*known, "auto", NO_DRAFTS]
            raise UnknownNameError(
                f"{self.drafting!r} is neither the folder of a drafter nor the name of one"
                + did_you_mean(self.drafting, known)
            )
        return load_drafter(self.drafting, self.base, self.tokenizer)

    @property
    def _writes_first(self) -> bool:
        """True if the first adapter, or the plain model, is what writes now."""
        model = self.model
        if not isinstance(model, PeftModel):
            return True
        return model.active_adapters == [self.names[0]] and has_enabled_adapter(model)

    @property
    def base(self) -> CausalModel:
        """The base model, adapters included."""
        return base_of(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """True if prompts are read by an encoder."""
        return bool(self.base.config.is_encoder_decoder)

    @property
    def names(self) -> list[str]:
        """The names for `using`: the adapters, the default first, and the base model."""
        return [*self.adapters, BASE]

    @cached_property  # it writes to __dict__, which a frozen dataclass allows
    def ends(self) -> list[int]:
        """The tokens at which an answer ends."""
        chat = encoder_in(self.processor or self.tokenizer) if self.is_chat else None
        return answer_ends(self.tokenizer.eos_token_id, self.base, chat)

    @contextmanager
    def using(self, name: str) -> Generator[None]:
        """Activate an adapter, or for `BASE` none, inside the block.

        Raises:
            UnknownNameError: there is no such adapter.
            UnsupportedError: the base model was changed as an adapter was loaded.
        """
        if name not in self.names:
            raise UnknownNameError(f"no adapter {name!r}{did_you_mean(name, self.names)}")
        configs = getattr(self.model, "peft_config", {}).values()
        if name == BASE and any(map(modifies_base_weights, configs)):
            raise UnsupportedError(
                f"{self.name} has no base model beside an adapter that changes its weights "
                "(init_lora_weights): load the base model alone"
            )
        if not isinstance(self.model, PeftModel):
            yield
        elif name == BASE:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name, inference_mode=True)  # it sets requires_grad otherwise
            yield

    # Prompts

    def encode(self, prompt: Prompt, system: str | None = None) -> Sequence[int]:
        """The token ids of a prompt: a text, or the messages of a conversation, with its images.

        Args:
            system: the system prompt of a conversation without one; None: `self.system`.

        Raises:
            InputError: the chat template refuses the conversation; or the model reads plain text,
                and this is more than one turn, or has a system prompt or images.
        """
        images: tuple[ImageSource, ...] = ()
        if isinstance(prompt, Conversation):
            prompt, images = prompt.messages, prompt.images
        if images and not (self.processor and self.is_chat):
            raise InputError(f"{self.name} reads texts alone, and the prompt has images")
        system = self.system if system is None else system
        if self.is_chat:
            turns = [message("user", prompt)] if isinstance(prompt, str) else prompt
            if system and all(turn["role"] != "system" for turn in turns):
                # behind the message that declares functions, if there is one
                place = int(turns[0]["role"] == TOOLS)
                turns = [*turns[:place], message("system", system), *turns[place:]]
            if self.processor is not None:
                return prompt_of(self.processor, turns, images)
            return question(self.tokenizer, turns)
        if system or (not isinstance(prompt, str) and len(prompt) > 1):
            raise InputError(
                f"{self.name} reads plain text, without system prompts and earlier turns; they "
                "need a chat template"
            )
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        ids = list(self.tokenizer(f"{self.prefix}{text}", verbose=False)["input_ids"])
        # some tokenizers end each text, after which a decoder would write another one
        end = self.tokenizer.eos_token_id
        return ids[:-1] if not self.is_encoder_decoder and ids[-1:] == [end] else ids

    # Answers

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        write: Callable[[str], object] | None = None,
        stop: Event | None = None,
        stats: Stats | None = None,
    ) -> list[Sample]:
        """Answer encoded prompts in one batch, with the adapter of `using`.

        A single prompt of a decoder is answered with drafts, see `drafting`; its answer is that of
        plain decoding in float32, and up to rounding below.

        Args:
            write: gets the text of the answer to a single prompt in pieces.
            stop: set it, in another thread or a signal handler, to end the answers early.
            stats: gets the counts of drafts; without drafts, tokens, answers and seconds.

        Raises:
            InputError: a prompt is empty or longer than the model allows, the model or number of
                prompts does not allow prompt lookup, or its tokenizer no grammar.
        """
        arguments = sampling.arguments(self.base.generation_config)
        wanted = arguments["max_new_tokens"]
        arguments["max_new_tokens"] = min(wanted, self.room(prompts) or wanted)
        is_alone = len(prompts) == 1 or sampling.prompt_lookup is not None
        if arguments["max_new_tokens"] < wanted and not is_alone:
            # else the longest prompt would cut the answers to the others
            alone = partial(self.answer, sampling=sampling, stop=stop, stats=stats)
            return [alone([prompt])[0] for prompt in prompts]
        longest = max(map(len, prompts))
        on_left = not self.is_encoder_decoder
        inputs = batched_prompts(prompts, pad_id(self.tokenizer), on_left=on_left)
        start = 1 if self.is_encoder_decoder else longest  # of the answer, in what is generated
        criteria: list[StoppingCriteria] = [] if stop is None else [StopEvent(stop)]
        if sampling.stop:
            criteria.append(StopTexts(self.tokenizer, sampling.stop, start))
        is_single = len(prompts) == 1 and not isinstance(prompts[0], ImagePrompt)
        drafts = is_single and sampling.prompt_lookup is None and self.drafter is not None
        if drafts:
            arguments |= {"custom_generate": decode, "drafter": self.drafter, "stats": stats}
            if self.is_encoder_decoder and self.prefix:
                own = behind_prefix(self.tokenizer, prompts[0], self.prefix)
                arguments["encoder_input_ids"] = own
        else:
            arguments |= cache_arguments(self.model)
        if write is not None:
            # generate itself keeps `streamer` from a function that it calls
            name = "stream" if drafts else "streamer"
            arguments[name] = TextStream(self.tokenizer, write, sampling.stop, self.ends)
        if sampling.grammar is not None:
            matcher = vocabulary_of(self.tokenizer, self.ends).matcher(sampling.grammar)
            arguments["logits_processor"] = LogitsProcessorList([GrammarMask(matcher, start)])
        writer: Any = self.model  # of transformers or PEFT, whose types differ
        began = time.monotonic()
        try:
            generated = writer.generate(
                **{name: tensor.to(self.base.device) for name, tensor in inputs.items()},
                **arguments,
                eos_token_id=self.ends,
                pad_token_id=pad_id(self.tokenizer),
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        except ValueError as error:
            if sampling.prompt_lookup is None:
                raise
            raise InputError(f"prompt lookup is not possible: {first_line(error)}") from error
        rows = generated[:, start:].tolist()
        is_interrupted = stop is not None and stop.is_set()
        answers = [self._answer_of(row, sampling.stop, is_interrupted) for row in rows]
        if stats is not None and not drafts:  # which count themselves
            stats.seconds += time.monotonic() - began
            stats.answers += len(answers)
            stats.tokens += sum(answer.tokens for answer in answers)
        return answers

    def _answer_of(self, ids: list[int], stop: Sequence[str], is_interrupted: bool) -> Sample:
        """The answer in generated tokens, which may have padding after its end token."""
        ended = next((i for i, token in enumerate(ids) if token in self.ends), None)

        def text_of(count: int | None) -> str:
            return str(self.tokenizer.decode(ids[:count], skip_special_tokens=True))

        text, tokens = text_of(ended), len(ids) if ended is None else ended + 1
        cut = before_stop(text, stop)
        if cut is not None:
            # behind the stop text a row of a batch is padded, perhaps with end tokens
            tokens = 1 + bisect_left(
                range(1, tokens), True, key=lambda n: before_stop(text_of(n), stop) is not None
            )
            return Sample(cut, tokens, "stop")
        if ended is None:
            return Sample(text, tokens, "interrupted" if is_interrupted else "length")
        return Sample(text, tokens, "stop")

    def room(self, prompts: Sequence[Sequence[int]]) -> int | None:
        """Return the number of tokens that fit behind the longest prompt; None without a limit.

        Raises:
            InputError: a prompt is empty or longer than the model allows.
        """
        if not all(prompts):
            raise InputError("a prompt is empty: it has no tokens")
        limit, longest = max_positions(self.base), max(map(len, prompts))
        if limit is None:
            return None
        # a decoder has its prompt and its answer in the same positions
        room = limit if self.is_encoder_decoder else limit - longest
        if room < 1 or longest > limit:
            raise InputError(
                f"a prompt has {longest:,} tokens, and {self.name} has {limit:,} positions, for "
                "prompt and answer together: shorten it"
            )
        return room


def message(role: str, content: str, images: int = 0) -> Message:
    """One turn of a conversation, which begins with this number of images."""
    turn = {"role": role, "content": content}
    if not images:
        return turn
    parts: list[Part] = [{"type": IMAGE} for _ in range(images)]
    return with_parts(turn, [*parts, {"type": "text", "text": content}])
