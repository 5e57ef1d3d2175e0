r"""Estimate how much padding length buckets save on a data set, and write their edges.

    python scripts/estimate_buckets.py buckets.yaml model=smollm2 data=reasoning \
        train.buckets=30 train.max_tokens=4096

SETTINGs are those of train.py; no method is needed. Without train.max_tokens, each step has
train.batch_size examples. The default of train.buckets is 30 here.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from omegaconf import OmegaConf

from petl.cli import app
from petl.cli.arguments import file_to_write
from petl.config.compose import compose
from petl.files.disk import write_atomic
from petl.planning.bucket_estimate import estimate


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=file_to_write, help="YAML to write")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="settings of train.py")
    arguments = parser.parse_args()
    app.log_to_stderr()
    return app.reported(lambda: write(arguments.file, arguments.settings))


def write(file: Path, settings: list[str]) -> None:
    """Estimate the padding, print it, and write the buckets to a file."""
    result = estimate(compose(settings))
    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create(result)))
    before, after = (f"{100 * result['padding'][key]:.1f} %" for key in ("before", "after"))
    steps = result["steps"]
    print(
        f"padding {before} in {steps['before']} steps; with {len(result['buckets'])} buckets",
        end=" ",
    )
    print(f"{after} in {steps['after']} steps; {file}")


if __name__ == "__main__":
    sys.exit(main())
