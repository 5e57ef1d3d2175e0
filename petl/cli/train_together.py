"""Several runs of `petl train` in one process, whose adapters train in one pass over one base.

Started by `petl study --together N`, which writes on standard input what the runs are.
"""

import json
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from petl.cli import app
from petl.cli.train import train
from petl.config.command_line import config_dir_words, search_users_dirs
from petl.config.compose import compose
from petl.distributed.processes import ASKS, release
from petl.files.disk import append_to
from petl.sweeps.study import Runs
from petl.training.together.engine import KINDS, LaneEngine, Passes
from petl.training.together.lanes import Lanes


def main() -> None:
    """Make the runs that standard input describes, each with a log of its own."""
    runs: Runs = json.load(sys.stdin)
    app.log_to_stderr()
    search_users_dirs()
    width = min(runs["together"], len(runs["runs"]))
    lanes = Lanes(width, Passes().perform, KINDS, LaneEngine)
    for number in ASKS:  # a run in a thread gets no signals
        signal.signal(number, lambda number, _: lanes.stop(number))
    lanes.run([partial(make, run["overrides"], run["folder"], run["log"]) for run in runs["runs"]])


def make(overrides: list[str], folder: str, log: str) -> None:
    """Make one run, whose output goes to a file; an error ends it, and not the other runs."""
    undecorated: Any = train
    with open_log(Path(log)) as opened:
        sys.stdout = sys.stderr = opened
        sys.argv[:] = ["petl", "train", *config_dir_words(), *overrides]
        try:
            # without `app.job`, which unlocks the folders of all runs of this process
            app.reported(lambda: undecorated.__wrapped__(compose(overrides)))
        except Exception:  # a bug: its traceback, as a run of its own prints it
            traceback.print_exc(file=opened)
        finally:
            release(Path(folder))


def open_log(file: Path) -> Any:
    """Open a file for the lines of a run, behind those that it has."""
    import io

    return io.TextIOWrapper(append_to(file), encoding="utf-8", line_buffering=True)


if __name__ == "__main__":
    main()
