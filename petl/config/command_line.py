"""The command that made a run or a sweep, and the one that goes on with it.

A sweep is `python train.py -m ...`: several runs, one after the other. Nothing here imports torch.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from itertools import zip_longest

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

OPTUNA = "hydra_plugins.hydra_optuna_sweeper"  # how the sweeper's module begins


def command(**settings: object) -> str:
    """The shell command of this run, with `train.<name>=<value>` for each of `settings`."""
    asked = HydraConfig.get().overrides.task if HydraConfig.initialized() else sys.argv[1:]
    keys = tuple(f"train.{name}=" for name in settings)
    kept = [word for word in asked if not word.lstrip("+").startswith(keys)]
    folder = config_dir_option(sys.argv[1:])
    if HydraConfig.initialized() and folder is not None:  # an option, and no override
        kept = ["--config-dir", folder, *kept]
    return in_shell([*kept, *(f"train.{name}={value}" for name, value in settings.items())])


def config_dir_option(words: Sequence[str]) -> str | None:
    """The value of `--config-dir` in the words of a command line of train.py; None without it."""
    found = None
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, _, value = word.partition("=")
        if option in ("--config-dir", "-cd"):
            found = value or following
    return found


def in_shell(words: list[str]) -> str:
    """The line that starts this program with these words behind it."""
    return shlex.join([*launcher(), sys.argv[0] or "train.py", *words])


def launcher() -> list[str]:
    """What starts this program again, as it was started here."""
    workers, machines = (
        os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    )
    if machines != "1":  # the same line on each of them
        endpoint = f"{os.environ['MASTER_ADDR']}:29500"
        meet = ["--nnodes", machines, "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
        return ["torchrun", *meet, "--nproc_per_node", workers]
    return ["torchrun", "--nproc_per_node", workers] if workers != "1" else ["python"]


def in_sweep() -> bool:
    """Whether this run is one of several that one command makes."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_optuna() -> bool:
    """Whether Optuna chooses what the runs of this sweep try."""
    return HydraConfig.get().sweeper._target_.startswith(OPTUNA)


def to_go_on(checkpoint: object = None) -> str:
    """How a run that stops goes on, or the sweep that it is one of, as the end of a sentence.

    `checkpoint` is the run's last one; without it, the run may have left none.
    """
    if in_sweep():
        return to_go_on_with_sweep()
    if checkpoint is None:
        return "train.resume=auto goes on from the last checkpoint, if there is one"
    return f"to go on: {command(resume=checkpoint)}"


def to_go_on_with_sweep() -> str:
    """The command that goes on with this sweep, and what it does with what is there."""
    words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
    searching = any(word.lstrip("+").startswith("search=") for word in words)
    if not searching and "train.resume=auto" not in words:
        words.append("train.resume=auto")  # which the files of configs/search set themselves
    if is_optuna():
        more = HydraConfig.get().sweeper.n_trials
        done = f"it makes {more} trials more, or hydra.sweeper.n_trials=N, and knows the earlier"
    else:
        done = "runs that are finished are passed over"
    return f"to go on with the sweep: {in_shell(words)}\n({done})"
