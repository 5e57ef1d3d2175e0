"""Open, copy and remove files; write files and folders atomically; check free disk space.

A folder from a hub, a colleague or a forum may hold links to files of the user, pipes and devices
in place of its files. All files that petl writes are opened here, and none through a link.
Nothing here imports torch.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import BinaryIO, TextIO

from safetensors import SafetensorError

from petl.errors import InputError, RunStopped, described

MANIFEST = "manifest.json"
# files by which a folder is known that is read back as a whole
WHOLE = (
    ("an adapter", ("adapter_config.json",)),
    ("a drafter", ("drafter_config.json",)),
    ("a checkpoint", (MANIFEST, "state.json")),
    ("a model", ("config.json", "model.safetensors")),
    ("a model", ("config.json", "model.safetensors.index.json")),
)
RUN = ("config.yaml", "environment.json")  # of which every run has both
CHECKPOINTS = "checkpoints"  # in the folder of a run
MAX_DEPTH = 32  # of nested values
TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"
MAX_INTEGER = 2**64  # exclusive: seeds may have 64 bits
_KEYS, _NESTED = (str, int), (dict, list)  # `str | int` in a loop makes a union each time
UNFINISHED = ".unfinished-"  # prefix of the names of temporary files and folders


@contextmanager
def atomic_folder(target: Path, *, manifest: bool = False) -> Generator[Path]:
    """A temporary folder that is renamed to `target` at the end of the block.

    `target` is therefore complete or absent, also after a crash.

    Args:
        target: the folder to write; an existing one is replaced.
        manifest: add a file with size and SHA-256 of every file.

    Raises:
        RunStopped: the disk is full or not writable; the temporary folder is removed.
    """
    # in the same folder, since a rename is atomic only within a file system
    draft = target.parent / f"{UNFINISHED}{target.name}"
    old = target.parent / f"{UNFINISHED}old-{target.name}"
    try:
        for path in (draft, old):
            remove(path)  # left by a run that was killed
        draft.mkdir(parents=True)
        yield draft
        if manifest:
            write_json(draft / MANIFEST, {"files": fingerprints(draft)})
        for path in draft.rglob("*"):
            follow_umask(path)
        # flushed before the rename: else a power failure may leave empty files
        for path in (*draft.rglob("*"), draft):
            flush(path)
        # not removed in its place, file by file; there may be a damaged checkpoint of the same step
        with suppress(FileNotFoundError):
            target.rename(old)
        draft.rename(target)
        flush(target.parent)
        remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise cannot_write(target, error, target.parent) from error
    # also KeyboardInterrupt
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def follow_umask(path: Path) -> None:
    """Let those read and write a file who may do so with its folder.

    safetensors writes for the user alone, so that no group and no server could read an adapter.
    """
    if path.is_file() and not path.is_symlink():
        path.chmod(path.stat().st_mode | path.parent.stat().st_mode & 0o666)


def cannot_write(path: Path, error: Exception, folder: Path) -> RunStopped:
    """The error that stops a run whose disk is full or not available, or whose folder is gone."""
    if isinstance(error, FileNotFoundError) and not folder.exists():
        return RunStopped(
            f"cannot write {path}: {folder} was deleted or moved while this run was writing to "
            "it; start the run again"
        )
    return RunStopped(
        f"cannot write {path}: {error}; earlier checkpoints are complete; free "
        "disk space and resume with train.resume=auto"
    )


def flush(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: object) -> None:
    """Write a new JSON file with sorted keys; not atomic."""
    with create(path) as opened:
        opened.write(as_json(content).encode())


def as_json(content: object, *, in_order: bool = False) -> str:
    """Format `content` as JSON; keys are sorted unless `in_order`."""
    return json.dumps(content, indent=2, sort_keys=not in_order) + "\n"


def check_bounds(value: object, depth: int = 0) -> None:
    """Check that a parsed value can be written again: depth, integers of 64 bits, Unicode.

    Raises:
        ValueError: the reason, in one line.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, _KEYS):
                raise ValueError(f"the key {described(key)} is neither text nor an integer")
            _check_leaf(key)
        _check_entries(value.values(), depth)
    elif isinstance(value, list):
        _check_entries(value, depth)
    else:
        _check_leaf(value)


def _check_entries(entries: Collection[object], depth: int) -> None:
    """Check the entries of a mapping or list."""
    if entries and depth >= MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    for entry in entries:
        if isinstance(entry, _NESTED):
            check_bounds(entry, depth + 1)
        elif not isinstance(entry, float):
            _check_leaf(entry)


def _check_leaf(value: object) -> None:
    """Check a value that is neither a mapping nor a list."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{described(value)} is not valid Unicode") from error
    elif isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise ValueError("an integer has more than 64 bits")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader finds the old content or the new, never a part.

    A link in its place is replaced, not followed.
    """
    with atomic_file(path) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Generator[BinaryIO]:
    """A file that is renamed to `path` at the end of the block; as `write_atomic`."""
    remove(path.with_name(f"{UNFINISHED}{path.name}"))
    # of this writer alone: two of one file would rename each other's draft
    draft = path.with_name(f"{UNFINISHED}{os.getpid()}-{get_ident()}-{path.name}")
    try:
        with create(draft) as opened:
            yield opened
            # content first, then the rename
            opened.flush()
            os.fsync(opened.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush(path.parent)  # else the rename may be lost in a crash


def fingerprints(folder: Path) -> dict[str, dict[str, object]]:
    """Size in bytes and SHA-256 of every file below the folder, by relative path."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def note_digest(file: Path) -> None:
    """Write the SHA-256 of a complete file into a file beside it."""
    write_atomic(file.with_name(f"{file.name}.sha256"), sha256(file))


def is_as_noted(file: Path) -> bool:
    """Return whether a file is there and equals the one whose digest was noted beside it."""
    noted = file.with_name(f"{file.name}.sha256")
    if not (file.is_file() and noted.is_file()):
        return False
    with noted.open("rb") as opened:
        # bounded: a stranger may have written it
        return opened.read(64) == sha256(file).encode()


def check_writable(folder: Path) -> None:
    """Raise InputError unless `folder`, or its closest existing parent, is writable."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".probe-") as temporary:
            (Path(temporary) / "file").write_text("petl can write here\n")
    except OSError as error:
        raise InputError(
            f"cannot write to {existing} ({error.strerror}); choose another folder "
            "(of a run: train.run=FOLDER, or train.output=FOLDER for the folders of all runs)"
        ) from error


def check_free_space(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of `folder` has fewer than `needed` free bytes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{existing} has {free / 1e6:.0f} MB of free disk space, but the run may need "
            f"{needed / 1e6:.0f} MB; free some, or choose another disk "
            "with train.run=FOLDER or train.output=FOLDER"
        )


@contextmanager
def stop_when_full(folder: Path) -> Generator[None]:
    """Turn an OSError inside the block into RunStopped, which ends the run."""
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error, folder) from error


# Files that a stranger may have put there

# Windows has none of the three; there, making a link needs a privilege
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its other end
FLAGS = NO_WAIT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# subfolder of a run that W&B alone reads and writes, with links to its log in the user's cache
WANDB = "wandb"
# of open(2): a link with O_NOFOLLOW (EMLINK on FreeBSD), a pipe without reader, a folder
NOT_REGULAR = {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR}


def refuse_inside(path: Path) -> None:
    """Raise InputError if a path is inside of an adapter, drafter, checkpoint or model.

    The folder of a run's checkpoints is refused as well: a run that resumes lists it.
    """
    folder = path.absolute().parent.resolve()
    for place in (path.absolute().resolve(), folder, *folder.parents):
        if place.name == CHECKPOINTS and has_files(place.parent, RUN):
            raise InputError(
                f"{path} is among the checkpoints of the run {place.parent}; choose a place "
                "outside of them"
            )
    for parent in (folder, *folder.parents):
        kind = next((kind for kind, names in WHOLE if has_files(parent, names)), None)
        if kind is not None:
            raise InputError(f"{path} is inside of {parent}, {kind}; choose a place outside of it")


def has_files(folder: Path, names: Collection[str]) -> bool:
    """Return True if a folder has files of all of these names."""
    return all((folder / name).is_file() for name in names)


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


def append_text(path: Path) -> TextIO:
    """Open a new or existing file for appending lines of text."""
    return io.TextIOWrapper(append_to(path), encoding="utf-8", line_buffering=True)


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
