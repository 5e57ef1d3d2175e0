"""Measure what each method costs, and print it as ratios to what it must cost.

    python scripts/bench.py                                  # what matters most, six layers
    python scripts/bench.py --sections step,dist --methods mola,mos --shape minilm
    python scripts/bench.py --sections all --peers ENV/bin/python  # ENV has the adapters package
    python scripts/bench.py --model smollm2 --shape ""       # a model of configs/model
    python scripts/bench.py --check bench.json               # exit status 1 if a ratio has grown
    python scripts/bench.py --read bench.json --page docs/performance.md  # fill its tables in

Times are processor time of one thread, floor and candidate by turns; nothing is downloaded. On a
GPU (--device cuda) times are the device's own, in bfloat16, with absolute figures beside them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from bench.apart import quieten
from bench.page import filled
from bench.records import MARGIN, Result, regressions
from bench.report import circumstances, remarks, tables
from bench.run import SECTIONS, USUAL, Settings, run

from petl.cli import app
from petl.reports.formatting import print_table


def main() -> int:
    arguments = parser().parse_args()
    status = 0

    def work() -> None:
        nonlocal status
        earlier = Result.read(arguments.check) if arguments.check else None
        found = joined(arguments.read) if arguments.read else measure(arguments)
        status = show(found, arguments, earlier)

    return app.reported(work) or status


def measure(arguments: argparse.Namespace) -> Result:
    """Measure what the arguments ask for, and write it."""
    quieten()
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
            peers=arguments.peers,
        ),
        told=lambda line: print(line, file=sys.stderr, flush=True),
        found=lambda result: result.write(arguments.out),  # whatever comes after
    )


def joined(files: Sequence[Path]) -> Result:
    """Results of several runs as one, in the circumstances of the first.

    What two of them measured is that of the earlier file.
    """
    results = [Result.read(file) for file in files]
    started = ", ".join(dict.fromkeys(result.environment["started"] for result in results))
    records = {r.key: r for result in reversed(results) for r in result.records}
    order = dict.fromkeys(r.key for result in results for r in result.records)
    environment = {**results[0].environment, "started": started}
    return Result(environment, [records[key] for key in order])


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def show(found: Result, arguments: argparse.Namespace, earlier: Result | None) -> int:
    """Print a result, and write its pages; 1 if it is worse than an earlier one, or wrong."""
    print(circumstances(found.environment))
    for title, table in tables(found).items():
        first, *others = table.columns
        print_table([first, *(f">{name}" for name in others)], table.rows, title=title)
        print()
    for remark in remarks(found):
        print(remark)
    if not arguments.read:
        print(f"written: {arguments.out}")
    for page in arguments.page:
        page.write_text(filled(page.read_text(), found))
    worse = [] if earlier is None else regressions(earlier, found, arguments.margin)
    for sentence in worse:
        print(f"worse: {sentence}")
    return int(bool(worse) or any(r.failed and r.is_own for r in found.records))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = whole.add_argument
    add("--suite", choices=("quick", "full"), default="quick", help="6 layers, or 30")
    add("--sections", default=",".join(USUAL), metavar="A,B", help=f"of {', '.join(SECTIONS)}; all")
    add("--shape", default="llama,minilm", metavar="A,B")
    add("--model", action="append", default=[], metavar="'NAME WORDS'", help="of configs/model")
    add("--methods", default="", metavar="A,B", help="methods or rows; PEFT's LoRA too")
    add("--rounds", type=int, default=5, metavar="N", help="timed rounds of a step")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, metavar="N")
    add("--peers", default="", metavar="PYTHON", help="of an environment with `adapters`")
    add("--out", type=Path, default=Path("bench.json"), metavar="FILE")
    add("--read", type=Path, action="append", metavar="FILE", help="print what is there already")
    add("--page", type=Path, action="append", default=[], metavar="FILE", help="fill its tables in")
    add("--check", type=Path, metavar="OLD", help="an earlier result")
    add("--margin", type=float, default=MARGIN, help=f"growth that is let pass ({MARGIN})")
    return whole


if __name__ == "__main__":
    sys.exit(main())
