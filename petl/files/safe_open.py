"""Open, copy and remove files in folders that may come from a stranger.

A folder from a hub, a colleague or a forum may hold links to files of the user, pipes and devices
in place of its files. All files that petl writes are opened here, and none through a link.
Nothing here imports torch.
"""

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from petl.errors import InputError

# Windows has none of the three; there, making a link needs a privilege
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its other end
FLAGS = NO_WAIT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# subfolder of a run that W&B alone reads and writes, with links to its log in the user's cache
WANDB = "wandb"
# of open(2): a link with O_NOFOLLOW (EMLINK on FreeBSD), a pipe without reader, a folder
NOT_REGULAR = {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR}


def check_links(folder: Path) -> None:
    """Refuse a folder in which a link leads out of it, or an entry is a pipe, socket or device.

    The folder itself may be a link: the user has named it. In the cache of the Hub, links to the
    files of the same repository are allowed. The folder of W&B may hold any.

    Raises:
        InputError: the message names the entry.
    """
    for parent, folders, files in os.walk(folder):  # which does not follow links
        for path in (Path(parent, name) for name in (*folders, *files)):
            try:
                kind = path.lstat().st_mode
            except FileNotFoundError:  # a draft of a run that is being trained
                continue
            if stat.S_ISLNK(kind):
                check_link(path, folder)
            elif not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise _not_regular(path)
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name != WANDB]


def check_link(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of `folder`; as `check_links`."""
    root = Path(os.path.realpath(folder))
    # the layout of huggingface_hub's cache: REPO/snapshots/REVISION/FILE -> REPO/blobs/HASH
    blobs = [p.parent / "blobs" for p in root.parents if p.name == "snapshots"]
    target = Path(os.path.realpath(path))  # unlike `resolve`, no error for a loop
    if not any(target.is_relative_to(place) for place in (root, *blobs)):
        raise InputError(
            f"{path} is a link to {target}, outside of {folder}: such links are not followed; "
            "remove it, or put a copy of the file there"
        )


def create(path: Path) -> BinaryIO:
    """Open a new file for writing; whatever has its name is removed.

    For drafts, whose names nobody else uses.
    """
    remove(path)
    # O_EXCL: never through a link, dangling or not
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW | FLAGS
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def open_regular(path: Path, flags: int) -> int:
    """Open a file with flags of `os.open`, without waiting; return its descriptor.

    Raises:
        InputError: it is not a regular file, or with O_NOFOLLOW in `flags` a link.
    """
    try:
        opened = os.open(path, flags | FLAGS, 0o666)
    except OSError as error:
        if error.errno in NOT_REGULAR:
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise _not_regular(path)
    return opened


def append_to(path: Path) -> BinaryIO:
    """Open a regular file, no link, to append to it; a new one if there is none."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW
    return os.fdopen(open_regular(path, flags), "ab")


def open_inside(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link only if it stays in the folder of the file.

    Raises:
        InputError: the link leads out of the folder, or it is not a regular file.
    """
    if path.is_symlink():
        check_link(path, path.parent)
    return os.fdopen(open_regular(path, os.O_RDONLY), "rb")


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file to a new one; as `open_inside` and `create`."""
    with open_inside(source) as opened, create(target) as new:
        shutil.copyfileobj(opened, new)


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link without what it names; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # does not follow links inside
    else:
        path.unlink(missing_ok=True)


def _not_regular(path: Path) -> InputError:
    return InputError(
        f"{path} is not a regular file but a {_kind(path)}: remove it, or put a copy of the file "
        "there"
    )


def _kind(path: Path) -> str:
    kinds = (
        (path.is_symlink, "link"),
        (path.is_dir, "folder"),
        (path.is_fifo, "named pipe"),
        (path.is_socket, "socket"),
    )
    return next((name for is_kind, name in kinds if is_kind()), "device")
