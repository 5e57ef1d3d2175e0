"""The command that started a run or a sweep, and the one that resumes it.

A sweep is `petl train -m ...`: several runs, one after the other. Nothing here imports torch.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

# settings that may be templates, with a brace that Hydra would take for the begin of a dictionary
TEMPLATE = re.compile(
    r"(?P<key>\+*data\.(?:text|text_pair|target|prompt|answer|system))=(?!['\"\[])(?P<value>.*\{.*)",
    re.DOTALL,
)
OPTUNA = "hydra_plugins.hydra_optuna_sweeper"  # prefix of the sweeper's module


def command(**settings: object) -> str:
    """Return the shell command of this run, with `train.<name>=<value>` for each of `settings`."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else sys.argv[1:]
    # earlier values of the same settings are replaced
    keys = tuple(f"train.{name}=" for name in settings)
    kept = [word for word in words if not word.lstrip("+").startswith(keys)]
    folder = config_dir_option(sys.argv[1:])
    if HydraConfig.initialized() and folder is not None:  # an option, and no override
        kept = ["--config-dir", folder, *kept]
    return in_shell([*kept, *(f"train.{name}={value}" for name, value in settings.items())])


def with_quoted_templates(words: Sequence[str]) -> list[str]:
    """The words of a command line, with quotes around templates such as data.prompt={question}."""

    def quoted(word: str) -> str:
        found = TEMPLATE.fullmatch(word)
        if found is None or "${" in word:  # an interpolation, which Hydra reads as it is
            return word
        escaped = found["value"].replace('"', '\\"')
        return f'{found["key"]}="{escaped}"'

    return [quoted(word) for word in words]


def config_dir_option(words: Sequence[str]) -> str | None:
    """The value of `--config-dir` in the words after `petl train`; None without it."""
    found = None
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, _, value = word.partition("=")
        if option in ("--config-dir", "-cd"):
            found = value or following
    return found


def in_shell(words: list[str]) -> str:
    """Return the shell command that starts `petl train`, as it was started here, with `words`.

    In a checkout that is `python train.py`; under torchrun or `python -m`, `-m petl train`. In any
    other program, such as a worker of a cluster, it is `petl train`, which does the same.
    """
    script, launched = sys.argv[0], launcher()
    if Path(script).name == "train.py":
        return shlex.join([*launched, script, *words])
    if launched == ["python"] and Path(script).parts[-2:] != ("petl", "__main__.py"):
        return shlex.join(["petl", "train", *words])
    return shlex.join([*launched, "-m", "petl", "train", *words])


def launcher() -> list[str]:
    """Return the command before the script or module: python, or torchrun as in this process."""
    workers, machines = (
        os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    )
    if machines != "1":  # the user runs the same command on each machine
        endpoint = f"{os.environ['MASTER_ADDR']}:29500"
        rendezvous = ["--nnodes", machines, "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
        return ["torchrun", *rendezvous, "--nproc_per_node", workers]
    return ["torchrun", "--nproc_per_node", workers] if workers != "1" else ["python"]


def in_sweep() -> bool:
    """Return True if this run is one of several that one command makes."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_optuna() -> bool:
    """Return True if Optuna chooses the settings of this sweep's runs."""
    return HydraConfig.get().sweeper._target_.startswith(OPTUNA)


def how_to_resume(checkpoint: object = None) -> str:
    """Return the end of a message: how to resume this run, or the sweep that it belongs to.

    Args:
        checkpoint: the run's last one; None if the run may have left none.
    """
    if in_sweep():
        return how_to_resume_sweep()
    if checkpoint is None:
        return "train.resume=auto resumes from the last checkpoint, if there is one"
    return f"to resume: {command(resume=checkpoint)}"


def how_to_resume_sweep() -> str:
    """Return the command that resumes this sweep, and what it does with the present runs."""
    words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
    searching = any(word.lstrip("+").startswith("search=") for word in words)
    if not searching and "train.resume=auto" not in words:
        words.append("train.resume=auto")  # the files of configs/search set it themselves
    if is_optuna():
        trials = HydraConfig.get().sweeper.n_trials
        note = f"it adds {trials} trials, or hydra.sweeper.n_trials=N, to the earlier ones"
    else:
        note = "finished runs are skipped"
    return f"to resume the sweep: {in_shell(words)}\n({note})"
