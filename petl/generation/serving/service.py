"""Requests of the API, from their fields to their answers."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from petl.data.tasks import Message
from petl.data.tasks.image_text.images import image_of, is_data
from petl.data.tasks.image_text.prompt import Conversation, ImagePrompt
from petl.errors import InputError, printable, shown
from petl.generation.inference.calls import MAX_CALLS, CallReader, call_form
from petl.generation.inference.grammar import json_grammar, vocabulary_of
from petl.generation.inference.language_model import LanguageModel
from petl.generation.inference.sampling import AnswerText, Sampling
from petl.generation.serving.bodies import Paths
from petl.generation.serving.choice import Chooser, TokenChooser
from petl.generation.serving.engine import AnswerEngine, ServedAdapter
from petl.generation.serving.gate import BODY_BYTES, IMAGE_BODY_BYTES
from petl.generation.serving.replies import (
    ApiError,
    ChatReply,
    CompletionReply,
    Json,
    Reply,
    ReplyText,
    error_body,
    served_as,
)
from petl.generation.serving.request import AnswerPart, Emit, Request
from petl.generation.serving.wire import (
    MAX_CHOICES,
    MAX_ENTRIES,
    MAX_IMAGES,
    ChatRequest,
    CompletionRequest,
)
from petl.training.generation import encoder_in

if TYPE_CHECKING:
    from llguidance import LLMatcher

CLIENT_GONE = 499  # nobody reads it
MAX_PIXELS = 2**24  # of all images in a request, 50 MB in memory; assumption
PREPARING = 2  # requests whose images are decoded, or whose schemas are compiled, at a time
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerService:
    """Answers requests with an engine.

    Attributes:
        served: what requests can choose, by name.
        max_tokens: of an answer at most.
        preparing: held by requests whose images are decoded, or whose schemas are compiled.
    """

    served: Mapping[str, ServedAdapter]
    engine: AnswerEngine
    max_tokens: int
    preparing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PREPARING))

    @property
    def paths(self) -> Paths:
        """What requests are posted to."""
        return {
            "/v1/chat/completions": (ChatRequest, self.chat),
            "/v1/completions": (CompletionRequest, self.complete),
        }

    @property
    def body_bytes(self) -> int:
        """Bytes of a body at most."""
        reads_images = any(each.language.processor for each in self.served.values())
        return IMAGE_BODY_BYTES if reads_images else BODY_BYTES

    def models(self) -> Json:
        """The body of /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.served]}

    def model(self, name: str) -> Json:
        """The body of /v1/models/NAME."""
        # `load_served` puts the base first
        served, base = served_as(name, self.served), next(iter(self.served))
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "petl",
            # two fields of vLLM, which OpenAI's API does not have
            "parent": None if name == base else base,
            "max_model_len": served.positions,
        }

    async def chat(self, body: ChatRequest, request: HttpRequest) -> Response:
        """Reply to /v1/chat/completions."""
        served = served_as(body.model, self.served)
        urls = [url for message in body.messages for url in message.images]
        # in another thread: a long prompt, or long calls in it, would hold up all connections
        if urls:
            async with self.preparing:  # an image takes a hundred times the memory of its file
                prompt = await run_in_threadpool(
                    lambda: pictured(served.language, body.turns, urls)
                )
        else:
            prompt = await run_in_threadpool(lambda: served.language.encode(body.turns))
        reader = await run_in_threadpool(call_reader, served.language, body)
        reply = ChatReply(served.name, served.language.tokenizer, reader)
        return await self._reply(reply, body, served, [prompt], request)

    async def complete(self, body: CompletionRequest, request: HttpRequest) -> Response:
        """Reply to /v1/completions."""
        served = served_as(body.model, self.served)
        # this path has no turns: a prompt is the text itself
        plain = replace(served.language, is_chat=False, system=None)
        encode = partial(_encode, plain)
        prompts = [await run_in_threadpool(encode, prompt) for prompt in body.prompts]
        reply = CompletionReply(served.name, served.language.tokenizer)
        return await self._reply(reply, body, served, prompts, request)

    async def _reply(
        self,
        reply: Reply,
        body: ChatRequest | CompletionRequest,
        served: ServedAdapter,
        prompts: Sequence[Sequence[int]],
        request: HttpRequest,
    ) -> Response:
        # `n` answers to each of the prompts
        if len(prompts) * (body.n or 1) > MAX_CHOICES:
            raise ApiError(f"more than {MAX_CHOICES} answers in one request", param="n")
        if body.reported is not None:
            answers_of_all = len(prompts) * (body.n or 1)
            entries = answers_of_all * (body.limit or self.max_tokens) * (body.reported + 1)
            if entries > MAX_ENTRIES:
                raise ApiError(
                    f"{answers_of_all} answers of up to {body.limit or self.max_tokens} tokens "
                    f"would have {entries:,} logprobs; allowed are {MAX_ENTRIES:,}: ask for fewer "
                    "answers, tokens (max_tokens) or logprobs",
                    param="logprobs",
                )
        reader = reply.reader if isinstance(reply, ChatReply) else None
        matcher = await self._matcher(body, served, reader)
        answers = ServedAnswers(served.name, sum(map(len, prompts)))
        for prompt in prompts:
            for number in range(body.n or 1):
                choosing = choosing_of(body, number, len(served.language.tokenizer))
                choosing = replace(choosing, matcher=matcher)
                answers.requests.append(
                    self._request(body, served, prompt, choosing, answers.receiver())
                )
        # after all checks, so that a refused request computes nothing
        self.engine.submit([(served.lane, each) for each in answers.requests])
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = answers.events(reply, wants_usage=wants_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        if not await unless_gone(answers.collect(), request):
            return Response(status_code=CLIENT_GONE)
        # in another thread: it may have millions of entries
        whole = partial(reply.whole, answers.found, answers.prompt_tokens)
        return await run_in_threadpool(lambda: JSONResponse(whole()))

    async def _matcher(
        self,
        body: ChatRequest | CompletionRequest,
        served: ServedAdapter,
        reader: CallReader | None,
    ) -> "LLMatcher | None":
        """The compiled grammar that the answers to a request follow; None: any text."""
        language, wanted = served.language, body.response_format
        schema = None if wanted is None else wanted.schema_of_answer
        has_calls = isinstance(body, ChatRequest) and body.must_call
        if schema is None and not has_calls:
            return None
        param = "tools" if has_calls else "response_format"

        def compiled() -> "LLMatcher":
            vocabulary = vocabulary_of(language.tokenizer, language.ends)
            if schema is not None:
                return vocabulary.matcher(json_grammar(schema))
            assert isinstance(body, ChatRequest)
            assert reader is not None
            called = [each for each in body.functions if body.called in (None, each.name)]
            most = reader.most or (1 if body.called else MAX_CALLS)
            return vocabulary.matcher(reader.form.grammar(called, most, vocabulary))

        try:
            async with self.preparing:  # it may take a second
                return await run_in_threadpool(compiled)
        except InputError as error:
            raise ApiError(f"{param}: {error}", param=param) from error

    def _request(
        self,
        body: ChatRequest | CompletionRequest,
        served: ServedAdapter,
        prompt: Sequence[int],
        choosing: TokenChooser,
        emit: Emit,
    ) -> Request:
        """The request for one answer to a prompt."""
        limit = body.limit
        if limit is not None and limit > self.max_tokens:
            message = f"max_tokens={limit} is more than this server allows ({self.max_tokens})"
            raise ApiError(message, param="max_tokens")
        sampling = Sampling(
            max_new_tokens=limit,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            repetition_penalty=body.repetition_penalty,
        )
        language = served.language
        has_tools = isinstance(body, ChatRequest) and bool(body.active_tools)
        chooser = Chooser(sampling, choosing, language.base, prompt)
        served.lane.admit(chooser)
        room = room_for(prompt, served, limit or 1)  # without a limit, room for one token is enough
        return Request(
            prompt,
            served.adapter,
            chooser,
            # calls may begin with a special token
            AnswerText(language.tokenizer, body.stops, special=has_tools),
            language.ends,
            emit,
            min(chooser.max_tokens, self.max_tokens, room),
        )


def pictured(language: LanguageModel, turns: list[Message], urls: Sequence[str]) -> Sequence[int]:
    """The prompt of a conversation with images, and their pixels as the model reads them.

    Raises:
        ApiError: an image is none, too large, or elsewhere: nothing is fetched.
    """
    if len(urls) > MAX_IMAGES:
        message = f"{len(urls)} images in one request; allowed are {MAX_IMAGES}"
        raise ApiError(message, param="messages")
    images, pixels = [], 0
    for number, url in enumerate(urls, start=1):
        if not is_data(url):
            raise ApiError(
                f"image {number} has the URL {shown(url)}: this server fetches nothing; send the "
                "image itself, as data:image/png;base64,...",
                param="messages",
            )
        try:
            images.append(image_of(url, max_pixels=MAX_PIXELS - pixels))
        except InputError as error:
            raise ApiError(f"image {number}: {error}", param="messages") from error
        pixels += images[-1].width * images[-1].height
    prompt = language.encode(Conversation(turns, tuple(images)))
    assert isinstance(prompt, ImagePrompt), "models of texts alone refuse images"
    # here, and not in the thread of the engine, where a failure would end other answers as well
    return replace(prompt, prepared=prompt.inputs())


def call_reader(language: LanguageModel, body: ChatRequest) -> CallReader | None:
    """What reads calls of functions in answers; None: there are no tools.

    Raises:
        ApiError: the model's chat template does not write calls in a form that can be read.
    """
    if not body.active_tools:
        return None
    try:
        form = call_form(encoder_in(language.processor or language.tokenizer), language.ends)
    except InputError as error:
        raise ApiError(str(error), param="tools") from error
    names = [each.name for each in body.functions]
    specials = language.tokenizer.all_special_tokens
    most = 1 if body.parallel_tool_calls is False else None
    return CallReader(form, names, specials, most)


def _encode(language: LanguageModel, prompt: str | list[int]) -> Sequence[int]:
    """The token ids of a prompt of /v1/completions, a text or ids already."""
    if isinstance(prompt, str):
        return language.encode(prompt)
    if max(prompt) >= (size := len(language.tokenizer)):
        raise ApiError(f"prompt has the token {max(prompt)}; there are {size:,}", param="prompt")
    return prompt


def room_for(prompt: Sequence[int], served: ServedAdapter, wanted: int) -> int:
    """The number of tokens that an answer to a prompt may have.

    Raises:
        ApiError: the prompt is empty, or there are fewer than `wanted`.
    """
    if not prompt:
        raise ApiError("the prompt is empty: it has no tokens", param="prompt")
    if served.positions is None:
        return 2**31  # above every max_tokens
    room = served.positions - len(prompt)
    if room < wanted:
        raise ApiError(
            f"the prompt has {len(prompt):,} tokens and the answer {wanted:,}; the model has "
            f"{served.positions:,} positions for both",
            code="context_length_exceeded",
        )
    return room


def choosing_of(body: ChatRequest | CompletionRequest, number: int, tokens: int) -> TokenChooser:
    """The settings of the answer of this number to a prompt."""
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        # int() would also take signs, spaces, underscores and digits of other scripts
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < tokens):
            raise ApiError(
                f"logit_bias has {shown(key)}, which is no token below {tokens:,}",
                param="logit_bias",
            )
        bias[int(key)] = value
    return TokenChooser(
        # other numbers for each answer
        seed=None if body.seed is None else (body.seed + number) % 2**63,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        top_logprobs=body.reported,
    )


class ServedAnswers:
    """The answers to one request of a client, while they are written.

    Attributes:
        requests: one for each answer.
        found: their pieces so far.
    """

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.model, self.prompt_tokens = model, prompt_tokens
        self.requests: list[Request] = []
        self.found: list[ReplyText] = []
        self.start = time.monotonic()
        self._queue: asyncio.Queue[tuple[int, AnswerPart | Exception]] = asyncio.Queue()
        # the engine's thread hands pieces to this loop
        self._loop = asyncio.get_running_loop()

    def receiver(self) -> Emit:
        """Return the `emit` of the next request: it runs in the thread of the engine."""
        index = len(self.found)
        self.found.append(ReplyText())

        def emit(piece: AnswerPart | Exception) -> None:
            # asyncio.Queue is not thread-safe
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return emit

    async def pieces(self) -> AsyncGenerator[tuple[int, AnswerPart]]:
        """Yield the pieces of all answers, with the number of the answer.

        Raises:
            Exception: what ended an answer early.
        """
        running = len(self.requests)
        try:
            while running:
                index, piece = await self._queue.get()
                if isinstance(piece, Exception):
                    raise piece  # the other answers of the request end too
                self.found[index].add(piece)
                running -= piece.finish is not None  # a bool counts as 1
                yield index, piece
        finally:
            # also when the client has gone: then this generator is closed
            self._end(running)

    async def collect(self) -> None:
        """Wait for all pieces."""
        async for _ in self.pieces():
            pass

    def _end(self, running: int) -> None:
        for each in self.requests:
            each.cancelled.set()  # one that has ended ignores it
        written = sum(answer.tokens for answer in self.found)
        known = sum(each.cached for each in self.requests)
        logger.info(
            "%s: %d prompt tokens%s, %d tokens in %.2f s%s",
            self.model,
            self.prompt_tokens,
            f" ({known} known from earlier prompts)" if known else "",
            written,
            time.monotonic() - self.start,
            f", {running} unfinished" if running else "",
        )

    async def events(self, reply: Reply, *, wants_usage: bool) -> AsyncIterator[str]:
        """Yield the server-sent events of a stream."""
        try:
            for index in range(len(self.requests)):
                first = reply.first_chunk(index)
                if first is not None:
                    yield event(first)
        except BaseException:
            # the client has gone before `pieces` could notice
            self._end(len(self.requests))
            raise
        try:
            async for index, piece in self.pieces():
                for chunk in reply.chunks(index, piece):
                    yield event(chunk)
        except Exception as error:  # the status of the reply was sent already
            logger.error("%s: %s", self.model, error)
            yield event(error_body(printable(error), 500))
            return
        if wants_usage:
            yield event(reply.usage_chunk(self.found, self.prompt_tokens))
        yield "data: [DONE]\n\n"  # how OpenAI ends a stream; missing after an error


def event(body: Json) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"  # a line break would end it: json.dumps writes none


async def unless_gone(work: Coroutine[Any, Any, None], request: HttpRequest) -> bool:
    """Do some work, and return True; or cancel it and return False if the client goes before."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        is_done = working.done()  # before `cancel`, after which it would be done too
        working.cancel()
    if is_done:
        working.result()  # raises what the work has raised
    return is_done


async def _left(request: HttpRequest) -> None:
    # the body was read before, so the client's departure is the next message
    while (await request.receive())["type"] != "http.disconnect":
        pass
