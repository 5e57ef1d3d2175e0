"""A request for one answer: its settings, and the text of its answer while it is written."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petl.generation.inference.sampling import before_stop
from petl.generation.serving.choice import Chooser, LogProb

logger = logging.getLogger(__name__)
UNFINISHED = "\ufffd"  # a character of which some bytes are missing is decoded as this one


@dataclass(frozen=True)
class AnswerPart:
    """The part of an answer that one token adds.

    Attributes:
        text: empty while it may be the beginning of a stop text or of a character.
        tokens: number of tokens of the answer so far, the end token included.
        logprobs: of the token, and of the most likely ones, if they were asked for.
        finish: "stop" at an end token or stop text, "length" at the limit; None: it goes on.
    """

    text: str
    tokens: int
    logprobs: list[LogProb] = field(default_factory=list)
    finish: str | None = None


class AnswerText:
    """Decodes tokens one by one, and ends before a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        # decoding begins at the first; text up to the second was returned or is held
        self.begin = self.end = 0
        self.held = ""
        # the longest end that may begin a stop text: a complete one ends the answer instead
        self.longest = max(map(len, stop), default=1) - 1

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
        kept = self._possible_stop()
        ready, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return ready, False

    def rest(self) -> str:
        """Return the text that was held back, once there are no more tokens."""
        # a character that was never completed is written as U+FFFD
        before = self._decoded(self.ids[self.begin : self.end])
        return self.held + self._decoded(self.ids[self.begin :])[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text with which a stop text begins."""
        for length in range(min(len(self.held), self.longest), 0, -1):
            if any(word.startswith(self.held[-length:]) for word in self.stop):
                return length
        return 0


@dataclass(eq=False)  # hashable by identity, for `Engine._advance`
class Request:
    """A request for one answer.

    Attributes:
        prompt: token ids.
        adapter: the name of the adapter, as in the model.
        ends: tokens at which the answer ends.
        emit: gets each piece, and at a failure the exception, in the thread of the engine.
        cancelled: set it to end the answer, as for a client that has gone.
    """

    prompt: Sequence[int]
    adapter: str
    chooser: Chooser
    text: AnswerText
    ends: Sequence[int]
    emit: Callable[[Any], object]
    max_tokens: int
    cancelled: Event = field(default_factory=Event)
    tokens: int = 0

    def advance(self, likeliest: int, logits: Tensor) -> int | None:
        """Choose the next token, and return it; None: the answer has ended.

        Args:
            likeliest: the token of the highest logit.
            logits: of the next token, [V].
        """
        token, logprobs = likeliest, []
        try:
            if not self.chooser.is_argmax:
                token, logprobs = self.chooser.choose(logits)
            return token if self.take(token, logprobs) else None
        except Exception as error:  # the fault of one request, which the others do not share
            logger.exception("a request failed")
            self.emit(error)
            return None

    def take(self, token: int, logprobs: list[LogProb]) -> bool:
        """Emit what a token adds to the answer; return True if the answer goes on."""
        self.tokens += 1
        if token in self.ends:
            self.emit(AnswerPart(self.text.rest(), self.tokens, finish="stop"))
            return False
        text, is_stopped = self.text.add(token)
        if is_stopped:
            self.emit(AnswerPart(text, self.tokens, logprobs, "stop"))
            return False
        # after the stop texts: an answer that reaches both ends by "stop"
        if self.tokens >= self.max_tokens:
            self.emit(AnswerPart(text + self.text.rest(), self.tokens, logprobs, "length"))
            return False
        self.emit(AnswerPart(text, self.tokens, logprobs))
        return not self.cancelled.is_set()
