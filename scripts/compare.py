r"""Train methods side by side and write one page about it.

    python scripts/compare.py runs/nine --methods lora,mola,mos --seeds 0,1,2 \
        --rates 3e-4,1e-3,3e-3 train.budget=340000

Each rate is tried on held-out train rows, the best is trained anew for each seed and scored on the
test rows. A stopped study goes on with the same command. Further words are settings, as after
train.py; --method "binary method.inner=lora" adds a method with settings of its own.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from petl.cli import app
from petl.reports.comparison import compare
from petl.reports.comparison_report import write_page
from petl.sweeps.study import Contender, Study


def main() -> int:
    arguments = parser().parse_intermixed_args()
    app.log_to_stderr()
    words = [*filter(None, arguments.methods.split(",")), *arguments.method]
    study = Study(
        folder=arguments.folder,
        contenders=[Contender(word) for word in words],
        seeds=[int(seed) for seed in arguments.seeds.split(",")],
        rates=[float(rate) for rate in filter(None, arguments.rates.split(","))],
        overrides=arguments.settings,
        jobs=arguments.jobs,
    )
    status = app.reported(study.run)
    made = arguments.folder / "runs"
    if status == 0 or any(made.rglob("scores.json")):
        page = app.reported(lambda: write_page(compare([made]), study.folder, study.tried))
        status = status or page
    return status


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("folder", type=Path, help="of the study; a stopped one goes on")
    whole.add_argument("--methods", default="", metavar="A,B", help="names of methods")
    whole.add_argument(
        "--method", action="append", default=[], metavar="WORDS", help="a name and its settings"
    )
    whole.add_argument("--seeds", default="0,1,2", metavar="S,S", help="default: 0,1,2")
    whole.add_argument(
        "--rates", default="", metavar="R,R", help="of train.lr; default: what suits each method"
    )
    whole.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    whole.add_argument("settings", nargs="*", metavar="SETTING", help="of every run")
    return whole


if __name__ == "__main__":
    sys.exit(main())
