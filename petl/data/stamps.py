"""The stamps of Tux Paint: pictures in groups, with captions in several languages."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import Dataset

from petl.data.base import RawData, TextSource, train_test_split
from petl.data.conversations import IMAGE, with_parts
from petl.data.retrieval_sets import Pair, PairSource
from petl.data.tasks import Message
from petl.data.tasks.image_text import ImageText
from petl.data.tasks.image_text.images import checked
from petl.data.validation import Row
from petl.errors import InputError, choose
from petl.system.files.paths import path_of
from petl.system.imports.extras import optional
from petl.system.values import field, integer, one_of

STAMPS = "/usr/share/tuxpaint/stamps"  # or a folder that `dpkg -x` wrote
QUESTIONS = {"group": "What kind of thing is this?", "caption": "What is this?"}


@dataclass(kw_only=True)
class Stamps(TextSource):
    """Pictures of things, about which a question is asked: their group, or their caption."""

    serves: ClassVar[tuple[str, ...]] = ("image_text",)

    task: str = "image_text"
    path: str = STAMPS
    asks: str = field("group", one_of(*QUESTIONS))
    # maximum new tokens when answers of test rows are generated and scored
    generate: int | None = field(None, integer(1))

    def read(self) -> RawData:
        """List and hash the pictures; columns `messages`, `images` and `sha256`."""
        optional("PIL", "image")
        pictures = captioned(self.path)
        root = root_of(self.path)
        rows = [self.row(picture, root) for picture in pictures]
        train, test = (Dataset.from_list(part) for part in train_test_split(rows, self))
        task = ImageText(max_length=self.max_length, generate=self.generate)
        return RawData(task, train, test, name=self.name)

    def row(self, file: Path, root: Path) -> Row:
        """The conversation about one stamp."""
        name = file.relative_to(root)
        answer = {"group": name.parts[0], "caption": captions_of(file)["en"]}[self.asks]
        question: Message = {"role": "user", "content": ""}
        parts = [{"type": IMAGE, "name": str(name)}, {"type": "text", "text": QUESTIONS[self.asks]}]
        messages = [with_parts(question, parts), {"role": "assistant", "content": answer}]
        return {
            "messages": messages,
            "images": [str(file.resolve())],
            "sha256": [checked(str(file))],
        }


@dataclass(kw_only=True)
class StampsRetrieval(PairSource):
    """Captions of Tux Paint's stamps: queries in another language, documents the English ones."""

    path: str = STAMPS
    language: str = "de"

    def read(self) -> RawData:
        """Read the captions; columns `query` and `positive`, and those of test rows."""
        captions = [captions_of(file) for file in captioned(self.path)]
        counts = Counter(name for each in captions for name in each)
        choose(counts, self.language, "data.language")
        pairs = [
            Pair(each[self.language], each["en"]) for each in captions if self.language in each
        ]
        # one caption may stand for several stamps
        if len({pair.query for pair in pairs}) < 2:
            raise InputError(
                f"data.language={self.language} has {len(pairs)} captions: at least two are needed"
            )
        return self.split(pairs, [each["en"] for each in captions])


def root_of(path: str) -> Path:
    """The folder of the groups, of a folder that `data.path` names."""
    folder = path_of("data.path", path)
    root = folder / "usr/share/tuxpaint/stamps"  # where `dpkg -x` unpacks the files
    return root if root.is_dir() else folder


def captioned(path: str) -> list[Path]:
    """The pictures with a caption, of a folder that `data.path` names.

    Raises:
        InputError: there is none; the message says how to get them.
    """
    root = root_of(path)
    # sorted by the parts of the path: the same order on all systems
    files = sorted(root.rglob("*.png"), key=lambda file: file.relative_to(root).parts)
    # a mirrored or further picture of a stamp has no caption of its own
    found = [file for file in files if file.with_suffix(".txt").is_file()]
    if not found:
        raise InputError(
            f"data.path={path} has no stamps; run: apt-get download "
            "tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps, and set "
            "data.path=stamps"
        )
    return found


def captions_of(file: Path) -> dict[str, str]:
    """The captions of a picture by language, such as `en` and `de`."""
    # the first line is English, the others are its translations: "de.utf8=..."
    first, *others = file.with_suffix(".txt").read_text("utf-8").splitlines() or [""]
    found = {"en": first.strip()}
    for line in others:
        name, _, text = line.partition("=")
        if text.strip():
            found.setdefault(name.removesuffix(".utf8").strip(), text.strip())
    return found
