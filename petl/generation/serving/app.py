"""The HTTP server: its paths, its errors in OpenAI's format, and its process."""

import logging
import socket
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from petl.errors import InputError, RunStopped, printable
from petl.generation.serving.bodies import Body, Paths, read_body
from petl.generation.serving.connections import CONNECTIONS, Connection
from petl.generation.serving.engine import Busy
from petl.generation.serving.gate import Gate
from petl.generation.serving.replies import ApiError, Json, error_body
from petl.system.imports.collector import freeze_until_exit
from petl.version import __version__

SHUTDOWN_SECONDS = 10  # for open connections to end
JOIN_SECONDS = 60.0  # for the last pass
# by class of exception; those of a client that sends something else have their own
STATUS: dict[type[Exception], int] = {InputError: 400, Busy: 429, RunStopped: 503}


class ServerEngine(Protocol):
    """What computes the replies of a server."""

    @property
    def running(self) -> int:
        """How many are in progress."""
        ...

    @property
    def waiting(self) -> int:
        """How many wait."""
        ...

    def start(self) -> None:
        """Begin to compute."""

    def close(self) -> None:
        """End, and refuse further requests."""

    def join(self, timeout: float) -> None:
        """Wait for the end, after `close`."""


class Service(Protocol):
    """What a server answers."""

    @property
    def engine(self) -> ServerEngine:
        """What computes the replies."""
        ...

    @property
    def paths(self) -> Paths:
        """What requests are posted to."""
        ...

    @property
    def body_bytes(self) -> int:
        """Bytes of a body at most."""
        ...

    def models(self) -> Json:
        """The body of /v1/models."""
        ...

    def model(self, name: str) -> Json:
        """The body of /v1/models/NAME."""
        ...


def build_app(
    service: Service,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """Return the application, without its engine being started.

    Args:
        api_key: that requests must have; None: none.
        hosts: names that a request may have in its Host header, beside addresses; None: any.
    """
    # no pages of documentation: they load scripts from elsewhere
    app = FastAPI(title="petl serve", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_key=api_key, hosts=hosts, body_bytes=service.body_bytes)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    # Starlette takes the handler of the nearest class in an exception's MRO
    for kind in (*STATUS, Exception):
        app.add_exception_handler(kind, _failed)

    @app.get("/health")
    async def health() -> Json:
        engine = service.engine
        return {"status": "ok", "running": engine.running, "waiting": engine.waiting}

    @app.get("/v1/models")
    async def models() -> Json:
        return service.models()

    @app.get("/v1/models/{name:path}")  # names such as OWNER/NAME have slashes
    async def model(name: str) -> Json:
        return service.model(name)

    for path, (kind, reply) in service.paths.items():
        app.add_api_route(path, partial(_replied, kind, reply), methods=["POST"])
    return app


async def _replied(
    kind: type[Body],
    reply: Callable[[Body, HttpRequest], Awaitable[Response]],
    request: HttpRequest,
) -> Response:
    return await reply(await _body(kind, request), request)


async def _body(kind: type[Body], request: HttpRequest) -> Body:
    media = request.headers.get("content-type", "")
    return await run_in_threadpool(partial(read_body, kind, await request.body(), media))


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        paths = ", ".join(
            dict.fromkeys(r.path for r in request.app.routes if isinstance(r, APIRoute))
        )
        message = f"no path {request.url.path}; available: {paths}"
    return JSONResponse(error_body(printable(message), error.status_code), error.status_code)


async def _failed(request: HttpRequest, error: Exception) -> Response:
    status = next((s for kind, s in STATUS.items() if isinstance(error, kind)), 500)
    message = f"{type(error).__name__}: {error}" if status == 500 else str(error)
    return JSONResponse(error_body(printable(message), status), status)


# The process


class Server(uvicorn.Server):
    """A server that ends its answers at Ctrl-C instead of waiting for them."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: ServerEngine,
        ready: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self.engine, self.ready = engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say so."""
        await super().startup(sockets)
        # a large body makes many lists: each collection would visit all models and modules too
        freeze_until_exit()
        self.engine.start()
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the answers, then the server."""
        # may interrupt `submit` in this thread: the engine's lock is reentrant
        self.engine.close()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0: any free one.

    Raises:
        InputError: it is taken, or there is no such host.
    """
    opened = None
    try:
        # the first address only: localhost may have one of IPv4 and one of IPv6
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        # a server that ended a moment ago leaves its port in TIME_WAIT
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that is too long
        if opened is not None:
            opened.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"cannot listen on --host={host} --port={port}: {reason}; choose another port, "
            "0 for any free one"
        ) from error
    return opened


def run(
    app: FastAPI,
    engine: ServerEngine,
    bound: socket.socket,
    ready: Callable[[], object],
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        bound: by `bind`.
        ready: called once requests are accepted.
    """
    for name in ("uvicorn", "uvicorn.error"):  # as petl's: control characters escaped
        logging.getLogger(name).handlers = logging.getLogger("petl").handlers
        logging.getLogger(name).propagate = False
    config = uvicorn.Config(
        app,
        log_config=None,  # uvicorn would set up handlers of its own
        log_level="warning",
        access_log=False,
        server_header=False,
        http=Connection,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    try:
        Server(config, engine, ready).run(sockets=[bound])
    except KeyboardInterrupt:  # the usual end: uvicorn raises it again after all connections ended
        pass
    finally:
        engine.close()
        engine.join(JOIN_SECONDS)
