"""Run a command so that bad input ends it with one message and an exit status, not a traceback.

`petl train` runs under `entry`; other commands run under `reported`. Imports no torch.
"""

import errno
import functools
import logging
import math
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn, TypeVar

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from petl.errors import InputError, JobSkipped, RunStopped, printable, shortened
from petl.system.output import messages, until_closed
from petl.system.processes import (
    begin_job,
    end_with_launcher,
    explain_process_failures,
    is_first,
    release_all,
    should_report,
    should_report_error,
)
from petl.system.settings.command_line import (
    add_config_dir,
    how_to_resume,
    in_sweep,
    is_optuna,
    log_conflicts,
    search_users_dirs,
)
from petl.system.settings.run_file import hydra_words

Options = TypeVar("Options")  # of a command
BAD_INPUT = 2  # exit status, the same as argparse's
SIGNALLED = 128  # plus the number of the signal: exit status, the convention of shells
# warnings of libraries about each other, on which a user cannot act
NOISE = (
    ".*is_gradient_checkpointing",  # PEFT calls old names; transformers 5.2 has no others
    ".*`gradient_checkpointing_(en|dis)able` is deprecated",
    "Unsupported layer type '.*LayerNorm'",  # PEFT's copy of a norm, for PEFT's own ln_tuning
    ".*all_gather_into_tensor` is deprecated",  # DeepSpeed calls it
    "Sparse invariant checks are implicitly disabled",  # PEFT's shira
)
SWEEP_CALLBACK = (
    "petl.experiments.sweeps.hydra_callback.SweepSummaryCallback"  # see configs/train.yaml
)
# errors of the file system that a user can fix; any other OSError keeps its traceback
DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}


# Reporting


class WrappedError(BaseException):
    """Carries an error through Hydra, which would print lines of its own on an Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def report(message: str) -> None:
    """Print a message on standard error, from one process of the run."""
    if should_report():
        messages().write(f"{printable(message)}\n")


def print_error(error: object) -> None:
    """Print an error on standard error, from the first process that has it."""
    if should_report_error():
        messages().write(f"error: {printable(shortened(str(error)))}\n")


def reported(function: Callable[[], object]) -> int:
    """Run `function` and return the exit status.

    Errors of the input, of the disk and of Hydra, and signals, become one message, and the end of
    a pipe's reader none; any other exception is a bug and keeps its traceback.
    """
    return until_closed(lambda: _reported(function))


def _reported(function: Callable[[], object]) -> int:
    try:
        function()
    except WrappedError as passing:
        return report_error(passing.error)
    except (InputError, RunStopped) as error:
        return report_error(error)
    except KeyboardInterrupt:
        report(f"interrupted; {how_to_resume()}")
        return SIGNALLED + signal.SIGINT
    except Exception as error:
        if is_of_launcher(error):
            # what submitit says of a killed job; the lines that follow are the job's log
            reason = " ".join(str(error).split("\n")[:2])
            report(f"a job of the sweep ended without a result: {reason}")
            return 1
        from petl.training.compose import is_of_hydra  # where a command fails

        if not is_of_hydra(error) and not (isinstance(error, OSError) and error.errno in DISK):
            raise
        return report_error(error)
    return 0


def run_command(command: Callable[[Options], None], options: Options) -> int:
    """Run the function of a command of `petl` with its options; return its exit status."""
    log_to_stderr()
    # bars would mix with the output of petl; transformers asks for those of the hub when imported
    import_module("huggingface_hub.utils").disable_progress_bars()
    if "transformers" in sys.modules:
        import_module("transformers.utils.logging").disable_progress_bar()

    def run() -> None:
        if hasattr(options, "config_dir"):  # a command that reads configurations
            folder: str | None = vars(options)["config_dir"]
            if folder is not None:
                add_config_dir(folder)
            log_conflicts()
        try:  # here, because `reported` would print how to resume a training run
            command(options)
        except KeyboardInterrupt as error:
            raise RunStopped("interrupted", status=130) from error

    return reported(run)


def is_of_launcher(error: Exception) -> bool:
    """True if a launcher of Hydra raised the error, for example since a job was killed."""
    frames = traceback.walk_tb(error.__traceback__)
    names = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    last = next((n for n in reversed(names) if n.startswith(("hydra", "petl."))), "")
    return last.startswith("hydra_plugins.") and "launcher" in last


def report_error(error: Exception) -> int:
    """Print the error that stopped a run; return its exit status."""
    if isinstance(error, RunStopped):
        report(str(error))
        return error.status
    from petl.training.compose import explain, is_of_hydra  # as above

    print_error(explain(error) if is_of_hydra(error) else error)
    return BAD_INPUT


class StandardError(logging.StreamHandler):
    """Log to standard error as it is now: a progress bar replaces it while it is shown."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, control characters escaped."""
        return printable(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        self.stream = messages()
        super().emit(record)


def print_traceback(*error: Any) -> None:
    """Print the traceback of a bug: like `sys.excepthook`, control characters escaped."""
    messages().write(printable("".join(traceback.format_exception(*error))))


def log_to_stderr() -> None:
    """Show petl's log messages on standard error, those of the main process only."""
    sys.excepthook = print_traceback
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    handler = StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("petl")
    logger.handlers = [handler]
    logger.propagate = False  # Hydra configures the root logger, which would repeat each line
    logger.setLevel(logging.INFO if is_first() else logging.ERROR)


# The entry of petl train

OmegaConf.register_new_resolver(
    "sweep_callbacks",
    lambda mode: {"closing": {"_target_": SWEEP_CALLBACK}} if mode == RunMode.MULTIRUN else {},
    replace=True,
)
closing: list[Callable[[], None]] = []  # called after the last run of a sweep


def entry(main: Callable[[], object]) -> NoReturn:
    """Run a `hydra.main` function as the program, and exit."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them
    log_to_stderr()
    search_users_dirs()
    log_conflicts()
    signal.signal(signal.SIGTERM, _terminate)
    end_with_launcher()

    def program() -> object:
        sys.argv[1:] = hydra_words(sys.argv[1:])
        refuse_run_dir()
        return main()

    with tempfile.TemporaryDirectory() as unused:
        if not is_first():  # only the first process writes Hydra's record of a sweep
            sys.argv.append(f"hydra.sweep.dir={unused}")
        status = reported(program)  # of a sweep, after all of its runs
        if status < SIGNALLED:
            for callback in closing:
                callback()
    if status == 0:
        destroy_process_group()
    else:  # the error is printed: a launcher that now terminates all processes need not add to it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(status)


def refuse_run_dir() -> None:
    """Raise InputError if the command sets hydra.run.dir, which would be an empty folder."""
    for word in sys.argv[1:]:
        if word.lstrip("+").startswith("hydra.run.dir="):
            raise InputError(
                f"{word} has no effect on a run: set train.run=FOLDER, or train.output=FOLDER for "
                "the folder of all runs"
            )


def job(main: Callable[[DictConfig], object]) -> Callable[[DictConfig], float]:
    """Decorate the `main` of one run so that errors pass through Hydra to `reported`.

    It is a generator as `Stepwise` of petl/training/loop.py, whose loop trains alone.

    In a sweep, the error of a job is reported and raised again: Hydra runs the other jobs first.
    Only a signal ends the sweep immediately. With `train.resume=auto`, a sweep skips jobs that are
    finished or claimed by another worker. At its end, a job unlocks its folder.
    """

    @functools.wraps(main)
    def run_job(cfg: DictConfig) -> float:
        begin_job()
        try:
            with reported_to_hydra():
                return _objective(main, cfg)
        finally:
            release_all()

    return run_job


@contextmanager
def reported_to_hydra() -> Generator[None]:
    """Let an error of a job pass through Hydra; in a sweep, report it, since others follow."""
    try:
        yield
    except (InputError, RunStopped) as error:
        is_signal = isinstance(error, RunStopped) and error.status > SIGNALLED
        if is_signal or not in_sweep():
            raise WrappedError(error) from error
        report_error(error)
        raise  # Hydra marks the job as failed, and runs the others


def _objective(main: Callable[[DictConfig], Any], cfg: DictConfig) -> float:
    """Return the objective of a run, also of one that is skipped; raise as `scored`."""
    # imports torch, which a wrong word on the command line does not need
    from petl.training.loop import alone

    try:
        with explain_process_failures():
            objective = alone(main(cfg))
    except JobSkipped as skipped:
        logging.getLogger("petl").info("%s", skipped)
        objective = skipped.objective
    return scored(objective)


def scored(objective: float) -> float:
    """Return the objective of a run.

    Raises:
        RunStopped: Optuna would get NaN, at which its sweeper ends the search by a ValueError.
    """
    if in_sweep() and is_optuna() and math.isnan(objective):
        raise RunStopped("this trial has no score, and counts as failed")
    return objective


def destroy_process_group() -> None:
    """Leave the process group of torch.distributed, if there is one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _terminate(number: int, frame: object) -> NoReturn:
    """Handle SIGTERM outside of training; a training loop handles it itself."""
    report(f"terminated; {how_to_resume()}")
    sys.exit(SIGNALLED + number)
