"""Section `start-up`: processor seconds of commands, in total and beyond `import torch`.

The latter is negative for a command that does not import torch.
"""

import resource
import subprocess
import sys

from bench.clocks import Spread
from bench.records import Record

ROUNDS = 5
TORCH = ("-c", "import torch")
COMMANDS = {
    "import petl": ("-c", "import torch; import petl"),
    "import peft": ("-c", "import torch; import peft"),
    "import petl, then peft": ("-c", "import torch; import petl; import peft"),
    "petl methods": ("-m", "petl", "methods"),
    "petl show": ("-m", "petl", "show", "mola"),
    "petl train, misspelt": ("-m", "petl", "train", "+method=moal"),
    "petl plan": ("-m", "petl", "plan", "+method=mola"),
}


def measure() -> list[Record]:
    """Return a record for each command."""
    return [_record(name, words) for name, words in COMMANDS.items()]


def _record(name: str, words: tuple[str, ...]) -> Record:
    ratios, seconds, beyond = [], [], []
    for _ in range(ROUNDS):
        status = 2 if "misspelt" in name else 0
        torch_alone, total = child_seconds(TORCH), child_seconds(words, status)
        ratios.append(total / torch_alone)
        seconds.append(total)
        beyond.append(total - torch_alone)
    return Record(
        "start-up",
        "processor seconds",
        name,
        ratios={"over import torch": Spread.of(ratios)},
        facts={
            "s": Spread.of(seconds).median,
            "s beyond import torch": Spread.of(beyond).median,
        },
    )


def child_seconds(words: tuple[str, ...], status: int = 0) -> float:
    """Return the processor seconds of Python with these arguments.

    Raises:
        CalledProcessError: it ends with another status.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True)
    if done.returncode != status:
        raise subprocess.CalledProcessError(done.returncode, words, stderr=done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
