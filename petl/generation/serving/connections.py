"""Connections of `petl serve`: bounded in number and in the time until a request is there.

Where there are too many, the oldest one without a complete request makes room for a new one, so
that clients who hold connections open keep nobody out.
"""

import asyncio
from collections.abc import Iterable

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 1000  # at a time
OF_ONE_ADDRESS = 512
HEADER_SECONDS = 10.0  # from the first byte of a request to the end of its headers
FLUSH_SECONDS = 60.0  # until what a client has not read of its replies is dropped


class Connection(H11Protocol):
    """A connection of a client, which is closed if its request does not arrive in time."""

    waiting: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None  # while the client does not read
    dropped = False

    @property
    def is_idle(self) -> bool:
        """True if no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def gives_room(self) -> bool:
        """True if it waits for its client: to send a request or all of a body, or to read."""
        return self.is_idle or self.cycle.more_body or self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection, and drop another without a request, or this one, if they are many."""
        super().connection_made(transport)
        address = self.client[0] if self.client else None
        # in the order in which they were made
        known = (each for each in self.connections if isinstance(each, Connection))
        others = sorted((each for each in known if each is not self), key=_made)
        same = [each for each in others if each.client and each.client[0] == address]
        self.made = self.loop.time()
        if not (_makes_room(same, OF_ONE_ADDRESS) and _makes_room(others, CONNECTIONS - 1)):
            self.drop()
        self.wait()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self.wait()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self.wait()

    def pause_writing(self) -> None:
        """Wait for the client, which has much to read; a stream, and the next reply, wait too."""
        super().pause_writing()
        self.unread = self.loop.call_later(FLUSH_SECONDS, self.drop)

    def resume_writing(self) -> None:
        """The client has read almost everything."""
        self.stop_unread()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self.stop_waiting()
        self.stop_unread()
        super().connection_lost(exc)

    def wait(self) -> None:
        """Close the connection later, unless the headers of a request are there by then."""
        if not self.is_idle:
            self.stop_waiting()
        elif self.waiting is None:
            self.waiting = self.loop.call_later(HEADER_SECONDS, self.end)

    def end(self) -> None:
        """Close the connection once its last reply is read, and drop it where that takes long."""
        self.transport.close()
        self.waiting = self.loop.call_later(FLUSH_SECONDS, self.drop)

    def drop(self) -> None:
        """End the connection now, with what is left to send."""
        self.dropped = True
        self.transport.abort()

    def stop_waiting(self) -> None:
        """The headers are there, or the connection has ended."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def stop_unread(self) -> None:
        """The client reads, or the connection has ended."""
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None


def _made(connection: Connection) -> float:
    return connection.made


def _makes_room(others: Iterable[Connection], most: int) -> bool:
    """Return True if there are fewer than `most`, or one that waits could be dropped."""
    # not those that are only closing: what a client does not read keeps them open
    open_ones = [each for each in others if not each.dropped]
    if len(open_ones) < most:
        return True
    waiting = next((each for each in open_ones if each.gives_room), None)
    if waiting is not None:
        waiting.drop()
    return waiting is not None
