"""When a process that this one depends on dies: its launcher, a peer, a worker of its loader."""

import ctypes
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

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


def obey_owner_alone(worker: int) -> None:
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
def deaths_told() -> Generator[None]:
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
