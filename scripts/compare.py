r"""Train several methods and write a page that compares them.

    python scripts/compare.py runs/nine --methods lora,mola,mos --seeds 0,1,2 \
        --rates 3e-4,1e-3,3e-3 train.budget=340000

Each learning rate is scored on validation examples; with the best one, each method is trained again
for each seed and scored on the test set. The same command resumes a stopped study. SETTINGs are
those of train.py, for every run; --method "binary method.inner=lora" adds a method with settings of
its own.
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from petl.cli import app
from petl.cli.arguments import POSITIVE, SEED, each, folder_to_write, number
from petl.reports.comparison import compare
from petl.reports.comparison_report import write_page
from petl.sweeps.study import Contender, Study

JOBS = number(int, 1, 8 * (os.cpu_count() or 1))


def main() -> int:
    """Run the command; return its exit status."""
    command_line = parser()
    arguments = command_line.parse_intermixed_args()
    words = [word for word in (*arguments.methods.split(","), *arguments.method) if word.strip()]
    if not words:
        command_line.error("no method is given: use --methods A,B or --method WORDS")
    app.log_to_stderr()
    study = Study(
        folder=arguments.folder,
        contenders=[Contender(word) for word in words],
        seeds=arguments.seeds,
        rates=arguments.rates,
        overrides=arguments.settings,
        jobs=arguments.jobs,
    )
    status = app.reported(study.run)
    runs = arguments.folder / "runs"
    if status == 0 or any(runs.rglob("scores.json")):
        page = app.reported(lambda: write_page(compare([runs]), study.folder, study.tried))
        status = status or page
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_argument(
        "folder", type=folder_to_write, help="folder of the study, new or to be resumed"
    )
    command_line.add_argument("--methods", default="", metavar="A,B", help="names of methods")
    command_line.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="WORDS",
        help="a method with settings of its own",
    )
    command_line.add_argument(
        "--seeds", type=each(SEED), default="0,1,2", metavar="S,S", help="default: 0,1,2"
    )
    command_line.add_argument(
        "--rates",
        type=each(POSITIVE),
        default=[],
        metavar="R,R",
        help="learning rates (default: that of each method)",
    )
    command_line.add_argument(
        "--jobs", type=JOBS, default=1, metavar="N", help="number of runs at a time"
    )
    command_line.add_argument(
        "settings", nargs="*", metavar="SETTING", help="settings of train.py for every run"
    )
    return command_line


if __name__ == "__main__":
    sys.exit(main())
