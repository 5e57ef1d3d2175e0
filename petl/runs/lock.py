"""A run's folder belongs to one process at a time.

The lock is one of the operating system's (POSIX record locks): it ends with its process, however
that ends, is not passed on to forked workers, and holds between machines where the file system
carries locks. Nothing here imports torch.
"""

import errno
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from petl.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCK = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # open files: closing any of them would end the lock


def claim(run: Path) -> None:
    """Keep other processes out of the folder of a run until `release`, or the end of this one.

    Raises:
        InputError: another process has it; the message says which.
    """
    holder = try_claim(run)
    if holder:
        raise InputError(
            f"{run} is being written by {holder}; wait until that has ended, or stop it"
        )


def try_claim(folder: Path) -> str:
    """Claim the folder as `claim` does; "", or which other process has it."""
    file = (folder / LOCK).resolve()
    if file in _held:
        return ""
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if not _is_ours(opened, folder):
        noted = os.pread(opened, 4096, 0)
        os.close(opened)
        return _told(noted)
    _held[file] = opened
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(opened, 0)
    os.pwrite(opened, json.dumps(holder).encode(), 0)
    return ""


def release(run: Path) -> None:
    """Let other processes have the folder."""
    opened = _held.pop((run / LOCK).resolve(), None)
    if opened is not None:
        os.close(opened)


def release_all() -> None:
    """Let other processes have every folder of this one."""
    while _held:
        os.close(_held.popitem()[1])


def _is_ours(opened: int, run: Path) -> bool:
    """Take the lock; False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning("the disk of %s has no file locks: see that no two runs write there", run)
    return True


def _told(holder: bytes) -> str:
    try:
        noted = json.loads(holder)
        return f"process {noted['pid']} on {noted['host']}, since {noted['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock, and is about to write who it is
        return "another process"
