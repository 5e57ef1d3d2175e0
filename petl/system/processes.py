"""The processes of a run: which one reports, what happens when one is stopped or dies, and locks.

Nothing here imports torch.
"""

import ctypes
import errno
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from petl.errors import InputError, RunStopped
from petl.system.files.disk import NO_FOLLOW, check_links, open_regular
from petl.system.files.read import parse_json
from petl.system.settings.command_line import how_to_resume, run_of_several

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
ENDINGS = {signal.SIGINT, signal.SIGTERM}
NAMES_SENDER = hasattr(signal, "sigwaitinfo")  # macOS does not
WORKER_DIED = re.compile(r"DataLoader worker \(pid.* (killed|exited unexpectedly)")
PEER_DIED = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe"  # of gloo
    r"|remote process exit|Did the remote server shutdown or crash"  # of NCCL, of the store
)
logger = logging.getLogger(__name__)


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when torchrun dies.

    Otherwise it would keep running: torchrun puts each process in a session of its own. Only on
    Linux. A process whose launcher dies before this call fails at the rendezvous instead.
    """
    # the launcher is the parent: the signal comes when the parent thread ends
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def ignore_foreign_signals(worker: int) -> None:
    """In a DataLoader worker, ignore SIGINT and SIGTERM unless the training process sent them.

    Ctrl-C, torchrun and schedulers send them to whole process groups, but a run that has been asked
    to stop needs its workers until the end of its step.
    """
    if not NAMES_SENDER:
        return
    owner = os.getppid()  # the training process
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)

    def wait_for_owner() -> None:
        while signal.sigwaitinfo(ENDINGS).si_pid != owner:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_owner, daemon=True).start()


@contextmanager
def endings_blocked() -> Generator[None]:
    """Hold back SIGINT and SIGTERM in this thread, and in processes that it forks, from the start.

    `ignore_foreign_signals` would be too late for threads that libraries start again in a forked
    process, as W&B does: the signal would reach those, and end the worker.
    """
    if not NAMES_SENDER:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def explain_process_failures() -> Generator[None]:
    """Turn torch's errors about a dead worker or a dead process of the run into one line.

    Raises:
        RunStopped: a worker or another process died.
    """
    try:
        yield
    except RuntimeError as error:
        if WORKER_DIED.search(str(error)):
            message = (
                f"a DataLoader worker died ({' '.join(str(error).split())}), perhaps because "
                f"memory ran out: lower train.num_workers; {how_to_resume()}"
            )
            rank = os.environ.get("RANK", "0")
            # process 0 reports the end of the run, but it only sees that a peer died
            if rank != "0":
                logger.error("in process %s of the run %s", rank, message)
        elif PEER_DIED.search(str(error)):
            message = f"another process of this run died; {how_to_resume()}"
        else:
            raise
        raise RunStopped(message) from error


PATIENCE = timedelta(seconds=5)  # assumption: process 0 reports an error that all have by then
_jobs: list[str] = []  # by job, the store key that holds the rank which reported an error


def begin_job() -> None:
    """Forget which process reported an error of the last job; all processes run all jobs."""
    _jobs.append(f"petl/reported/{len(_jobs)}")


def report_key() -> str:
    """Return the store key that holds the rank which reported an error of this job."""
    return _jobs[-1] if _jobs else "petl/reported"


def refuse_processes(reason: str) -> None:
    """Raise InputError, with the reason, if a launcher such as torchrun has started several."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise InputError(f"WORLD_SIZE={processes}: {reason}")


def is_first() -> bool:
    """Return True in the process of rank 0."""
    return _rank() == 0


def should_report() -> bool:
    """Return True if this process prints what happens to the run."""
    store = _store()
    if not is_first() or store is None:
        return is_first()
    try:
        return not store.check([report_key()]) or _is_ours(store)
    except RuntimeError:  # the store ended with the launcher
        return True


def should_report_error() -> bool:
    """Return True if this process prints an error that it has; the answer holds for all of a job.

    Before there is a process group, one process of each machine prints.
    """
    store = _store()
    if store is None:
        return is_first() or os.environ.get("LOCAL_RANK") == "0"
    try:
        if not is_first():
            with suppress(RuntimeError):  # timeout
                store.wait([report_key()], PATIENCE)
        return _is_ours(store)
    except RuntimeError:  # the store ended with the launcher, or with process 0
        return is_first()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _store() -> Any:
    """Return the key-value store of the process group; None if there is no group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()  # torch has no public function for it


def _is_ours(store: Any) -> bool:
    """Claim the reporting of this job's errors; return True if it is this process's."""
    ours = str(_rank())
    return store.compare_set(report_key(), "", ours) == ours.encode()


ASKS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Catches SIGINT and SIGTERM inside its block; a second SIGINT stops immediately.

    Attributes:
        signal: the first one received, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # a run inside a thread of a larger program leaves its handlers alone
        if threading.current_thread() is threading.main_thread():  # handlers can be set only there
            self._before = {number: signal.signal(number, self._note) for number in ASKS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # SIGTERM may be repeated by schedulers, so only a second Ctrl-C is immediate
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal and os.environ.get("RANK", "0") == "0":
            # not by logging: the signal may have interrupted a log call, which holds a lock
            os.write(
                2, b"\nfinishing this step, then saving; press Ctrl-C again to stop immediately\n"
            )
        self.signal = self.signal or number


# Locks that keep several processes from writing to the folder of one run: POSIX record locks, which
# end with their process, also by kill -9, are not inherited by forked DataLoader workers, and hold
# between machines if the file system supports them. (filelock uses flock(2), which a forked worker
# inherits, so the worker of a killed run would keep the folder.)

LOCK = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# descriptors (closing any one of the file ends a POSIX lock), and whose they are
_held: dict[Path, tuple[int, Any]] = {}


def claim(run: Path) -> None:
    """Lock the folder of a run until `release` or the end of this process.

    Raises:
        InputError: another process holds the lock, and the message names it; or a link in the
            folder leads out of it.
    """
    # here, because whatever writes to the folder of a run locks it first
    check_links(run)
    _claim(run)


@contextmanager
def claimed(folder: Path) -> Generator[None]:
    """Lock a folder of several runs, which is created if it is missing.

    Raises:
        InputError: another process holds the lock, and the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    try:
        yield
    finally:
        release(folder)


def _claim(folder: Path) -> None:
    holder = try_claim(folder)
    if holder:
        raise InputError(
            f"{folder} is being written by {holder}; wait until that has ended, or stop it"
        )


def try_claim(folder: Path) -> str:
    """Lock a folder as `claim` does; return "" or a description of the process that holds it."""
    file = folder.resolve() / LOCK
    # a second lock of the same process would succeed, and closing it would end the first
    if file in _held:
        return "" if _held[file][1] is run_of_several() else "another run of this process"
    # not truncated when opened: the holder's description must stay readable
    opened = open_regular(file, os.O_RDWR | os.O_CREAT | NO_FOLLOW)
    if os.fstat(opened).st_nlink > 1:  # a hard link: writing would change the other file
        os.close(opened)
        raise InputError(f"{file} has another name elsewhere (a hard link): remove it")
    if not _lock(opened, folder):
        noted = os.pread(opened, 4096, 0)
        os.close(opened)
        return _describe(noted)
    _held[file] = opened, run_of_several()
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(opened, 0)
    os.pwrite(opened, json.dumps(holder).encode(), 0)
    return ""


def release(run: Path) -> None:
    """Unlock the folder."""
    held = _held.pop(run.resolve() / LOCK, None)
    if held is not None:
        os.close(held[0])


def release_all() -> None:
    """Unlock every folder that this process has locked; of several runs, those of this one."""
    for file in [file for file, (_, owner) in _held.items() if owner is run_of_several()]:
        os.close(_held.pop(file)[0])


def _lock(opened: int, run: Path) -> bool:
    """Try to lock the open file; return False if another process holds the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning(
            "the file system of %s has no file locks: make sure that no two runs write there", run
        )
    return True


def _describe(holder: bytes) -> str:
    try:
        noted = parse_json(holder.decode())
        return f"process {noted['pid']} on {noted['host']}, since {noted['since']}"
    except (ValueError, KeyError, TypeError):  # it holds the lock, and has not written its name yet
        return "another process"
