"""How an answer is sampled, where it stops, and its text while it is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from threading import Event

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import BaseStreamer

from petl.core.types import Arguments
from petl.errors import InputError

MAX_NEW_TOKENS = 512  # the default, where a model's generation config has none
# lowest and highest value of each setting
BOUNDS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 10**6),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 10**6),
    "repetition_penalty": (0.01, 100),
    "prompt_lookup": (1, 1000),
}
UNFINISHED = "\ufffd"  # a character of which some bytes are missing is decoded as this one
TOKENS_PER_CHARACTER = 4  # at most: bytes of a character in UTF-8


@dataclass(frozen=True)
class Sampling:
    """Settings of generation; None: that of the model's generation config, else greedy.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        temperature: of the softmax; 0: greedy.
        top_p: the most likely tokens with this total probability are sampled from.
        top_k: that many most likely tokens are sampled from; 0: all.
        repetition_penalty: above 1, tokens that occurred become less likely.
        prompt_lookup: tokens that are copied from earlier text and verified in one pass, which does
            not change a greedy answer in float32.
        stop: texts before which an answer ends.
        grammar: that an answer follows, see petl/generation/inference/grammar.py; None: any text.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    prompt_lookup: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name}={value} is not from {low:g} to {high:g}")
        if not all(self.stop):
            raise InputError(f"stop={[*self.stop]} has an empty text, at which every answer ends")
        if self.grammar is not None and self.prompt_lookup is not None:
            raise InputError(
                f"prompt_lookup={self.prompt_lookup} guesses tokens that a JSON schema may not "
                "allow: leave it out; drafts follow the schema"
            )

    def arguments(self, defaults: GenerationConfig) -> Arguments:
        """The arguments of `generate` for a model with these `defaults`."""
        names = ("temperature", "top_p", "top_k")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.temperature == 0 or not (chosen or defaults.do_sample):
            # neutral values, or transformers warns of those in the model's generation config
            given = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        else:
            # 0: transformers would take 50 where neither of the two has a value
            given = {"do_sample": True, "top_k": defaults.top_k or 0, **chosen}
        if self.repetition_penalty is not None:
            given["repetition_penalty"] = self.repetition_penalty
        if self.prompt_lookup is not None:
            given["prompt_lookup_num_tokens"] = self.prompt_lookup
        limit = self.max_new_tokens or defaults.max_new_tokens or MAX_NEW_TOKENS
        # one beam: neither streaming nor prompt lookup takes more
        return {**given, "max_new_tokens": limit, "num_beams": 1}


SETTINGS = tuple(field.name for field in fields(Sampling) if field.name in BOUNDS)


@dataclass(frozen=True)
class Sample:
    """An answer.

    Attributes:
        text: without end token and stop text.
        tokens: number of generated tokens, the end token included.
        finish: "stop" at an end token or stop text, "length" at the limit, "interrupted".
    """

    text: str
    tokens: int
    finish: str


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """The part of a text before the first of the stop texts; None if it has none of them."""
    ends = [text.index(word) for word in stop if word in text]
    return text[: min(ends)] if ends else None


def possible_stop(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of a text without stop texts with which one of them begins."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(word.startswith(text[-length:]) for word in stop):
            return length
    return 0


class StopTexts(StoppingCriteria):
    """Ends the rows of a batch in which one of several texts was generated.

    transformers' own criterion looks at the last token only, and misses a text that ends within the
    tokens that one pass of prompt lookup has accepted.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int
    ) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, prompt_length
        self.seen = prompt_length  # tokens that were looked at
        # tokens before the new ones that may hold the beginning of a stop text
        self.span = TOKENS_PER_CHARACTER * max(map(len, stop))

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Return which rows are to end, [B] bool."""
        begin = max(self.start, self.seen - self.span)
        self.seen = input_ids.shape[1]
        texts = self.tokenizer.batch_decode(input_ids[:, begin:], skip_special_tokens=True)
        found = [any(word in text for word in self.stop) for text in texts]
        # once is enough: `generate` remembers the rows that have ended
        return torch.tensor(found, device=input_ids.device)


class StopEvent(StoppingCriteria):
    """Ends all rows once an event is set, as by Ctrl-C or a client that has gone."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Return which rows are to end, [B] bool."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class AnswerText:
    """Decodes tokens one by one, and ends before a stop text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], *, special: bool = False
    ) -> None:
        """Decode with a tokenizer; `special`: with the texts of special tokens."""
        self.tokenizer, self.stop, self.special = tokenizer, stop, special
        self.ids: list[int] = []
        # decoding begins at the first; text up to the second was returned or is held
        self.begin = self.end = 0
        self.held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """Return the text that is certain now, and True if it ended before a stop text."""
        self.ids.append(token)
        # with the tokens before, since a tokenizer may write a token differently at the beginning
        before, now = (
            self._decoded(self.ids[self.begin : self.end]),
            self._decoded(self.ids[self.begin :]),
        )
        # a character of which bytes are missing waits for the next token
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            self.held += now[len(before) :]
            # the tokens of this piece are the next one's context
            self.begin, self.end = self.end, len(self.ids)
        cut = before_stop(self.held, self.stop)
        if cut is not None:
            return cut, True
        kept = possible_stop(self.held, self.stop)
        ready, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return ready, False

    def rest(self) -> str:
        """Return the text that was held back, once there are no more tokens."""
        # a character that was never completed is written as U+FFFD
        before = self._decoded(self.ids[self.begin : self.end])
        text = self.held + self._decoded(self.ids[self.begin :])[len(before) :]
        cut = before_stop(text, self.stop)
        return text if cut is None else cut

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not self.special))


class TextStream(BaseStreamer):
    """Hands over the text of one answer in pieces while it is written, up to a stop text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], object],
        stop: Sequence[str],
        ends: Sequence[int] = (),
    ) -> None:
        """Take the tokens `ends` as without text: not all end tokens are special ones."""
        self.text, self.write, self.ends = AnswerText(tokenizer, stop), write, {*ends}
        self.is_prompt, self.has_ended = True, False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then tokens of the answer."""
        tokens = [] if self.is_prompt else value.flatten().tolist()
        self.is_prompt = False
        for token in tokens:
            if not (self.has_ended or token in self.ends):
                text, self.has_ended = self.text.add(token)
                if text:
                    self.write(text)

    def end(self) -> None:
        """Write what was held back."""
        text = "" if self.has_ended else self.text.rest()
        if text:
            self.write(text)
