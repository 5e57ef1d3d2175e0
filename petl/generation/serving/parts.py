"""Large replies, written in parts while their clients read them.

A whole one of millions of numbers would be one call of `json.dumps`, which holds up all threads,
and would be kept outside of every bound until its client has read it.
"""

import asyncio
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from petl.generation.serving import connections
from petl.generation.serving.replies import Json

PART = 2**16  # characters
logger = logging.getLogger(__name__)


class PartedReply(StreamingResponse):
    """A reply in JSON that keeps a place until its client has read it, or is gone."""

    def __init__(self, texts: Iterable[str], place: ExitStack) -> None:
        super().__init__(joined(texts), media_type="application/json")
        self.place = place
        self.unread = connections.FLUSH_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts, and end where the client takes too long to read them."""

        async def timed(message: Message) -> None:
            # the sum over all parts: a few bytes now and then would keep the place for hours
            start = asyncio.get_running_loop().time()
            async with asyncio.timeout(self.unread):
                await send(message)
            self.unread -= asyncio.get_running_loop().time() - start

        with self.place:
            try:
                await super().__call__(scope, receive, timed)
            except TimeoutError:  # the server closes the connection of an incomplete reply
                logger.warning("a client did not read its reply in time")


def written(rest: Json, name: str, items: Iterable[Json]) -> Iterator[str]:
    """Yield the JSON text of an object, whose last field is a list, item by item."""
    yield f'{_text(rest)[:-1]},"{name}":['
    for number, item in enumerate(items):
        yield f"{',' if number else ''}{_text(item)}"
    yield "]}"


def joined(texts: Iterable[str]) -> Iterator[bytes]:
    """Yield the bytes of texts, short ones together."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= PART:
            yield "".join(held).encode()
            held, size = [], 0
    yield "".join(held).encode()


def _text(value: Json) -> str:
    # as JSONResponse writes it
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
