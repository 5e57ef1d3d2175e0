"""Write files and folders that are complete or not there at all, while the disk has room."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from petl.errors import InputError, RunStopped

MANIFEST = "manifest.json"


UNFINISHED = ".unfinished-"  # how the names of drafts begin


@contextmanager
def atomic_folder(target: Path, *, manifest: bool = False) -> Generator[Path]:
    """A folder to write to that becomes `target` at the end of the block, all of it or nothing.

    Raises:
        RunStopped: the disk is full or not writable; nothing of it is left behind.
    """
    draft = target.parent / f"{UNFINISHED}{target.name}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if manifest:
            write_json(draft / MANIFEST, {"files": fingerprints(draft)})
        for path in (*draft.rglob("*"), draft):
            flush(path)
        if target.exists():  # a damaged checkpoint of the same step
            shutil.rmtree(target)
        draft.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise cannot_write(target, error) from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def cannot_write(path: Path, error: Exception) -> RunStopped:
    """The end of a run whose disk is full or gone."""
    return RunStopped(
        f"cannot write {path}: {error}; checkpoints written before are whole, "
        "make room and go on with train.resume=auto"
    )


def flush(path: Path) -> None:
    """Make the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    path.write_text(as_json(content))


def as_json(content: Any, *, in_order: bool = False) -> str:
    """The text of a JSON file; its keys are sorted, or `in_order`, as they come."""
    return json.dumps(content, indent=2, sort_keys=not in_order) + "\n"


def replace(path: Path, content: str | bytes) -> None:
    """Write a file such that a reader finds the old content or the new one, never a part."""
    draft = path.with_name(f"{UNFINISHED}{path.name}")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(draft)
    draft.replace(path)
    flush(path.parent)


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file below the folder, by its path in it."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def probe(folder: Path) -> None:
    """Raise InputError unless something can be written where `folder` is, or is to be."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".probe-") as made:
            (Path(made) / "file").write_text("petl can write here\n")
    except OSError as error:
        raise InputError(
            f"nothing can be written in {place} ({error.strerror}); "
            "choose a folder for the run with train.output=FOLDER"
        ) from error


def need_room(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of `folder` has less than `needed` bytes left."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place} has {free / 1e6:.0f} MB left, and the run may need {needed / 1e6:.0f}; "
            "make room, or choose another disk with train.output=FOLDER"
        )


@contextmanager
def stop_when_full(folder: Path) -> Generator[None]:
    """Turn a failing write into the end of the run."""
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error) from error
