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

from petl.cli.answering import own_weights
from petl.cli.table import API_KEY, NO_DRAFTS, PETL, ServeOptions
from petl.errors import InputError

if TYPE_CHECKING:
    from petl.generation.serving.app import Service
    from petl.generation.serving.engine import AnswerEngine, ServedAdapter
    from petl.generation.serving.scoring import ScoringService

LOCAL = "localhost"
MB, PREFIXES = 2**20, 256  # MB of the beginnings of prompts, by default
logger = logging.getLogger("petl")


def serve(options: ServeOptions) -> None:
    """Load the models and serve them until Ctrl-C."""
    from petl.system.imports.extras import need_extra

    for package in ("fastapi", "uvicorn", "llguidance"):
        need_extra("serve", package, "petl serve")
    from petl.generation.serving import app
    from petl.generation.serving.models import named_runs
    from petl.generation.serving.service import AnswerService

    key = options.api_key
    if key is None:
        key = os.environ.get(API_KEY) or None  # an empty variable counts as unset
    if not (is_local(options.host) or key or options.allow_anyone):
        raise InputError(
            f"--host={options.host} lets others use the models: give --api-key KEY or "
            f"{API_KEY}, or --allow-anyone"
        )
    runs = named_runs(options.runs)
    # from files alone: the port is taken, and models are loaded, after it
    scoring = scores(options, runs)
    own = {"--prefix-cache": options.prefix_cache, "--drafter": options.drafter}
    given = [f"{name}={value}" for name, value in own.items() if value is not None]
    if given and (scoring or options.engine != PETL):
        raise InputError(
            f"{' '.join(given)}: of answers by petl's own engine, and "
            f"{'these models write none' if scoring else 'this is ' + options.engine}: leave out"
        )
    bound = app.bind(options.host, options.port)  # before the models, which take longer
    with ExitStack() as stack:
        if scoring:
            service: Service = _scoring(options, runs)
            described = runs
        else:
            served, engine = _loaded(options, runs, stack)
            service = AnswerService(served, engine, options.max_tokens)
            described = {each.name: _described(each) for each in served.values()}
        _run(options, service, described, bound, key)
    logger.info("the server has ended")


def scores(options: ServeOptions, runs: dict[str, str]) -> bool:
    """Return True if the models give vectors or scores, and False if they write.

    Raises:
        InputError: some do the one and some the other, or an option is of those that write.
    """
    from petl.generation.serving.scoring import scoring_of

    trust = options.trust_remote_code
    found = {name: scoring_of(path, trust_remote_code=trust) for name, path in runs.items()}
    scoring = [name for name, task in found.items() if task]
    if not scoring:
        return False
    if len(scoring) < len(found):
        other = next(name for name, task in found.items() if not task)
        raise InputError(
            f"{scoring[0]!r} gives vectors or scores and {other!r} writes: start a server for each "
            "of them, the second with --port"
        )
    if options.engine != PETL or options.weights is not None or options.plain is not None:
        raise InputError(
            f"--engine={options.engine} --weights={options.weights} --plain={options.plain} are of "
            f"models that write, and {scoring[0]!r} gives vectors or scores: leave them out"
        )
    return True


def _scoring(options: ServeOptions, runs: dict[str, str]) -> "ScoringService":
    """Load models that give vectors or scores."""
    from petl.generation.serving.scoring import ScoringEngine, ScoringService, load_scoring

    served = load_scoring(
        runs, trust_remote_code=options.trust_remote_code, other_base=options.other_base
    )
    engine = ScoringEngine(max_batch=options.max_batch, max_waiting=options.max_waiting)
    return ScoringService(served, engine)


def _loaded(
    options: ServeOptions, runs: dict[str, str], stack: ExitStack
) -> "tuple[dict[str, ServedAdapter], AnswerEngine]":
    """Load the models into the engine of `options`; files that it needs go with `stack`."""
    limits = {"max_batch": options.max_batch, "max_waiting": options.max_waiting}
    if options.engine == PETL:
        from petl.generation.serving.engine import Engine
        from petl.generation.serving.models import load_served

        served = load_served(
            runs,
            plain=options.plain,
            trust_remote_code=options.trust_remote_code,
            other_base=options.other_base,
            drafter=None if options.drafter == NO_DRAFTS else "free",
            prefix_bytes=MB * (PREFIXES if options.prefix_cache is None else options.prefix_cache),
            weights=own_weights(options),
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
    service: "Service",
    described: dict[str, str],
    bound: socket,
    key: str | None,
) -> None:
    """Serve models, which `described` tells of by name."""
    from petl.generation.serving import app

    port = bound.getsockname()[1]  # the system has chosen it, if --port is 0
    # an address of IPv6 has brackets in a URL
    host = f"[{options.host}]" if ":" in options.host else options.host

    def ready() -> None:
        for name, what in described.items():
            logger.info("model %s: %s", name, what)
        logger.info("serving on http://%s:%d/v1 (Ctrl-C ends it)", host, port)

    # uvicorn ends its connections, then lets the signal end the process: as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hosts = {LOCAL, options.host.lower(), *map(str.lower, options.allow_host)}
    app.run(app.build_app(service, key, hosts), service.engine, bound, ready)


def is_local(host: str) -> bool:
    """Return True if an address is reached from this machine only."""
    try:
        return host == LOCAL or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _described(served: "ServedAdapter") -> str:
    return served.path or "the base model"
