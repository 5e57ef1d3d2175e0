"""Atomic writes of files and folders, and checks of free disk space."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from petl.errors import InputError, RunStopped
from petl.files.safe_open import create, remove

MANIFEST = "manifest.json"


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
    try:
        remove(draft)  # left by a run that was killed
        draft.mkdir(parents=True)
        yield draft
        if manifest:
            write_json(draft / MANIFEST, {"files": fingerprints(draft)})
        # flushed before the rename: else a power failure may leave empty files
        for path in (*draft.rglob("*"), draft):
            flush(path)
        remove(target)  # a damaged checkpoint of the same step
        draft.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise cannot_write(target, error, target.parent) from error
    # also KeyboardInterrupt
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


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


def write_json(path: Path, content: Any) -> None:
    """Write a new JSON file with sorted keys; not atomic."""
    with create(path) as opened:
        opened.write(as_json(content).encode())


def as_json(content: Any, *, in_order: bool = False) -> str:
    """Format `content` as JSON; keys are sorted unless `in_order`."""
    return json.dumps(content, indent=2, sort_keys=not in_order) + "\n"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader finds the old content or the new, never a part.

    A link in its place is replaced, not followed.
    """
    with atomic_file(path) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Generator[BinaryIO]:
    """A file that is renamed to `path` at the end of the block; as `write_atomic`."""
    draft = path.with_name(f"{UNFINISHED}{path.name}")
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


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
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
            f"cannot write to {existing} ({error.strerror}); "
            "choose another folder for the run with train.output=FOLDER"
        ) from error


def check_free_space(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of `folder` has fewer than `needed` free bytes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{existing} has {free / 1e6:.0f} MB of free disk space, but the run may need "
            f"{needed / 1e6:.0f} MB; free some, or choose another disk with train.output=FOLDER"
        )


@contextmanager
def stop_when_full(folder: Path) -> Generator[None]:
    """Turn an OSError inside the block into RunStopped, which ends the run."""
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error, folder) from error
