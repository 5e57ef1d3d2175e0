"""Bodies of replies in the format of OpenAI's API."""

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from petl.errors import did_you_mean, printable, shown
from petl.generation.inference.calls import Call, CallReader, CallStream
from petl.generation.inference.sampling import UNFINISHED
from petl.generation.serving.choice import LogProb
from petl.generation.serving.request import AnswerPart

Json = dict[str, object]  # an object of a body
Served = TypeVar("Served")  # a model or an adapter
GOING_ON: Json = {"logprobs": None, "finish_reason": None}  # in a chunk that is not the last
LOWEST = -9999.0  # in place of minus infinity, which JSON does not have
# error types of OpenAI's API by HTTP status; all others below 500 are invalid requests
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(
    message: str, status: int, *, code: str | None = None, param: str | None = None
) -> Json:
    """The body of an error with this HTTP status."""
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ApiError(Exception):
    """A request that is refused."""

    def __init__(
        self, message: str, status: int = 400, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(printable(message), status, code=code, param=param)


def served_as(name: str, served: Mapping[str, Served]) -> Served:
    """What a server has under the name in a request.

    Raises:
        ApiError: nothing.
    """
    if name not in served:
        message = f"no model {shown(name)}{did_you_mean(name, served)}"
        raise ApiError(message, 404, code="model_not_found", param="model")
    return served[name]


@dataclass
class ReplyText:
    """The pieces of an answer, put together."""

    text: str = ""
    tokens: int = 0
    logprobs: list[list[LogProb]] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: AnswerPart) -> None:
        """Add the next piece."""
        self.text += piece.text
        # the number so far, not that of the piece
        self.tokens, self.finish = piece.tokens, piece.finish
        self.logprobs += [piece.logprobs] if piece.logprobs else []  # an end token has none


class Reply:
    """The reply to one request, as a whole or as a stream of chunks."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._texts: dict[int, str] = {}
        # all chunks of a stream have one id and one time
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answers: Sequence[ReplyText], prompt_tokens: int) -> Json:
        """The body of a reply that is no stream."""
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return {**self._body(self.kind, choices), "usage": usage(answers, prompt_tokens)}

    def first_chunk(self, index: int) -> Json | None:
        """The chunk before the pieces of an answer, if there is one."""
        return None

    def chunks(self, index: int, piece: AnswerPart) -> list[Json]:
        """The chunks of a piece."""
        if not (piece.text or piece.logprobs or piece.finish):
            return []  # of a token whose text is held back
        logprobs = [piece.logprobs] if piece.logprobs else []
        return [self._body(self.chunk_kind, [self._delta(index, piece, logprobs)])]

    def usage_chunk(self, answers: Sequence[ReplyText], prompt_tokens: int) -> Json:
        """The chunk with the number of tokens, at the end of a stream."""
        # without choices, as OpenAI sends it
        return {**self._body(self.chunk_kind, []), "usage": usage(answers, prompt_tokens)}

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, index: int, answer: ReplyText) -> Json:
        raise NotImplementedError

    def _delta(self, index: int, piece: AnswerPart, logprobs: list[list[LogProb]]) -> Json:
        raise NotImplementedError

    def _token(self, found: LogProb) -> str:
        """The text of a token; a reply has the same ones many times."""
        if found.token not in self._texts:
            self._texts[found.token] = text_of(self.tokenizer, found.token)
        return self._texts[found.token]


class ChatReply(Reply):
    """The reply of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        reader: CallReader | None = None,
    ) -> None:
        """Read calls of functions with `reader`, if answers may have them."""
        super().__init__(model, tokenizer)
        self.reader = reader
        self._streams: dict[int, CallStream] = {}

    def first_chunk(self, index: int) -> Json:
        """The role of the answer."""
        # an empty content instead of none, as in OpenAI's own first chunk
        start = {"index": index, "delta": {"role": "assistant", "content": ""}}
        return self._body(self.chunk_kind, [{**start, **GOING_ON}])

    def chunks(self, index: int, piece: AnswerPart) -> list[Json]:
        """The chunks of a piece: its text as far as it is no call, calls once they are complete."""
        if self.reader is None:
            return super().chunks(index, piece)
        stream = self._streams.setdefault(index, CallStream(self.reader))
        text, calls = stream.add(piece.text), []
        if piece.finish:
            held, calls = stream.end()
            text += held
        found: list[Json] = []
        if calls:
            deltas = [{"index": i, **_called(call)} for i, call in enumerate(calls)]
            choice: Json = {"index": index, "delta": {"tool_calls": deltas}}
            found = [self._body(self.chunk_kind, [{**choice, **GOING_ON}])]
        finish = "tool_calls" if calls and piece.finish == "stop" else piece.finish
        return [*found, *super().chunks(index, replace(piece, text=text, finish=finish))]

    def _choice(self, index: int, answer: ReplyText) -> Json:
        message: Json = {"role": "assistant", "content": answer.text}
        finish = answer.finish
        if self.reader is not None:
            content, calls = self.reader.read(self.reader.clean(answer.text))
            message["content"] = content or (None if calls else "")
            if calls:
                message["tool_calls"] = [_called(call) for call in calls]
                finish = "tool_calls" if finish == "stop" else finish
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": finish,
        }

    def _delta(self, index: int, piece: AnswerPart, logprobs: list[list[LogProb]]) -> Json:
        return {
            "index": index,
            # the last chunk has an empty delta, unless it ends with text that was held back
            "delta": {"content": piece.text} if piece.text or logprobs else {},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": piece.finish,
        }

    def _logprobs(self, tokens: list[list[LogProb]]) -> Json | None:
        if not tokens:
            return None
        content = [
            {**self._entry(chosen), "top_logprobs": [self._entry(each) for each in likely]}
            for chosen, *likely in tokens  # the order of `Chooser.choose`
        ]
        return {"content": content, "refusal": None}

    def _entry(self, found: LogProb) -> Json:
        return {
            "token": self._token(found),
            "logprob": max(found.value, LOWEST),
            "bytes": [*bytes_of(self.tokenizer, found.token)],
        }


def _called(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class CompletionReply(Reply):
    """The reply of /v1/completions."""

    # in this older format, chunks are named like complete replies
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer)
        self._offsets: dict[int, int] = {}  # of the next token of each answer, in characters

    def _choice(self, index: int, answer: ReplyText) -> Json:
        return self._text(index, answer.text, answer.logprobs, answer.finish, 0)

    def _delta(self, index: int, piece: AnswerPart, logprobs: list[list[LogProb]]) -> Json:
        # of all tokens so far: text of some may be held back
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(self._token(chosen)) for chosen, *_ in logprobs)
        return self._text(index, piece.text, logprobs, piece.finish, offset)

    def _text(
        self,
        index: int,
        text: str,
        tokens: list[list[LogProb]],
        finish: str | None,
        offset: int,
    ) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(tokens, offset) if tokens else None,
            "finish_reason": finish,
        }

    def _logprobs(self, tokens: list[list[LogProb]], offset: int) -> Json:
        words, offsets = [self._token(chosen) for chosen, *_ in tokens], []
        # offsets are in characters of the answer
        for word in words:
            offsets.append(offset)
            offset += len(word)
        return {
            "tokens": words,
            "token_logprobs": [max(chosen.value, LOWEST) for chosen, *_ in tokens],
            "top_logprobs": [
                # keys are texts in this format: tokens that decode alike become one entry
                {self._token(each): max(each.value, LOWEST) for each in likely}
                for _, *likely in tokens
            ],
            "text_offset": offsets,
        }


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a token inside of a text; a part of a character is U+FFFD."""
    # behind itself, since some tokenizers leave out the space before the first word of a text
    alone, twice = (str(tokenizer.decode([token] * count)) for count in (1, 2))
    return twice.removeprefix(alone)


def bytes_of(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes of a token in UTF-8, also of one that is a part of a character."""
    text = text_of(tokenizer, token)
    if UNFINISHED not in text:
        return text.encode()
    word = str(tokenizer.convert_ids_to_tokens(token))
    fallback = re.fullmatch("<0x([0-9A-F]{2})>", word)  # as SentencePiece writes single bytes
    if fallback:
        return bytes.fromhex(fallback[1])
    # byte-level BPE writes each byte as a character; another vocabulary has other characters
    values = {character: value for value, character in bytes_to_unicode().items()}
    known = all(character in values for character in word)
    return bytes(values[character] for character in word) if known else text.encode()


def usage(answers: Sequence[ReplyText], prompt_tokens: int) -> dict[str, int]:
    """The number of tokens of a request; end tokens count."""
    written = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
