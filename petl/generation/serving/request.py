"""A request for one answer: its settings, and the text of its answer while it is written."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event

from torch import Tensor

from petl.generation.inference.sampling import AnswerText
from petl.generation.serving.choice import Chooser, LogProb

logger = logging.getLogger(__name__)


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


# takes each piece of an answer, and at a failure the exception
Emit = Callable[["AnswerPart | Exception"], object]


@dataclass(eq=False)  # hashable by identity, for `Engine._advance`
class Request:
    """A request for one answer.

    Attributes:
        prompt: token ids.
        adapter: the name of the adapter, as in the model.
        ends: tokens at which the answer ends.
        emit: gets each piece, and at a failure the exception, in the thread of the engine.
        cancelled: set it to end the answer, as for a client that has gone.
        tokens: of the answer so far.
        cached: tokens of the prompt that were known from earlier ones.
    """

    prompt: Sequence[int]
    adapter: str
    chooser: Chooser
    text: AnswerText
    ends: Sequence[int]
    emit: Emit
    max_tokens: int
    cancelled: Event = field(default_factory=Event)
    tokens: int = 0
    cached: int = 0

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
