"""Measure what each method costs, and print it as ratios to what it must cost.

    python scripts/bench.py                                  # all sections, six layers
    python scripts/bench.py --sections step,file --methods mola,mos
    python scripts/bench.py --check bench.json               # exit status 1 if a ratio has grown

Times are processor time of one thread, floor and candidate by turns; nothing is downloaded. On a
GPU (--device cuda) times are the device's own, in bfloat16, with absolute figures beside them.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from petl import app
from petl.bench.records import MARGIN, Result, regressions
from petl.bench.report import circumstances, markdown, remarks, tables
from petl.bench.run import SECTIONS, Settings, run
from petl.cli import print_table


def main() -> int:
    arguments = parser().parse_args()
    status = 0

    def measure() -> None:
        nonlocal status
        earlier = Result.read(arguments.check) if arguments.check else None
        found = run(
            Settings(
                suite=arguments.suite,
                sections=arguments.sections.split(","),
                shapes=arguments.shapes.split(","),
                rows=[word for word in arguments.methods.split(",") if word],
                rounds=arguments.rounds,
                device=arguments.device,
                threads=arguments.threads,
            ),
            told=lambda line: print(line, file=sys.stderr, flush=True),
        )
        status = show(found, arguments, earlier)

    return app.reported(measure) or status


def show(found: Result, arguments: argparse.Namespace, earlier: Result | None) -> int:
    """Print and write a result; 1 if it is worse than an earlier one, or a method is wrong."""
    print(circumstances(found.environment))
    for title, table in tables(found).items():
        first, *others = table.columns
        print_table([first, *(f">{name}" for name in others)], table.rows, title=title)
        print()
    for remark in remarks(found):
        print(remark)
    found.write(arguments.out)
    print(f"written: {arguments.out}")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(found))
    worse = [] if earlier is None else regressions(earlier, found, arguments.margin)
    for sentence in worse:
        print(f"worse: {sentence}")
    return int(bool(worse) or any(r.failed and r.is_own for r in found.records))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--suite", choices=("quick", "full"), default="quick")
    whole.add_argument("--sections", default=",".join(SECTIONS), metavar="A,B")
    whole.add_argument("--shapes", default="llama,minilm", metavar="A,B")
    whole.add_argument("--methods", default="", metavar="A,B", help="methods or rows; LoRA too")
    whole.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds of a step")
    whole.add_argument("--device", default="cpu", help="cpu or cuda")
    whole.add_argument("--threads", type=int, default=1, metavar="N")
    whole.add_argument("--out", type=Path, default=Path("bench.json"), metavar="FILE")
    whole.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    whole.add_argument("--check", type=Path, metavar="OLD", help="an earlier result")
    whole.add_argument(
        "--margin", type=float, default=MARGIN, help=f"growth that is let pass (default {MARGIN})"
    )
    return whole


if __name__ == "__main__":
    sys.exit(main())
