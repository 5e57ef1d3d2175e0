"""Benchmark the methods: time, memory, kernel launches, files, relative to a lower bound.

    python scripts/bench.py                                  # the main sections, six layers
    python scripts/bench.py --sections step,dist --methods mola,mos --shape minilm
    python scripts/bench.py --sections all
    python scripts/bench.py --model smollm2 --shape ""       # a model of configs/model
    python scripts/bench.py --check bench.json           # exit status 1 if a value has grown
    python scripts/bench.py --import mypackage.mymethod --methods mymethod
    python scripts/bench.py --read bench.json --page docs/performance/*.md

The lower bound is the step of the frozen backbone, without any adapter. Times are processor time of
one thread, alternating between lower bound and methods; nothing is downloaded. On a GPU (--device
cuda) they are times of the device, in bfloat16, with absolute values in addition. A method without
a dense reference in scripts/bench/reference.py is measured unchecked.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from bench.contenders import IMPORTS, import_methods
from bench.isolated import quieten
from bench.page import filled
from bench.records import MARGIN, Result, regressions
from bench.report import circumstances, remarks, tables
from bench.run import SECTIONS, USUAL, Settings, run

from petl.cli.arguments import COUNT, file_to_read, file_to_write, number
from petl.training import program as app


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    status = 0

    def work() -> None:
        nonlocal status
        earlier = Result.read(arguments.check) if arguments.check else None
        result = join(arguments.read) if arguments.read else measure(arguments)
        status = show(result, arguments, earlier)

    return app.reported(work) or status


def measure(arguments: argparse.Namespace) -> Result:
    """Measure what the arguments select, and write the result."""
    quieten()
    if arguments.imports:
        os.environ[IMPORTS] = ",".join(arguments.imports)
        import_methods()
    sections = SECTIONS if arguments.sections == "all" else words(arguments.sections)
    return run(
        Settings(
            suite=arguments.suite,
            sections=sections,
            shapes=words(arguments.shape),
            models=arguments.model,
            rows=words(arguments.methods),
            rounds=arguments.rounds,
            device=arguments.device,
            threads=arguments.threads,
        ),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
        save=lambda result: result.write(arguments.out),  # after each section: later ones may fail
    )


def join(files: Sequence[Path]) -> Result:
    """Join results of several runs, with the environment of the first.

    A row that several files contain is taken from the first of them.
    """
    results = [Result.read(file) for file in files]
    started = ", ".join(dict.fromkeys(result.environment["started"] for result in results))
    records = {r.key: r for result in reversed(results) for r in result.records}
    order = dict.fromkeys(r.key for result in results for r in result.records)
    environment = {**results[0].environment, "started": started}
    return Result(environment, [records[key] for key in order])


def words(text: str) -> list[str]:
    """Split at commas."""
    return [word for word in text.split(",") if word]


def show(result: Result, arguments: argparse.Namespace, earlier: Result | None) -> int:
    """Print a result and fill pages; return 1 if it is worse than an earlier one, or has errors."""
    print(circumstances(result.environment))
    for title, table in tables(result).items():
        table.print(title)
        print()
    for remark in remarks(result):
        print(remark)
    if not arguments.read:
        print(f"written: {arguments.out}")
    for page in arguments.page:
        page.write_text(filled(page.read_text(), result))
    worse = [] if earlier is None else regressions(earlier, result, arguments.margin)
    for sentence in worse:
        print(f"worse: {sentence}")
    return int(bool(worse) or any(r.failed and r.is_own for r in result.records))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command_line.add_argument
    add("--suite", choices=("quick", "full"), default="quick", help="models of 6 or 30 layers")
    sections = f"{', '.join(SECTIONS)}; or all"
    add("--sections", default=",".join(USUAL), metavar="A,B", help=sections)
    add("--shape", default="llama,minilm", metavar="A,B")
    add(
        "--model",
        action="append",
        default=[],
        metavar="'NAME WORDS'",
        help="a model of configs/model",
    )
    add("--methods", default="", metavar="A,B", help="methods or rows; PEFT's LoRA is always added")
    add("--import", dest="imports", action="append", metavar="MODULE", help="registers a method")
    add("--rounds", type=COUNT, default=5, metavar="N", help="timed rounds of a step")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=COUNT, default=1, metavar="N", help="of the processor (1)")
    add("--out", type=file_to_write, default="bench.json", metavar="FILE", help="result to write")
    add(
        "--read",
        type=file_to_read,
        action="append",
        metavar="FILE",
        help="print this result, do not measure",
    )
    add(
        "--page",
        type=file_to_read,
        nargs="+",
        default=[],
        metavar="FILE",
        help="update their tables",
    )
    add("--check", type=file_to_read, metavar="OLD", help="compare with an earlier result")
    add("--margin", type=number(float, 0), default=MARGIN, help=f"allowed growth ({MARGIN})")
    return command_line


if __name__ == "__main__":
    sys.exit(main())
