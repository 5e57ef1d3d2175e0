"""The command serve: its arguments, and what it prints.

Like petl.cli.main, imports nothing heavy until the command runs.
"""

import argparse
import logging
import os
from ipaddress import ip_address
from typing import TYPE_CHECKING

from petl.cli.arguments import Add, add_trust, number
from petl.errors import InputError

if TYPE_CHECKING:
    from petl.generation.serving.served import Served

API_KEY = "PETL_API_KEY"  # environment variable; words of a command are seen by all users
NO_DRAFTS = "none"  # the value of --drafter for plain decoding
LOCAL = "localhost"
logger = logging.getLogger("petl")

SERVE = """\
Serve a base model with any number of adapters over HTTP, in the format of OpenAI's API. A request
chooses an adapter by `model`: the name of its folder, or NAME; the base model's own name means no
adapter. Requests of different adapters are computed together, and join and leave while others run.

  petl serve runs/french runs/legal
  petl serve fr=runs/french --port 8001 --max-batch 32

Paths: /v1/models, /v1/chat/completions, /v1/completions, /health. Ctrl-C ends the server."""


def add_parsers(add: Add) -> None:
    """Add the parser of the command with `add`."""
    command = add("serve", "serve adapters over HTTP, with OpenAI's API", SERVE)
    command.add_argument(
        "runs",
        metavar="[NAME=]RUN",
        nargs="+",
        help="folder of a run, of an adapter, or of a merged model, and its name for requests",
    )
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    command.add_argument(
        "--port",
        metavar="N",
        type=number(int, 0, 65535),
        default=8000,
        help="default: 8000; 0: any free one",
    )
    command.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(API_KEY) or None,  # an empty variable counts as unset
        help=f"that requests must have (default: ${API_KEY}; none: no key is needed)",
    )
    command.add_argument(
        "--allow-anyone",
        action="store_true",
        help="with a --host that others reach: answer without a key",
    )
    command.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name by which clients call this server, such as that of a proxy in front; may be "
        "repeated (addresses, localhost and --host are allowed)",
    )
    limits = [
        ("max-batch", 16, "answers that are computed at the same time"),
        ("max-waiting", 256, "further requests that may wait; the next ones get status 429"),
        ("max-tokens", 4096, "tokens of an answer at most"),
    ]
    for name, default, meaning in limits:
        command.add_argument(
            f"--{name}",
            metavar="N",
            type=number(int, 1, 10**6),
            default=default,
            help=f"{meaning} (default: {default})",
        )
    command.add_argument(
        "--plain",
        action=argparse.BooleanOptionalAction,  # neither form: None, which is decided by the run
        help="read the turn of a chat as plain text, without the chat template (default: for runs "
        "that have learned from plain text, and models without a template)",
    )
    command.add_argument(
        "--drafter",
        choices=("free", NO_DRAFTS),
        default="free",
        help="what guesses tokens ahead while one answer is computed alone, for the same answer in "
        "less time: free (copies and recycles tokens), or none (default: free)",
    )
    add_trust(command)


def serve(arguments: argparse.Namespace) -> None:
    """Load the models and serve them until Ctrl-C."""
    from petl.system.imports.extras import need_extra

    for package in ("fastapi", "uvicorn"):
        need_extra("serve", package, "petl serve")
    from petl.generation.serving import app
    from petl.generation.serving.engine import Engine
    from petl.generation.serving.models import load_served, named_runs
    from petl.generation.serving.service import Service

    if not (is_local(arguments.host) or arguments.api_key or arguments.allow_anyone):
        raise InputError(
            f"--host={arguments.host} lets others use the models: give --api-key KEY or "
            f"{API_KEY}, or --allow-anyone"
        )
    runs = named_runs(arguments.runs)
    bound = app.bind(arguments.host, arguments.port)  # before the models, which take longer
    served = load_served(
        runs,
        plain=arguments.plain,
        trust_remote_code=arguments.trust_remote_code,
        other_base=arguments.other_base,
        drafter=None if arguments.drafter == NO_DRAFTS else arguments.drafter,
    )
    engine = Engine(max_batch=arguments.max_batch, max_waiting=arguments.max_waiting)
    service = Service(served, engine, arguments.max_tokens)
    port = bound.getsockname()[1]  # the system has chosen it, if --port is 0
    # an address of IPv6 has brackets in a URL
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host

    def ready() -> None:
        for each in served.values():
            logger.info("model %s: %s", each.name, _described(each))
        logger.info("serving on http://%s:%d/v1 (Ctrl-C ends it)", host, port)

    hosts = {LOCAL, arguments.host.lower(), *map(str.lower, arguments.allow_host)}
    app.run(app.build_app(service, arguments.api_key, hosts), engine, bound, ready)
    logger.info("the server has ended")


def is_local(host: str) -> bool:
    """Return True if an address is reached from this machine only."""
    try:
        return host == LOCAL or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _described(served: "Served") -> str:
    return served.path or "the base model"


COMMANDS = {"serve": serve}
