"""Several runs of `petl train` in one process, whose adapters train in one pass over one base.

Started by `petl study --together N`, which writes on standard input what the runs are.
"""

import inspect
import json
import sys
from functools import partial
from pathlib import Path

from petl.cli.train import train
from petl.experiments.sweeps.study import Runs
from petl.system.settings.command_line import read_words, search_users_dirs
from petl.training import program as app
from petl.training.compose import compose
from petl.training.together.runs import RunJob, train_runs


def main() -> None:
    """Make the runs that standard input describes, each with a log of its own."""
    read_words(sys.argv[1:])
    given: Runs = json.load(sys.stdin)
    app.log_to_stderr()
    search_users_dirs()
    # without what reports errors, which a job does itself
    start = inspect.unwrap(train)
    jobs = [
        RunJob(run["overrides"], partial(compose, run["overrides"]), Path(run["log"]), start)
        for run in given["runs"]
    ]
    train_runs(jobs, given["together"])


if __name__ == "__main__":
    main()
