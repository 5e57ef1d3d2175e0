"""The command serve: what it prints."""

import logging
import os
import signal
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from petl.cli.answering import require_own_weights
from petl.cli.table import API_KEY, NO_DRAFTS, PETL, ServeOptions
from petl.errors import InputError

if TYPE_CHECKING:
    from petl.generation.serving.engine import AnswerEngine, ServedAdapter

LOCAL = "localhost"
logger = logging.getLogger("petl")


def serve(options: ServeOptions) -> None:
    """Load the models and serve them until Ctrl-C."""
    from petl.system.imports.extras import need_extra

    for package in ("fastapi", "uvicorn", "llguidance"):
        need_extra("serve", package, "petl serve")
    from petl.generation.serving import app
    from petl.generation.serving.models import named_runs

    key = options.api_key
    if key is None:
        key = os.environ.get(API_KEY) or None  # an empty variable counts as unset
    if not (is_local(options.host) or key or options.allow_anyone):
        raise InputError(
            f"--host={options.host} lets others use the models: give --api-key KEY or "
            f"{API_KEY}, or --allow-anyone"
        )
    runs = named_runs(options.runs)
    bound = app.bind(options.host, options.port)  # before the models, which take longer
    with ExitStack() as stack:
        served, engine = _loaded(options, runs, stack)
        _run(options, served, engine, bound, key)
    logger.info("the server has ended")


def _loaded(
    options: ServeOptions, runs: dict[str, str], stack: ExitStack
) -> "tuple[dict[str, ServedAdapter], AnswerEngine]":
    """Load the models into the engine of `options`; files that it needs go with `stack`."""
    limits = {"max_batch": options.max_batch, "max_waiting": options.max_waiting}
    if options.engine == PETL:
        require_own_weights(options)
        from petl.generation.serving.engine import Engine
        from petl.generation.serving.models import load_served

        served = load_served(
            runs,
            plain=options.plain,
            trust_remote_code=options.trust_remote_code,
            other_base=options.other_base,
            drafter=None if options.drafter == NO_DRAFTS else options.drafter,
        )
        return served, Engine(**limits)
    from petl.generation.serving.llama_cpp import load_llama

    folder = Path(stack.enter_context(TemporaryDirectory(prefix="petl-serve-")))
    return load_llama(
        runs,
        folder,
        plain=options.plain,
        trust_remote_code=options.trust_remote_code,
        other_base=options.other_base,
        weights=options.weights,
        **limits,
    )


def _run(
    options: ServeOptions,
    served: "dict[str, ServedAdapter]",
    engine: "AnswerEngine",
    bound: socket,
    key: str | None,
) -> None:
    from petl.generation.serving import app
    from petl.generation.serving.service import AnswerService

    service = AnswerService(served, engine, options.max_tokens)
    port = bound.getsockname()[1]  # the system has chosen it, if --port is 0
    # an address of IPv6 has brackets in a URL
    host = f"[{options.host}]" if ":" in options.host else options.host

    def ready() -> None:
        for each in served.values():
            logger.info("model %s: %s", each.name, _described(each))
        logger.info("serving on http://%s:%d/v1 (Ctrl-C ends it)", host, port)

    # uvicorn ends its connections, then lets the signal end the process: as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hosts = {LOCAL, options.host.lower(), *map(str.lower, options.allow_host)}
    app.run(app.build_app(service, key, hosts), engine, bound, ready)


def is_local(host: str) -> bool:
    """Return True if an address is reached from this machine only."""
    try:
        return host == LOCAL or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _described(served: "ServedAdapter") -> str:
    return served.path or "the base model"
