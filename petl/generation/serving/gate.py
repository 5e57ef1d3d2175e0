"""What a request has to pass before it is read: its host, the key, and the bounds of its body."""

import asyncio
import hmac
import re
from collections.abc import Collection
from contextlib import nullcontext
from ipaddress import ip_address

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petl.errors import printable
from petl.generation.serving.replies import error_body

OPEN = ("/health",)  # paths without a key
BODY_BYTES = 4 * 2**20  # 4 MiB: about a million tokens, at four bytes each
IMAGE_BODY_BYTES = 2**26  # 64 MiB, of a server whose model reads images
LARGE_BODIES = 8  # of more than BODY_BYTES at a time, until they are answered; others wait
BODY_SECONDS = 30.0  # for a body to arrive


class Gate:
    """ASGI middleware that refuses requests without the key, and bodies that are too large."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None = None,
        hosts: Collection[str] | None = None,
        body_bytes: int = BODY_BYTES,
    ) -> None:
        self.app, self.hosts, self.body_bytes = app, hosts, body_bytes
        self.large = asyncio.Semaphore(LARGE_BODIES)
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body read, or reply with an error."""
        if scope["type"] != "http":  # the start and end of the server: "lifespan"
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])  # names are in lower case, by the ASGI specification
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and not is_known_host(host, self.hosts):
            message = f"Host: {printable(host[:100])} is none of this server: see --allow-host"
            await refuse(403, message, scope, receive, send)
            return
        given = headers.get(b"authorization", b"")
        # compare_digest takes the same time wherever the first difference is
        is_known = self.expected is None or hmac.compare_digest(given, self.expected)
        if not is_known and scope["path"] not in OPEN:
            await refuse(401, "the API key is missing or wrong", scope, receive, send)
            return
        size = announced(headers)
        if size is None or size > self.body_bytes:
            await self.too_large(self.body_bytes, scope, receive, send)
            return
        # held until the reply: what was made of the body is kept until then
        async with self.large if size > BODY_BYTES else nullcontext():
            await self.read(max(size, min(BODY_BYTES, self.body_bytes)), scope, receive, send)

    async def read(self, most: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a body of at most `most` bytes, and pass the request on, or reply with an error."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await read_body(receive, most)
        except TimeoutError:
            await refuse(408, "the body did not arrive in time", scope, receive, send)
            return
        if body is None:
            await self.too_large(most, scope, receive, send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            # behind the body only http.disconnect follows
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def too_large(self, most: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Reply that a body is too large."""
        hint = "" if most == self.body_bytes else ": say in Content-Length how many"
        message = f"the body has more than {most:,} bytes{hint}"
        await refuse(413, message, scope, receive, send)


def is_known_host(header: str, hosts: Collection[str]) -> bool:
    """Return True if a Host header names an address or one of `hosts`.

    A page of any site can make a browser send requests here under a name of that site, whose
    address it then changes (DNS rebinding); under an address it cannot.
    """
    # NAME:PORT, [IPv6]:PORT, or one of them without port
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:\d+)?", header)
    if found is None:
        return False
    name = found[1].strip("[]").lower()
    try:
        return name in hosts or bool(ip_address(name))
    except ValueError:
        return False


def announced(headers: dict[bytes, bytes]) -> int | None:
    """Return the length of a body, 0 if its headers have none; None: they have no number."""
    given = headers.get(b"content-length", b"0")
    # at most 12 digits: int() of a longer text is slow, or an error
    return int(given) if given.isdigit() and len(given) <= 12 else None


async def read_body(receive: Receive, most: int) -> bytes | None:
    """Return the body of a request; None: it has more than `most` bytes."""
    parts, size, more = [], 0, True
    # counted too, since a body in chunks announces no length
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)  # also of a client that has gone
        if size > most:
            return None
    return b"".join(parts)


async def refuse(status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Reply with an error, and close the connection: the rest of its body is not read."""
    response = JSONResponse(error_body(message, status), status, {"connection": "close"})
    await response(scope, receive, send)
