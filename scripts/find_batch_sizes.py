r"""Find how many rows of each length a step has room for, and write them for train.batch_sizes.

    python scripts/find_batch_sizes.py +method=mola model=minilm train.buckets=10
    WORLD_SIZE=8 python scripts/find_batch_sizes.py +method=lora model=smollm2 --memory 80GB

Settings are those of train.py; without train.buckets there are 30 buckets. On a GPU steps are
tried, with 0.9 of its memory. With --memory, or without a GPU, what they need is counted from
shapes against 0.9 of that, or of what is free. Steps are of all processes, WORLD_SIZE of them.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from omegaconf import OmegaConf

from petl.cli import app
from petl.config.compose import compose
from petl.errors import InputError
from petl.planning.batch_sizes import bytes_of, find


def main() -> int:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("settings", nargs="*", metavar="SETTING", help="as after train.py")
    whole.add_argument("--memory", metavar="8GB", help="of the device of a process")
    whole.add_argument(
        "--output", type=Path, default=Path("batch_sizes.yaml"), help="YAML to write (%(default)s)"
    )
    arguments = whole.parse_intermixed_args()
    app.log_to_stderr()
    return app.reported(lambda: write(arguments.output, arguments.settings, arguments.memory))


def write(file: Path, settings: list[str], memory: str | None) -> None:
    if not file.parent.is_dir():
        raise InputError(f"--output {file}: there is no folder {file.parent}")
    found = find(compose(settings), None if memory is None else bytes_of(memory))
    kept = [word for word in settings if not word.startswith("train.buckets=")]
    line = shlex.join(["python", "train.py", *kept, f"train.batch_sizes={file}"])
    file.write_text(OmegaConf.to_yaml(OmegaConf.create({**found, "command": line})))
    print(f"{'tokens':>8} {'rows':>8} {'rows of a step':>15} {'tokens of a step':>17}")
    for bucket in found["buckets"]:
        print(
            f"{bucket['longest']:>8,} {bucket['rows']:>8,} {bucket['batch_size']:>15,} "
            f"{bucket['tokens']:>17,}"
        )
    print(f"{found['steps']:,} steps in a pass over the rows, {found['measured']}; {file}")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
