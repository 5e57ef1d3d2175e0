"""What stands between a command line and a run: bad input becomes one message and a status.

`main` of train.py runs under `entry`; other commands compose with `compose` and report with
`reported`. Nothing here imports torch.
"""

import errno
import functools
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig

from petl.config.command_line import config_dir_option, in_sweep, to_go_on
from petl.config.compose import HYDRAS, add_config_dir, explain
from petl.distributed.processes import (
    begin_job,
    end_with_launcher,
    explain_process_failures,
    is_first,
    should_report,
    should_report_error,
)
from petl.errors import InputError, JobSkipped, RunStopped
from petl.runs.lock import release_all

BAD_INPUT = 2  # exit status, as of argparse
SIGNALLED = 128  # plus the signal's number: exit status, as of shells
# warnings of libraries about one another, in which a reader can mend nothing
NOISE = (
    ".*is_gradient_checkpointing",  # old names, and transformers 5.2 has no others
    ".*`gradient_checkpointing_(en|dis)able` is deprecated",
    "Unsupported layer type '.*LayerNorm'",  # PEFT's copy of a norm, for PEFT's own ln_tuning
    ".*all_gather_into_tensor` is deprecated",  # DeepSpeed calls it
    "Sparse invariant checks are implicitly disabled",  # PEFT's shira
)
DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


# Reporting


class Passing(BaseException):
    """Carries an error past Hydra, which would print lines of its own before ours."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def report(message: str) -> None:
    """One message on standard error, from one process."""
    if should_report():
        sys.stderr.write(f"{message}\n")


def print_error(what: object) -> None:
    """The same of an error, from the first process that has it."""
    if should_report_error():
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
        print_error(error)
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
    print_error(explain(error) if isinstance(error, HYDRAS) else error)
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
    folder = config_dir_option(sys.argv[1:])
    if folder is not None and Path(folder).is_dir():  # Hydra reports one that is not
        add_config_dir(folder)
    if {"-h", "--help"} & set(sys.argv[1:]):
        from petl.cli.help import text

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
            with explain_process_failures():
                return main(cfg)
        except JobSkipped as known:
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
