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
    "petl plan": ("-m", "petl", "plan", "+method=mola"),
}


def measure() -> list[Record]:
    """Return a record for each command."""
    return [_record(name, words) for name, words in COMMANDS.items()]


def _record(name: str, words: tuple[str, ...]) -> Record:
    ratios, seconds, beyond = [], [], []
    for _ in range(ROUNDS):
        torch_alone, total = child_seconds(TORCH), child_seconds(words)
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


def child_seconds(words: tuple[str, ...]) -> float:
    """Return the processor seconds of Python with these arguments.

    Raises:
        CalledProcessError: it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
