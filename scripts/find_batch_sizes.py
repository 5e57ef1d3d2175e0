r"""Find the largest batch size for each length bucket, and write a file for train.batch_sizes.

    python scripts/find_batch_sizes.py +method=mola model=minilm train.buckets=10
    WORLD_SIZE=8 python scripts/find_batch_sizes.py +method=lora model=smollm2 --memory 80GB

SETTINGs are those of train.py; the default of train.buckets is 30 here. On a GPU, batch sizes are
found by trial steps, limited to 90 % of its memory. With --memory, or without a GPU, they are
estimated from tensor shapes, for 90 % of that memory, or of the free memory. Batch sizes are
global; the number of processes is WORLD_SIZE.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from omegaconf import OmegaConf

from petl.cli import app
from petl.cli.arguments import file_to_write
from petl.config.compose import compose
from petl.files.disk import write_atomic
from petl.planning.batch_sizes import bytes_of, find


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="settings of train.py")
    parser.add_argument("--memory", metavar="8GB", help="memory of the device of each process")
    parser.add_argument(
        "--output",
        type=file_to_write,
        default="batch_sizes.yaml",
        help="YAML to write (%(default)s)",
    )
    arguments = parser.parse_intermixed_args()
    app.log_to_stderr()
    return app.reported(lambda: write(arguments.output, arguments.settings, arguments.memory))


def write(file: Path, settings: list[str], memory: str | None) -> None:
    """Find the batch sizes of a run, print them, and write them to a file."""
    result = find(compose(settings), None if memory is None else bytes_of(memory))
    others = [word for word in settings if not word.startswith("train.buckets=")]
    line = shlex.join(["python", "train.py", *others, f"train.batch_sizes={file}"])
    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create({**result, "command": line})))
    print(f"{'tokens':>8} {'examples':>9} {'batch size':>11} {'tokens per step':>16}")
    for bucket in result["buckets"]:
        print(
            f"{bucket['longest']:>8,} {bucket['rows']:>9,} {bucket['batch_size']:>11,} "
            f"{bucket['tokens']:>16,}"
        )
    print(f"{result['steps']:,} steps per epoch, {result['measured']}; {file}")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
