"""The command `petl squeeze`: a budget of bytes, divided over the layers of an adapter by search.

Imports what `petl.cli.main` may import; the function imports its modules when it runs.
"""

import argparse
import re
from pathlib import Path

from petl.cli.arguments import COUNT, Add, add_run, number

WHAT = ("density", "rank", "bits")  # as in petl.adapters.search.features, which imports torch
UNITS = {"": 1, "kb": 1000, "mb": 10**6, "gb": 10**9}

SQUEEZE = """\
Write an adapter whose file of weights has at most so many bytes, with the levels of its layers
chosen by an evolutionary search (EvoPress): the outputs stay near those of the adapter as it is.

  petl squeeze runs/mine --bytes 100KB
  petl squeeze runs/mine --share 0.05 --what rank --generations 20

density: how many values of each module ComPEFT keeps (`petl compress`), for any method; rank: of a
LoRA, and of what `petl export --lora` takes; bits: of the tensors of the method binary.

Candidates are compared on the run's validation rows, or on train rows without any; test rows decide
nothing. Ctrl-C ends the search and writes the best so far; the same command goes on from there."""


def byte_count(text: str) -> int:
    """Parse a number of bytes, such as 100000, 100KB or 1.5MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]b|)", text.strip().lower())
    value = float(found[1]) * UNITS[found[2]] if found else 0
    if not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 100KB or 1.5MB")
    return int(value)


def add_parsers(add: Add) -> None:
    """Add the parser of the command with `add`."""
    command = add("squeeze", "divide a budget of bytes over an adapter's layers", SQUEEZE)
    add_run(command)
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--bytes", type=byte_count, metavar="N", help="largest size of the file of weights: 100KB"
    )
    size.add_argument(
        "--share",
        type=number(float, 0, 1, above=True),
        metavar="X",
        help="the same as a fraction of the adapter's own file",
    )
    command.add_argument(
        "--what", choices=WHAT, default="density", help="what is searched (default: density)"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        help="folder to write: new, or of a search to resume (default: beside RUN, named after it)",
    )
    command.add_argument(
        "--generations", type=COUNT, default=50, metavar="N", help="to search (default: 50)"
    )
    command.add_argument(
        "--offspring",
        type=COUNT,
        default=32,
        metavar="N",
        help="candidates of a generation (default: 32)",
    )
    command.add_argument(
        "--rows", type=COUNT, default=512, metavar="N", help="rows to compare on (default: 512)"
    )
    command.add_argument(
        "--metric",
        choices=("kl", "loss"),
        default="kl",
        help="kl: divergence from the adapter's outputs; loss: on the labels (default: kl)",
    )
    command.add_argument(
        "--seed", type=number(int, 0), default=0, metavar="N", help="of the search (default: 0)"
    )


def squeeze(arguments: argparse.Namespace) -> None:
    """Search, write the adapter, and print how it compares with even levels."""
    from petl.adapters.export.saved_adapter import find
    from petl.adapters.search.features import FEATURES
    from petl.adapters.search.records import Settings
    from petl.adapters.search.squeeze import squeeze as search
    from petl.adapters.search.squeeze import weights_of
    from petl.experiments.reports.squeezed import print_squeezed
    from petl.system.processes import is_first

    saved = find(
        arguments.run,
        trust_remote_code=arguments.trust_remote_code,
        other_base=arguments.other_base,
    )
    own = weights_of(saved).stat().st_size
    size = arguments.bytes or int(arguments.share * own)
    folder = saved.run or saved.adapter.absolute()  # "." has no name
    out = arguments.out or folder.with_name(f"{folder.name}-{arguments.what}-{size}")
    settings = Settings(
        arguments.what,
        size,
        arguments.metric,
        arguments.rows,
        arguments.offspring,
        arguments.seed,
    )
    made = FEATURES[arguments.what]
    found = search(saved, made, settings, out, generations=arguments.generations)
    if is_first():
        print_squeezed(found, own, out)


COMMANDS = {"squeeze": squeeze}
