r"""Say what length buckets would save on some data, and where they end.

    python scripts/estimate_buckets.py buckets.yaml model=smollm2 data=reasoning \
        train.buckets=30 train.max_tokens=4096

Settings are those of train.py; no method is needed. Without train.max_tokens a step has
train.batch_size rows; without train.buckets there are 30 of them.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from omegaconf import OmegaConf

from petl.cli import app
from petl.config.compose import compose
from petl.planning.bucket_estimate import estimate


def main() -> int:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("file", type=Path, help="YAML to write")
    whole.add_argument("settings", nargs="*", metavar="SETTING", help="as after train.py")
    arguments = whole.parse_args()
    app.log_to_stderr()
    return app.reported(lambda: write(arguments.file, arguments.settings))


def write(file: Path, settings: list[str]) -> None:
    found = estimate(compose(settings))
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(found)))
    before, after = (f"{100 * found['padding'][key]:.1f} %" for key in ("before", "after"))
    steps = found["steps"]
    print(
        f"padding {before} in {steps['before']} steps; with {len(found['buckets'])} buckets",
        end=" ",
    )
    print(f"{after} in {steps['after']} steps; {file}")


if __name__ == "__main__":
    sys.exit(main())
