"""Locks that keep several processes from writing to the folder of one run.

These are POSIX record locks: they end with their process, also by kill -9, are not inherited by
forked DataLoader workers, and hold between machines if the file system supports them. (filelock
uses flock(2), which a forked worker inherits, so the worker of a killed run would keep the folder.)
Nothing here imports torch.
"""

import errno
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from petl.errors import InputError
from petl.files.disk import NO_FOLLOW, check_links, open_regular
from petl.files.read import parse_json

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCK = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # descriptors: closing any one of the file ends a POSIX lock


def claim(run: Path) -> None:
    """Lock the folder of a run until `release` or the end of this process.

    Raises:
        InputError: another process holds the lock, and the message names it; or a link in the
            folder leads out of it.
    """
    # here, because whatever writes to the folder of a run locks it first
    check_links(run)
    holder = try_claim(run)
    if holder:
        raise InputError(
            f"{run} is being written by {holder}; wait until that has ended, or stop it"
        )


def try_claim(folder: Path) -> str:
    """Lock a folder as `claim` does; return "" or a description of the process that holds it."""
    file = folder.resolve() / LOCK
    # a second lock of the same process would succeed, and closing it would end the first
    if file in _held:
        return ""
    # not truncated when opened: the holder's description must stay readable
    opened = open_regular(file, os.O_RDWR | os.O_CREAT | NO_FOLLOW)
    if os.fstat(opened).st_nlink > 1:  # a hard link: writing would change the other file
        os.close(opened)
        raise InputError(f"{file} has another name elsewhere (a hard link): remove it")
    if not _is_ours(opened, folder):
        noted = os.pread(opened, 4096, 0)
        os.close(opened)
        return _describe(noted)
    _held[file] = opened
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(opened, 0)
    os.pwrite(opened, json.dumps(holder).encode(), 0)
    return ""


def release(run: Path) -> None:
    """Unlock the folder."""
    opened = _held.pop(run.resolve() / LOCK, None)
    if opened is not None:
        os.close(opened)


def release_all() -> None:
    """Unlock every folder that this process has locked."""
    while _held:
        os.close(_held.popitem()[1])


def _is_ours(opened: int, run: Path) -> bool:
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
