"""Image and audio folders with one subfolder per class, and Asterisk prompts by language."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import Dataset

from petl.data.base import (
    SHARE,
    RawData,
    Source,
    hold_out,
    train_test_split,
)
from petl.data.label_column import has_too_many_classes
from petl.data.task_columns import in_order
from petl.data.tasks.base import Task
from petl.data.tasks.media import CLIP, AudioClassification, ImageClassification
from petl.errors import InputError, did_you_mean
from petl.system.files.disk import sha256
from petl.system.files.paths import path_of
from petl.system.imports.extras import optional
from petl.system.values import Rule, field

LabeledFile = tuple[Path, str]  # a file and its class
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")
WAVE_HEADER = 44  # bytes
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Folders(Source, ABC):
    """Files in one subfolder per class, at any depth below it."""

    suffixes: ClassVar[Sequence[str]]
    package: ClassVar[tuple[str, str]]  # the package that reads them, and its extra of petl

    train: str
    test: str | None = None  # None: test_share of the training files is held out
    test_share: float = field(0.1, SHARE)

    def check(self) -> None:
        """Raise InputError unless both folders exist."""
        for setting, name in (("data.train", self.train), ("data.test", self.test)):
            if name:
                folder_of(setting, name)

    @abstractmethod
    def task_of(self, classes: list[str]) -> Task:
        """The task with these classes."""

    def read(self) -> RawData:
        """List and hash the files; columns `path`, `sha256` and `label`."""
        # raise for a missing package before files are hashed
        optional(*self.package)
        train = labeled_files("data.train", self.train, self.suffixes)
        counts = Counter(name for _, name in train)
        classes = in_order(counts)
        if has_too_many_classes(counts):
            logger.warning(
                "data.train=%s has %d classes (subfolders) for %d files: too few of each to learn "
                "from; is it the folder above the classes?",
                self.train,
                len(counts),
                len(train),
            )
        if self.test:
            test = labeled_files("data.test", self.test, self.suffixes)
            if Path(self.test).expanduser().samefile(Path(self.train).expanduser()):
                logger.warning(
                    "data.test and data.train are the same folder: scores measure memorization"
                )
            unknown = sorted({name for _, name in test} - set(classes))
            if unknown:
                raise InputError(
                    f"data.test={self.test} has class {unknown[0]!r}, which "
                    f"data.train={self.train} lacks{did_you_mean(unknown[0], classes)}"
                )
        else:
            for_training, for_test = hold_out(len(train), self.test_share, self.seed, self.train)
            train, test = [train[i] for i in for_training], [train[i] for i in for_test]
        splits = [
            split([rows[i] for i in self.sample(name, len(rows))], classes)
            for name, rows in (("train", train), ("test", test))
        ]
        return RawData(self.task_of(classes), *splits, name=self.name)


@dataclass(kw_only=True)
class ImageFolder(Folders):
    """Image files, read by Pillow."""

    serves: ClassVar[tuple[str, ...]] = ("image_classification",)
    suffixes: ClassVar[Sequence[str]] = IMAGES
    package: ClassVar[tuple[str, str]] = ("PIL", "image")

    task: str = "image_classification"

    def task_of(self, classes: list[str]) -> Task:
        """Build an image classification task."""
        return ImageClassification(classes=classes)


@dataclass(kw_only=True)
class AudioFolder(Folders):
    """Audio files, read by SciPy or soundfile."""

    serves: ClassVar[tuple[str, ...]] = ("audio_classification",)
    suffixes: ClassVar[Sequence[str]] = SOUNDS
    package: ClassVar[tuple[str, str]] = ("scipy", "audio")

    task: str = "audio_classification"
    max_seconds: float = field(10.0, CLIP)  # of a clip; longer clips are truncated

    def task_of(self, classes: list[str]) -> Task:
        """Build an audio classification task."""
        return AudioClassification(classes=classes, max_seconds=self.max_seconds)


@dataclass(kw_only=True)
class Speech(Source):
    """Voice prompts of the Asterisk telephone exchange, classified by language.

    Each language has one speaker, so that the classes differ in the voice as well.
    """

    serves: ClassVar[tuple[str, ...]] = ("audio_classification",)

    task: str = "audio_classification"
    path: str = "/usr/share/asterisk/sounds"  # or a folder that `dpkg -x` wrote
    languages: list[str] = field(
        ["en", "es", "fr", "it", "ru"],
        Rule("a list of at least two languages", lambda names: len(set(names)) > 1),
    )
    max_seconds: float = field(10.0, CLIP)  # of a clip; longer clips are truncated

    def read(self) -> RawData:
        """List and hash the prompts; columns `path`, `sha256` and `label`."""
        optional("scipy", "audio")
        path = path_of("data.path", self.path)
        root = path / "usr/share/asterisk/sounds"  # where `dpkg -x` unpacks the files
        root = root if root.is_dir() else path
        classes = sorted(set(self.languages))
        files = [file for language in classes for file in self.prompts(root, language)]
        train, test = (split(part, classes) for part in train_test_split(files, self))
        task = AudioClassification(classes=classes, max_seconds=self.max_seconds)
        return RawData(task, train, test, name=self.name)

    def prompts(self, root: Path, language: str) -> list[LabeledFile]:
        """The prompts of a language, without silences and empty files.

        Raises:
            InputError: the language has no prompts.
        """
        # folders are named by language and speaker, such as en_US_f_Allison
        files = sorted(root.glob(f"{language}_*/**/*.wav"))
        spoken = [f for f in files if f.parent.name != "silence" and f.stat().st_size > WAVE_HEADER]
        if not spoken:
            raise InputError(
                f"data.path={self.path} has no prompts in {language!r}; run: apt-get download "
                f"asterisk-core-sounds-{language}-wav && dpkg -x asterisk-core-sounds-{language}-"
                "wav_*.deb sounds, and set data.path=sounds"
            )
        return [(file, language) for file in spoken]


def folder_of(setting: str, name: str) -> Path:
    """Return the folder that a setting names.

    Raises:
        InputError: there is none.
    """
    folder = path_of(setting, name)
    if not folder.is_dir():
        reason = "is not a directory" if folder.exists() else "does not exist"
        raise InputError(f"{setting}={name} {reason}: give a folder with one subfolder per class")
    return folder


def labeled_files(setting: str, name: str, suffixes: Sequence[str]) -> list[LabeledFile]:
    """The files with one of `suffixes` and their classes, sorted by path.

    Raises:
        InputError: not a directory, fewer than two classes, a class without such files, or most
            files are in none.
    """
    folder = folder_of(setting, name)
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(inside) < 2:
        found = f"only the subfolder {inside[0].name!r}" if inside else "no subfolders"
        raise InputError(
            f"{setting}={name} has {found}: give a folder with one subfolder per class"
        )
    beside = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    stray = [p for p in beside if p.suffix.lower() in suffixes]
    files: list[LabeledFile] = []
    skipped = len(beside) - len(stray)
    for place in inside:
        present = visible_files(place)
        matching = [p for p in present if p.suffix.lower() in suffixes]
        if not matching:
            raise InputError(
                f"{place} has no file of the types {', '.join(suffixes)}: remove the folder"
            )
        # sorted by the parts of the path, not by its text: the same order on all systems
        files += [
            (p, place.name) for p in sorted(matching, key=lambda p: p.relative_to(place).parts)
        ]
        skipped += len(present) - len(matching)
    if len(stray) > len(files):
        raise InputError(
            f"{setting}={name} has {len(stray)} files beside its subfolders, such as "
            f"{min(stray).name}, and {len(files)} in them: move each into that of its class"
        )
    if stray:
        logger.warning(
            "%s=%s: skipping %d files beside the subfolders, such as %s: they have no class",
            *(setting, name, len(stray), min(stray).name),
        )
    if skipped:
        logger.info("%s=%s: skipping %d files of other types", setting, name, skipped)
    return files


def visible_files(folder: Path) -> list[Path]:
    """The files in a folder, at any depth, except hidden ones and those in hidden folders."""
    # such as macOS' "._a.png", which is no image, and copies in .ipynb_checkpoints
    return [
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    ]


def split(files: Sequence[LabeledFile], classes: list[str]) -> Dataset:
    """A data set with the columns `path`, `sha256` of the content and `label`, the class number."""
    number = {name: i for i, name in enumerate(classes)}
    return Dataset.from_dict(
        {
            "path": [str(path.absolute()) for path, _ in files],
            "sha256": [sha256(path) for path, _ in files],
            "label": [number[name] for _, name in files],
        }
    )
