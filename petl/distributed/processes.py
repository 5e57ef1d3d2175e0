"""The processes of a run: which one reports, and what happens when one is stopped or dies.

Nothing here imports torch."""

import ctypes
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

from petl.config.command_line import to_go_on
from petl.errors import RunStopped

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
ENDINGS = {signal.SIGINT, signal.SIGTERM}
WORKER_DIED = re.compile(r"DataLoader worker \(pid.* (killed|exited unexpectedly)")
PEER_DIED = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe"  # of gloo
    r"|remote process exit|Did the remote server shutdown or crash"  # of NCCL, of the store
)
logger = logging.getLogger(__name__)


def end_with_launcher() -> None:
    """Get a SIGTERM when torchrun dies; its processes are in sessions of their own and live on.

    Only on Linux. One whose launcher dies before this call ends too: it waits for the others at
    an address where nobody answers.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def ignore_foreign_signals(worker: int) -> None:
    """In a worker of a DataLoader: SIGINT and SIGTERM end it only if its run has sent them.

    Ctrl-C, torchrun and schedulers send them to whole groups of processes, and a run that is asked
    to stop needs its workers to come to the end of its step.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return
    owner = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)

    def listen() -> None:
        while signal.sigwaitinfo(ENDINGS).si_pid != owner:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


@contextmanager
def explain_process_failures() -> Generator[None]:
    """Turn what torch raises when a worker or another process of the run is gone into one line.

    Raises:
        RunStopped: one is.
    """
    try:
        yield
    except RuntimeError as error:
        if WORKER_DIED.search(str(error)):
            message = (
                f"a process that makes batches died ({' '.join(str(error).split())}), perhaps for "
                f"want of memory: a smaller train.num_workers needs less; {to_go_on()}"
            )
            rank = os.environ.get("RANK", "0")
            if rank != "0":  # the end of a run is told by the first process, which knows only half
                logger.error("in process %s of the run %s", rank, message)
        elif PEER_DIED.search(str(error)):
            message = f"another process of this run died; {to_go_on()}"
        else:
            raise
        raise RunStopped(message) from error


PATIENCE = timedelta(seconds=5)  # for the first process to tell of an error that all have
_jobs: list[str] = []  # where the processes note, for each job, which of them told of an error


def begin_job() -> None:
    """What one job of a sweep had to tell says nothing of the next; all processes make all jobs."""
    _jobs.append(f"petl/told/{len(_jobs)}")


def note() -> str:
    """Where the processes note which of them has told of an error."""
    return _jobs[-1] if _jobs else "petl/told"


def is_first() -> bool:
    return _rank() == 0


def should_report() -> bool:
    """Whether this process tells what happens to the run."""
    store = _store()
    if not is_first() or store is None:
        return is_first()
    try:
        return not store.check([note()]) or _is_ours(store)
    except RuntimeError:  # it ended with the launcher
        return True


def should_report_error() -> bool:
    """Whether this process tells of an error that it has; the answer holds for all of a job.

    Before the processes have met, one of each machine tells.
    """
    store = _store()
    if store is None:
        return is_first() or os.environ.get("LOCAL_RANK") == "0"
    try:
        if not is_first():
            with suppress(RuntimeError):  # that the time is over
                store.wait([note()], PATIENCE)
        return _is_ours(store)
    except RuntimeError:  # it ended with the launcher, or with the first process
        return is_first()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _store() -> Any:
    """What the processes of a group have in common; None if there is no group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()  # torch has no public word for it


def _is_ours(store: Any) -> bool:
    """Whether it is this process that tells of errors of this job, now or since the first."""
    ours = str(_rank())
    return store.compare_set(note(), "", ours) == ours.encode()


ASKS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Catches SIGINT and SIGTERM inside its block; a second SIGINT stops at once.

    Attributes:
        signal: the first that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in ASKS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal and os.environ.get("RANK", "0") == "0":
            # straight to the file: a log call may be what the signal interrupted
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops at once\n")
        self.signal = self.signal or number
