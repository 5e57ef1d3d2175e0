"""What stands between a command line and a run: bad input becomes one message and a status.

`main` of train.py runs under `entry`; other commands compose with `compose` and report with
`reported`. Nothing here imports torch.
"""

import dataclasses
import errno
import functools
import logging
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from petl.command_line import in_sweep, to_go_on
from petl.deaths import deaths_told, end_with_launcher
from petl.errors import InputError, PassedOver, RunStopped, near
from petl.lock import release_all
from petl.speaking import begin_job, is_first, may_speak, may_tell_error

BAD_INPUT = 2  # exit status, as of argparse
SIGNALLED = 128  # plus the signal's number: exit status, as of shells
CONFIG = "train"
WANDB_SWEEPS = "sweep"  # a folder of configurations that W&B reads, not Hydra
HYDRAS = (HydraException, OmegaConfBaseException)
# warnings of libraries about one another, in which a reader can mend nothing
NOISE = (
    ".*is_gradient_checkpointing",  # old names, and transformers 5.2 has no others
    ".*`gradient_checkpointing_(en|dis)able` is deprecated",
    "Unsupported layer type '.*LayerNorm'",  # PEFT's copy of a norm, for PEFT's own ln_tuning
    ".*all_gather_into_tensor` is deprecated",  # DeepSpeed calls it
    "Sparse invariant checks are implicitly disabled",  # PEFT's shira
)
DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


def config_dir() -> Path:
    """The folder of configurations: beside the package in a checkout, in it when installed."""
    package = Path(__file__).parent
    return next(d for d in (package / "configs", package.parent / "configs") if d.is_dir())


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration that `train.py` has with these overrides.

    Raises:
        InputError: Hydra cannot compose it.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra_compose(CONFIG, list(overrides))
    except HYDRAS as error:
        raise InputError(explain(error, overrides)) from error


def preset_of(name: str) -> dict[str, Any]:
    """What the YAML of a method or loss sets, its name included; nothing if there is no file."""
    files = (config_dir() / group / f"{name}.yaml" for group in ("method", "loss"))
    file = next((file for file in files if file.is_file()), None)
    settings: Any = {} if file is None else OmegaConf.to_container(OmegaConf.load(file))
    return settings


# Reporting


class Passing(BaseException):
    """Carries an error past Hydra, which would print lines of its own before ours."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def report(message: str) -> None:
    """One message on standard error, from one process."""
    if may_speak():
        sys.stderr.write(f"{message}\n")


def tell_error(what: object) -> None:
    """The same of an error, from the first process that has it."""
    if may_tell_error():
        sys.stderr.write(f"error: {what}\n")


def reported(function: Callable[[], Any]) -> int:
    """Run `function`; the exit status, after one message for whatever is no bug of ours."""
    try:
        function()
    except Passing as passing:
        return report_error(passing.error)
    except (InputError, RunStopped, *HYDRAS) as error:
        return report_error(error)
    except OSError as error:
        if error.errno not in DISK:
            raise
        tell_error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        report(f"interrupted; {to_go_on()}")
        return SIGNALLED + signal.SIGINT
    return 0


def report_error(error: Exception) -> int:
    """Say what stopped a run; the exit status for it."""
    if isinstance(error, RunStopped):
        report(str(error))
        return error.status
    tell_error(explain(error) if isinstance(error, HYDRAS) else error)
    return BAD_INPUT


class StandardError(logging.StreamHandler):
    """Writes to what standard error is at that moment: a progress bar takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr() -> None:
    """Show petl's log, messages alone, from the main process."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    handler = StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("petl")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_first() else logging.ERROR)


# The entry of train.py

closing: list[Callable[[], None]] = []  # what is left to say after the last run of a sweep


def entry(main: Callable[[], Any]) -> NoReturn:
    """Run a `hydra.main` function as the program, and exit."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        from petl.help import text

        sys.stdout.write(text())
        sys.exit(0)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come through to `reported`
    log_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    end_with_launcher()
    with tempfile.TemporaryDirectory() as elsewhere:
        if not is_first():  # one record of a sweep is enough
            sys.argv.append(f"hydra.sweep.dir={elsewhere}")
        status = reported(main)
        if status < SIGNALLED:
            for tell in closing:
                tell()
    if status == 0:
        leave_group()
    else:  # all has been said: a launcher that now ends the others need not end this one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(status)


def job(main: Callable[[DictConfig], float]) -> Callable[[DictConfig], float]:
    """What `hydra.main` runs: `main`, with what stops it on the way to `reported`.

    In a sweep the error is reported and left to Hydra, which runs the other jobs before it raises
    it again. Only a signal ends the sweep at once. With `train.resume=auto` a sweep passes over
    jobs that are finished or another worker's. A job that is over leaves its folder to whoever
    wants it.
    """

    @functools.wraps(main)
    def passing(cfg: DictConfig) -> float:
        begin_job()
        try:
            with deaths_told():
                return main(cfg)
        except PassedOver as known:
            logging.getLogger("petl").info("%s", known)
            return known.objective
        except (InputError, RunStopped) as error:
            is_signal = isinstance(error, RunStopped) and error.status > SIGNALLED
            if is_signal or not in_sweep():
                raise Passing(error) from error
            report_error(error)
            raise
        finally:
            release_all()

    return passing


def leave_group() -> None:
    """Take leave of the other processes, if there are any."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _terminate(number: int, frame: object) -> NoReturn:
    report(f"terminated; {to_go_on()}")
    sys.exit(SIGNALLED + number)


# Hydra's errors in one sentence


def explain(error: Exception, overrides: Sequence[str] | None = None) -> str:
    """What was wrong on the command line and what is allowed instead."""
    overrides = sys.argv[1:] if overrides is None else overrides
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__  # ty: ignore[invalid-assignment]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        what = group or "configuration"
        if (group, name) == ("hydra/sweeper", "optuna"):
            return "Optuna is not installed; run: pip install -e '.[sweep]'"
        for other in sorted(groups() - {group}):
            if name in options_of(other):
                return f"no {what} {name!r}; there is {plus(other)}{other}={name}"
        return f"no {what} {name!r}{near(name, error.options or options_of(group))}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override!r} has no value: write {error.override}=VALUE"
        return f"{error.override!r} cannot be read; put values with special characters in quotes"
    twice = re.match(r"(?P<group>\w+) appears more than once", str(error))
    if twice:
        return (
            f"{twice['group']} is chosen twice; a recipe such as +method=deft chooses one itself, "
            f"and {twice['group']}.FIELD=VALUE sets its fields"
        )
    unknown = re.match(r"Could not override '(?P<key>[^']+)'", str(error))
    if unknown and isinstance(error, ConfigCompositionException):
        return explain_key(unknown["key"], overrides)
    return " ".join(str(error).split())


def options_of(group: str) -> list[str]:
    """The configurations in a group such as "method"."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def raw(group: str, name: str) -> DictConfig:
    """What the YAML of a configuration says, with nothing composed."""
    loaded = OmegaConf.load(config_dir() / group / f"{name}.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def groups() -> set[str]:
    """The groups of configurations: what a setting such as `model=` chooses from."""
    return {path.name for path in config_dir().iterdir() if path.is_dir()} - {WANDB_SWEEPS}


def plus(group: str) -> str:
    """What stands before the name of a group: a plus, unless a run has one of it anyway."""
    return "+" if group in ("method", "loss", "search", "launch") else ""


def explain_key(key: str, overrides: Sequence[str]) -> str:
    """Why a setting cannot be overridden."""
    if key == "method":
        return "the method is added with a plus: write +method=NAME instead of method=NAME"
    group, _, name = key.rpartition(".")
    try:
        composed = compose(choices(overrides))
        if group == "method" and "method" in composed:
            return explain_field(key, composed.method, overrides)
    except InputError as error:  # the choice of a group is wrong as well: that comes first
        return str(error)
    if group == "method":
        return f"{key} needs a method: add +method=NAME"
    node = OmegaConf.select(composed, group) if group else composed
    if not isinstance(node, DictConfig):
        return f"no setting {key}{near(group, [*map(str, composed), *groups()])}"
    elsewhere = [f"{group}={other}" for other in options_of(group) if name in raw(group, other)]
    if elsewhere:
        return f"no setting {key} here; it belongs to {', '.join(elsewhere)}"
    return f"no setting {key}{near(name, [str(entry) for entry in node])}"


def explain_field(key: str, settings: DictConfig, overrides: Sequence[str]) -> str:
    """Why `key` of a method cannot be overridden; `settings` are those of its YAML."""
    import petl

    chosen = {key.lstrip("+"): value for key, value in pairs(overrides)}
    given = {str(k): chosen.get(f"method.{k}", value) for k, value in settings.items()}
    entry = petl.method(given["name"]).given(given)
    name = key.rpartition(".")[2]
    if name in {field.name for field in dataclasses.fields(entry.config_cls)}:
        return f"{key} is not in configs/method/{entry.name}.yaml: write +{key}=..."
    return f"no setting {key}{near(name, [*given, *preset_of(entry.inner)])}"


def choices(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a configuration from a group; of a sweep, the first."""
    known = groups()
    return [f"{key}={value}" for key, value in pairs(overrides) if key.lstrip("+") in known]


def pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Key and value of each override; of a sweep, the first value."""
    words = [word.partition("=") for word in overrides]
    return [(key, value.split(",")[0]) for key, _, value in words]
