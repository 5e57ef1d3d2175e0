"""What a run needs of the disk, and its end when the disk gives no more."""

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel

from petl.core.parameters import trainable
from petl.errors import InputError
from petl.files.atomic import cannot_write
from petl.runs.settings import TrainConfig


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


def room_for(model: PeftModel, settings: TrainConfig) -> int:
    """Bytes that adapter and checkpoints of a run take at most, about."""
    adapter = sum(4 * p.numel() for _, p in trainable(model))
    checkpoint = 3 * adapter  # the adapter and AdamW's two moments
    kept = settings.keep_checkpoints + 2  # the best one, and one that is being written
    return adapter + kept * checkpoint + 2**20


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
