"""Several runs of `petl train` in one process, whose adapters train in one pass over one base.

Started by `petl study --together N`, which writes on standard input what the runs are.
"""

import json
import sys
import traceback
from functools import partial
from pathlib import Path

from petl.cli.train import train
from petl.experiments.sweeps.launched_jobs import open_text
from petl.experiments.sweeps.study import Runs
from petl.system.settings.command_line import config_dir_words, read_words, search_users_dirs
from petl.training import program as app
from petl.training.compose import compose
from petl.training.together.engine import run_in_lanes


def main() -> None:
    """Make the runs that standard input describes, each with a log of its own."""
    read_words(sys.argv[1:])
    runs: Runs = json.load(sys.stdin)
    app.log_to_stderr()
    search_users_dirs()
    jobs = [partial(make, run["overrides"], run["log"]) for run in runs["runs"]]
    run_in_lanes(runs["together"], jobs)


def make(overrides: list[str], log: str) -> None:
    """Make one run, whose output goes to a file; an error ends it, and not the other runs."""
    with open_text(Path(log)) as opened:
        sys.stdout = sys.stderr = opened
        # of `petl train`, as `petl.cli.train.main` leaves them: a run records its command
        sys.argv[:] = ["petl", *config_dir_words(), *overrides]
        try:
            app.reported(lambda: train(compose(overrides)))
        except Exception:  # a bug: its traceback, as a run of its own prints it
            traceback.print_exc(file=opened)


if __name__ == "__main__":
    main()
