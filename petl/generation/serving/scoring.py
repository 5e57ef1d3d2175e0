"""Vectors of texts and scores of documents over HTTP, from runs of retrieval and reranking."""

import asyncio
import base64
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, cast

import numpy as np
from pydantic import BeforeValidator, Field, ValidationInfo
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.data.batch_sampler import chunks
from petl.data.judgements import QUERY
from petl.data.models.sources import read_source
from petl.data.tasks.retrieval import Retrieval
from petl.data.tasks.retrieval.base_folder import MODULES, BaseFolder
from petl.data.tasks.retrieval.reranking import Reranking
from petl.data.tasks.task_file import read_task
from petl.errors import InputError, RunStopped, shown
from petl.generation.inference.loading import find_model
from petl.generation.prediction.predictor import Predictor
from petl.generation.prediction.vectors import load_embedder, plain_predictor, vectors_of_tokens
from petl.generation.serving.bodies import Paths
from petl.generation.serving.engine import Busy
from petl.generation.serving.gate import BODY_BYTES
from petl.generation.serving.parts import PartedReply, written
from petl.generation.serving.replies import ApiError, Json, served_as
from petl.generation.serving.service import CLIENT_GONE, unless_gone
from petl.generation.serving.wire import LONGEST, Strict, Text, Tokens

# bounds of what one request may cost; assumptions
MAX_TEXTS = 2048  # OpenAI's limit
MAX_NUMBERS = 2**22  # of all vectors in a reply
# characters of a text for a token that the model reads: of the part that is tokenized first, and
# of a query at most, which is tokenized with each document
CHARACTERS, MAX_CHARACTERS = 8, 64
T = TypeVar("T")
# the parts to compute, and what makes the text of the reply of their results
Work = tuple[Sequence[Callable[[], T]], Callable[[list[T]], Iterator[str]]]
SCORING = ("retrieval", "reranking")  # tasks of the runs that are served here


def bounded(given: object, info: ValidationInfo) -> object:
    """Return what a field was given, before each of its items is looked at.

    Raises:
        ApiError: a list of too many.
    """
    if isinstance(given, list):
        # the tokens of one text are no list of texts
        most = LONGEST if given and isinstance(given[0], int) else MAX_TEXTS
        if len(given) > most:
            message = f"{info.field_name} has {len(given):,} items; allowed are {most:,}"
            raise ApiError(f"{message} in one request", param=info.field_name)
    return given


Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1)]
Rows = Annotated[list[Tokens], Field(fail_fast=True, min_length=1)]


class EmbeddingRequest(Strict):
    """The body of /v1/embeddings; `input_type` is beyond OpenAI's."""

    model: str
    input: Annotated[Text | Texts | Tokens | Rows, BeforeValidator(bounded)]
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    input_type: Literal["query", "document"] | None = None
    user: str | None = None  # a label

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The texts, or the tokens of each."""
        given: Any = self.input
        # one text, or the tokens of one
        is_one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if is_one else given


class TextDocument(Strict):
    """A document as an object."""

    text: Text


def document_of(given: object) -> object:
    """Return a text as the object that has it."""
    if not isinstance(given, str | dict):
        raise ValueError("Input should be a text, or an object with the field text")
    return {"text": given} if isinstance(given, str) else given


# not a union: errors would name the class
Document = Annotated[TextDocument, BeforeValidator(document_of)]


class RerankRequest(Strict):
    """The body of /rerank, in the form of Jina and Cohere."""

    model: str
    query: Text
    documents: Annotated[
        list[Document], Field(fail_fast=True, min_length=1), BeforeValidator(bounded)
    ]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """The documents."""
        return [each.text for each in self.documents]


class ScoringEngine:
    """Lets requests compute in turn, a part of one at a time.

    Attributes:
        max_batch: texts of a part.
        max_waiting: requests at a time, beside the one that computes.
        waiting: requests that are admitted, see `admitted`.
    """

    def __init__(self, *, max_batch: int, max_waiting: int) -> None:
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.waiting, self.running = 0, 0
        self._closed = False
        self._turn = asyncio.Lock()

    def start(self) -> None:
        """Nothing: the loop of the server hands parts to its threads."""

    def close(self) -> None:
        """Refuse further parts."""
        self._closed = True

    def join(self, timeout: float) -> None:
        """Nothing: the server waits for its threads."""

    @contextmanager
    def admitted(self) -> Generator[None]:
        """Count a request, from before its tokens are made.

        Raises:
            Busy: too many requests are waiting.
        """
        if self.waiting > self.max_waiting:
            raise Busy(f"{self.waiting} requests are waiting; try again later")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def compute(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of all parts, between which other requests have theirs computed.

        Raises:
            RunStopped: the engine is closed.
        """
        return [await self._one(part) for part in parts]

    async def _one(self, part: Callable[[], T]) -> T:
        # a lock of asyncio is fair: a request of many parts does not hold up others
        async with self._turn:
            if self._closed:
                raise RunStopped("the server is stopping")
            self.running = 1
            try:
                return await run_in_threadpool(part)
            finally:
                self.running = 0


@dataclass(frozen=True)
class ScoringService:
    """Answers requests for vectors and scores.

    Attributes:
        served: models by name.
    """

    served: Mapping[str, Predictor]
    engine: ScoringEngine
    body_bytes: int = BODY_BYTES
    # seconds since 1970
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def paths(self) -> Paths:
        """See `AnswerService.paths`."""
        rerank = (RerankRequest, self.rerank)
        embed = (EmbeddingRequest, self.embed)
        return {"/v1/embeddings": embed, "/rerank": rerank, "/v1/rerank": rerank}

    def models(self) -> Json:
        """The body of /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.served]}

    def model(self, name: str) -> Json:
        """The body of /v1/models/NAME."""
        most = served_as(name, self.served).task.max_length
        own = {"created": self.created, "owned_by": "petl", "max_model_len": most}
        return {"id": name, "object": "model", "parent": None, **own}

    async def embed(self, body: EmbeddingRequest, request: HttpRequest) -> Response:
        """Reply to /v1/embeddings."""
        predictor = served_as(body.model, self.served)
        task = predictor.task
        if not isinstance(task, Retrieval):
            raise ApiError(f"{body.model} is a reranker: ask it at /rerank", param="model")
        width = width_of(predictor)
        wanted = body.dimensions or width
        # before anything is computed
        if wanted > width:
            message = f"dimensions={shown(wanted)} is more than the {width} numbers of a vector"
            raise ApiError(message, param="dimensions")
        if len(body.inputs) * wanted > MAX_NUMBERS:
            message = f"{len(body.inputs)} vectors of {wanted} numbers; allowed are {MAX_NUMBERS:,}"
            raise ApiError(f"{message} in all: ask for fewer at a time", param="input")
        return await self._answer(partial(self._vectors, predictor, body, wanted), request)

    def _vectors(
        self, predictor: Predictor, body: EmbeddingRequest, wanted: int
    ) -> Work[np.ndarray]:
        """The vectors of `wanted` numbers that a request asks for."""
        rows = tokens_of(predictor, body)
        # texts of similar length share a part
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        parts = chunks(order, self.engine.max_batch)
        work = [partial(vectors_of_tokens, predictor, [rows[i] for i in part]) for part in parts]

        def reply(found: list[np.ndarray]) -> Iterator[str]:
            vectors = finite("input", np.concatenate(found)[np.argsort(order)])
            if wanted < vectors.shape[1]:  # as vectors of fewer numbers were trained
                vectors = vectors[:, :wanted]
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
            form = encoded if body.encoding_format == "base64" else np.ndarray.tolist
            data = (
                {"object": "embedding", "index": i, "embedding": form(vector)}
                for i, vector in enumerate(vectors)
            )
            # of the texts as they are read, with prefixes and end tokens
            count = sum(map(len, rows))
            usage = {"prompt_tokens": count, "total_tokens": count}
            rest: Json = {"object": "list", "model": body.model, "usage": usage}
            return written(rest, "data", data)

        return work, reply

    async def rerank(self, body: RerankRequest, request: HttpRequest) -> Response:
        """Reply to /rerank and /v1/rerank."""
        predictor = served_as(body.model, self.served)
        if not isinstance(predictor.task, Reranking):
            raise ApiError(f"{body.model} is an embedder: ask it at /v1/embeddings", param="model")
        if not body.query.strip():
            raise ApiError(f"query={shown(body.query)}: give a text with words", param="query")
        return await self._answer(partial(self._scores, predictor, body), request)

    def _scores(self, predictor: Predictor, body: RerankRequest) -> Work[tuple[list[float], int]]:
        """The scores that a request asks for."""
        task, texts = cast("Reranking", predictor.task), body.texts
        query, read = readable(predictor, body.query), [readable(predictor, t) for t in texts]
        if len(query) > (most := MAX_CHARACTERS * task.max_length):
            message = f"the query has {len(query):,} characters with few tokens"
            raise ApiError(f"{message}; allowed are {most:,}: shorten its blanks", param="query")
        # equal documents once: in another batch their scores differ by rounding
        once = list(dict.fromkeys(read))
        order = sorted(range(len(once)), key=lambda i: len(once[i]))
        parts = chunks(order, self.engine.max_batch)
        pairs = [[{"query": query, "document": once[i]} for i in part] for part in parts]
        work = [partial(scores_of, predictor, part) for part in pairs]

        def reply(found: list[tuple[list[float], int]]) -> Iterator[str]:
            # in the order of the parts, which are by length
            flat = [score for scores, _ in found for score in scores]
            by_text = {once[i]: score for i, score in zip(order, flat, strict=True)}
            scores = finite("documents", np.array([by_text[each] for each in read])).tolist()
            # the best first, and of equal ones the one that was given first
            ranked = sorted(range(len(read)), key=lambda i: (-scores[i], i))[: body.top_n]
            results: Iterator[Json] = (
                {
                    "index": i,
                    "relevance_score": task.shown_score(scores[i]),
                    **({"document": {"text": texts[i]}} if body.return_documents else {}),
                }
                for i in ranked
            )
            usage = {"total_tokens": sum(count for _, count in found)}
            return written({"model": body.model, "usage": usage}, "results", results)

        return work, reply

    async def _answer(self, prepare: Callable[[], Work[T]], request: HttpRequest) -> Response:
        """The response with the results of the work that `prepare` makes."""
        with ExitStack() as place:
            place.enter_context(self.engine.admitted())
            # in another thread: a long text would hold up all connections
            work, reply = await run_in_threadpool(prepare)
            results: list[T] = []

            async def computed() -> None:
                results.extend(await self.engine.compute(work))

            if not await unless_gone(computed(), request):
                return Response(status_code=CLIENT_GONE)
            texts = await run_in_threadpool(reply, results)
            # the place is kept until the reply is read
            return PartedReply(texts, place.pop_all())


def readable(predictor: Predictor, text: str) -> str:
    """Return a beginning of a text that has all the model reads of it, as the rest takes long.

    The end of a tokenizer that cuts the beginning off. What is left out of a query and its document
    if both are long is more than what is read: which of them has an odd token is then left open.
    """
    tokenizer, most = predictor.processor, predictor.task.max_length
    on_left = tokenizer.truncation_side == "left"
    size = CHARACTERS * most
    # twice as long as what fills the model: the last tokens differ where a word is cut
    while 2 * size < len(text):
        part = text[-size:] if on_left else text[:size]
        # with the settings of all calls, which several threads make
        if len(tokenizer(part, truncation=True, max_length=most)["input_ids"]) >= most:
            return text[-2 * size :] if on_left else text[: 2 * size]
        size *= 2
    return text


def tokens_of(predictor: Predictor, body: EmbeddingRequest) -> list[list[int]]:
    """The tokens of each input of a request.

    Raises:
        ApiError: a text is empty, or tokens are unknown or too many.
    """
    task, tokenizer = predictor.task, predictor.processor
    assert isinstance(task, Retrieval), "others are refused before"
    if isinstance(body.inputs[0], str):
        blank = next((i for i, text in enumerate(body.inputs) if not str(text).strip()), None)
        if blank is not None:
            message = f"input has {body.inputs[blank]!r} at place {blank}: give texts with words"
            raise ApiError(message, param="input")
        prefix = task.query_prefix if body.input_type == QUERY else task.document_prefix
        try:
            texts = [readable(predictor, f"{prefix or ''}{text}") for text in body.inputs]
            return task.tokens(tokenizer, texts)
        except InputError as error:
            raise ApiError(str(error), param="input") from error
    rows: Any = body.inputs
    highest, longest = max(map(max, rows)), max(map(len, rows))
    if highest >= len(tokenizer):
        message = f"input has the token {highest}; there are {len(tokenizer):,}"
        raise ApiError(message, param="input")
    if longest > task.max_length:
        raise ApiError(
            f"input has {longest:,} tokens; the model reads {task.max_length:,}",
            param="input",
            code="context_length_exceeded",
        )
    return rows


def scores_of(predictor: Predictor, rows: list[dict[str, str]]) -> tuple[list[float], int]:
    """The logits of pairs, and their number of tokens."""
    encoded, found = predictor.values([{**row, "number": i} for i, row in enumerate(rows)])
    # not the scores that are shown: those of sure pairs are equal
    return [float(value) for value in found], sum(len(row["input_ids"]) for row in encoded)


def finite(param: str, results: np.ndarray) -> np.ndarray:
    """Return results, of each input a number or a vector, if JSON and rankings can have them all.

    Raises:
        ApiError: one is not finite.
    """
    is_finite = np.isfinite(results).reshape(len(results), -1).all(axis=1)
    if not is_finite.all():
        raise ApiError(
            f"the model's result for {param}.{is_finite.argmin()} is not finite: train it again, "
            "or serve an earlier checkpoint",
            500,
            param=param,
        )
    return results


def encoded(vector: np.ndarray) -> str:
    """A vector as base64 of float32, the least significant byte first."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def width_of(predictor: Predictor) -> int:
    """Numbers of a vector."""
    return cast("Retrieval", predictor.task).vector_width(predictor.model.config)


# Loading


def scoring_of(path: str, *, trust_remote_code: bool = False) -> str:
    """The task of a run or model that gives vectors or scores, one of `SCORING`; "" of others."""
    found = find_model(path, trust_remote_code=trust_remote_code)
    if isinstance(found, SavedAdapter):
        task = read_task(found.adapter)
        return task.name if task is not None and task.name in SCORING else ""
    # a plain model says by the files of sentence-transformers what it is
    folder = BaseFolder(read_source(found))
    if folder.is_cross_encoder:
        return "reranking"
    return "retrieval" if folder.base.json_file(MODULES) is not None else ""


def load_scoring(
    runs: Mapping[str, str], *, trust_remote_code: bool = False, other_base: bool = False
) -> dict[str, Predictor]:
    """Load runs and models that give vectors or scores, by name; each with its own base model."""
    options = {"trust_remote_code": trust_remote_code, "other_base": other_base}
    served = {name: load_scorer(path, **options) for name, path in runs.items()}
    for predictor in served.values():
        # the first call may change its settings; later ones are made by several threads
        predictor.processor("", truncation=True, max_length=predictor.task.max_length)
    return served


def load_scorer(path: str, **options: bool) -> Predictor:
    """Load a run or model of `SCORING`."""
    found = find_model(path, trust_remote_code=options["trust_remote_code"])
    if isinstance(found, SavedAdapter) or not BaseFolder(read_source(found)).is_cross_encoder:
        return load_embedder(path, **options)
    loss = "binary" if BaseFolder(read_source(found)).has_probabilities else "mse"
    return plain_predictor(found, Reranking(loss=loss))
