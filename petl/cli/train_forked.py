"""Runs of `petl train`, each in a process that is forked from this one; started by `petl study`.

Standard input has a line of JSON for each run: the words after `petl train`, and the file of its
log. When the run has ended, its exit status is written as a line.
"""

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TypedDict

from petl.cli.main import main as petl
from petl.system.files.disk import append_to
from petl.system.imports.collector import freeze_until_exit, rare_collections
from petl.training import program as app

# what a run imports, but for the class of its model
IMPORTED = ("petl.cli.train", "petl.cli.start", "matplotlib.figure")
ENDING = (signal.SIGTERM,)


class AskedRun(TypedDict):
    """A line of standard input."""

    words: list[str]
    log: str


def main() -> None:
    """Make the runs that standard input asks for, until it is closed."""
    # a run ends by Ctrl-C as a process of its own; this one waits for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = 0

    def end(number: int, frame: FrameType | None) -> None:
        if child:
            os.kill(child, number)
        else:
            sys.exit(app.SIGNALLED + number)

    signal.signal(signal.SIGTERM, end)
    with rare_collections():
        for name in IMPORTED:
            import_module(name)
    freeze_until_exit()  # a collection would copy the pages of all that is imported
    for line in sys.stdin:
        # one that comes meanwhile waits until both processes know what to do with it
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        child = os.fork()
        if not child:
            sys.exit(made(json.loads(line)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        _, status = os.waitpid(child, 0)
        child = 0
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def made(run: AskedRun) -> int:
    """Make a run in this process as the command `petl train`; return its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with append_to(Path(run["log"])) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # as of `python -m petl`, for messages with the command
    sys.argv = [str(Path(__file__).parents[1] / "__main__.py"), "train", *run["words"]]
    return petl(sys.argv[1:])


if __name__ == "__main__":
    main()
