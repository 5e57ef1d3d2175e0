"""Folders of images or sounds, one sub-folder a class; and prompts of Asterisk by language."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from datasets import Dataset

from petl.data.base import (
    RawData,
    Source,
    check_least,
    check_share,
    cut,
    hold_out,
    parted,
    shuffled,
)
from petl.data.task_columns import in_order
from petl.errors import InputError, did_you_mean
from petl.imports.extras import optional
from petl.tasks.base import Task
from petl.tasks.media import AudioClassification, ImageClassification

Labelled = tuple[Path, str]  # a file and its class
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")
LEAST_SECONDS = 0.05  # two windows of a spectrogram
WAVE_HEADER = 44  # bytes
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Folders(Source, ABC):
    """Files in one sub-folder a class, however deep below it."""

    suffixes: ClassVar[Sequence[str]]
    package: ClassVar[tuple[str, str]]  # that reads them, and the extra that installs it

    train: str
    test: str | None = None  # None: test_share of train is held out
    test_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.test_share)

    @abstractmethod
    def task_of(self, classes: list[str]) -> Task:
        """The task with these classes."""

    def read(self) -> RawData:
        optional(*self.package)
        train = labelled_files("data.train", self.train, self.suffixes)
        classes = in_order({name for _, name in train})
        if self.test:
            test = labelled_files("data.test", self.test, self.suffixes)
            if Path(self.test).expanduser().samefile(Path(self.train).expanduser()):
                logger.warning("data.test is data.train: scores tell what was memorised")
            strange = sorted({name for _, name in test} - set(classes))
            if strange:
                raise InputError(
                    f"data.test={self.test} has class {strange[0]!r}, which "
                    f"data.train={self.train} lacks{did_you_mean(strange[0], classes)}"
                )
        else:
            kept, held = hold_out(len(train), self.test_share, self.seed, self.train)
            train, test = [train[i] for i in kept], [train[i] for i in held]
        splits = [
            split([rows[i] for i in cut(shuffled(len(rows), self.seed), count, setting)], classes)
            for rows, count, setting in (
                (train, self.train_rows, "train_rows"),
                (test, self.test_rows, "test_rows"),
            )
        ]
        return RawData(self.task_of(classes), *splits, name=self.name)


@dataclass(kw_only=True)
class ImageFolder(Folders):
    """Images that pillow reads."""

    serves: ClassVar[tuple[str, ...]] = ("image_classification",)
    suffixes: ClassVar[Sequence[str]] = IMAGES
    package: ClassVar[tuple[str, str]] = ("PIL", "image")

    task: str = "image_classification"

    def task_of(self, classes: list[str]) -> Task:
        return ImageClassification(classes=classes)


@dataclass(kw_only=True)
class AudioFolder(Folders):
    """Sounds that SciPy or soundfile reads."""

    serves: ClassVar[tuple[str, ...]] = ("audio_classification",)
    suffixes: ClassVar[Sequence[str]] = SOUNDS
    package: ClassVar[tuple[str, str]] = ("scipy", "audio")

    task: str = "audio_classification"
    max_seconds: float = 10.0  # of a clip; longer ones are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("max_seconds", self.max_seconds, LEAST_SECONDS)

    def task_of(self, classes: list[str]) -> Task:
        return AudioClassification(classes=classes, max_seconds=self.max_seconds)


@dataclass(kw_only=True)
class Speech(Source):
    """Which language a prompt of the telephone exchange Asterisk is spoken in.

    Each language is the voice of one speaker, so this is as much about voices.
    """

    serves: ClassVar[tuple[str, ...]] = ("audio_classification",)

    task: str = "audio_classification"
    path: str = "/usr/share/asterisk/sounds"  # or a folder that `dpkg -x` wrote
    languages: list[str] = field(default_factory=lambda: ["en", "es", "fr", "it", "ru"])
    max_seconds: float = 10.0  # of a clip; longer ones are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("max_seconds", self.max_seconds, LEAST_SECONDS)
        if len(set(self.languages)) < 2:
            raise InputError(f"data.languages={self.languages} names fewer than two")

    def read(self) -> RawData:
        optional("scipy", "audio")
        given = Path(self.path).expanduser()
        root = given / "usr/share/asterisk/sounds"
        root = root if root.is_dir() else given
        classes = sorted(set(self.languages))
        files = [file for language in classes for file in self.prompts(root, language)]
        train, test = (split(part, classes) for part in parted(files, self))
        task = AudioClassification(classes=classes, max_seconds=self.max_seconds)
        return RawData(task, train, test, name=self.name)

    def prompts(self, root: Path, language: str) -> list[Labelled]:
        """The prompts of a language, without those that are silent by intent or by mistake."""
        files = sorted(root.glob(f"{language}_*/**/*.wav"))
        spoken = [f for f in files if f.parent.name != "silence" and f.stat().st_size > WAVE_HEADER]
        if not spoken:
            raise InputError(
                f"data.path={self.path} has no prompts in {language!r}; run: apt-get download "
                f"asterisk-core-sounds-{language}-wav && dpkg -x asterisk-core-sounds-{language}-"
                "wav_*.deb sounds, and say data.path=sounds"
            )
        return [(file, language) for file in spoken]


def labelled_files(setting: str, given: str, suffixes: Sequence[str]) -> list[Labelled]:
    """The files with one of `suffixes` and their classes, in an order that does not depend on disk.

    Raises:
        InputError: no folder, fewer than two classes, or a class without such files.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{setting}={given} {what}: give a folder with one sub-folder a class")
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(inside) < 2:
        found = f"only {inside[0].name!r}" if inside else "none"
        raise InputError(f"{setting}={given} has {found} as a sub-folder; each class wants its own")
    files: list[Labelled] = []
    passed = 0
    for place in inside:
        every = [p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")]
        wanted = [p for p in every if p.suffix.lower() in suffixes]
        if not wanted:
            raise InputError(
                f"{place} holds no file that ends in {', '.join(suffixes)}: leave the folder out"
            )
        files += [(p, place.name) for p in sorted(wanted, key=lambda p: p.relative_to(place).parts)]
        passed += len(every) - len(wanted)
    if passed:
        logger.info("%s=%s: passing over %d files of other kinds", setting, given, passed)
    return files


def split(files: Sequence[Labelled], classes: list[str]) -> Dataset:
    """Rows of `path`, `sha256` and `label`."""
    number = {name: i for i, name in enumerate(classes)}
    return Dataset.from_dict(
        {
            "path": [str(path.absolute()) for path, _ in files],
            "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path, _ in files],
            "label": [number[name] for _, name in files],
        }
    )
