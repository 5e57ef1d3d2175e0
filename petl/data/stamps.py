"""The stamps of Tux Paint: pictures in groups, each with a caption."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import Dataset

from petl.data.base import RawData, TextSource, train_test_split
from petl.data.conversations import IMAGE, with_parts
from petl.data.tasks import Message
from petl.data.tasks.image_text import ImageText
from petl.data.tasks.image_text.images import checked
from petl.data.validation import Row
from petl.errors import InputError
from petl.system.files.paths import path_of
from petl.system.imports.extras import optional
from petl.system.values import field, integer, one_of

QUESTIONS = {"group": "What kind of thing is this?", "caption": "What is this?"}


@dataclass(kw_only=True)
class Stamps(TextSource):
    """Pictures of things, about which a question is asked: their group, or their caption."""

    serves: ClassVar[tuple[str, ...]] = ("image_text",)

    task: str = "image_text"
    path: str = "/usr/share/tuxpaint/stamps"  # or a folder that `dpkg -x` wrote
    asks: str = field("group", one_of(*QUESTIONS))
    # maximum new tokens when answers of test rows are generated and scored
    generate: int | None = field(None, integer(1))

    def read(self) -> RawData:
        """List and hash the pictures; columns `messages`, `images` and `sha256`."""
        optional("PIL", "image")
        path = path_of("data.path", self.path)
        root = path / "usr/share/tuxpaint/stamps"  # where `dpkg -x` unpacks the files
        root = root if root.is_dir() else path
        # sorted by the parts of the path: the same order on all systems
        files = sorted(root.rglob("*.png"), key=lambda file: file.relative_to(root).parts)
        # a mirrored or further picture of a stamp has no caption of its own
        rows = [self.row(file, root) for file in files if file.with_suffix(".txt").is_file()]
        if not rows:
            raise InputError(
                f"data.path={self.path} has no stamps; run: apt-get download "
                "tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps, and set "
                "data.path=stamps"
            )
        train, test = (Dataset.from_list(part) for part in train_test_split(rows, self))
        task = ImageText(max_length=self.max_length, generate=self.generate)
        return RawData(task, train, test, name=self.name)

    def row(self, file: Path, root: Path) -> Row:
        """The conversation about one stamp."""
        name = file.relative_to(root)
        # the first line is English, the others are its translations
        caption = file.with_suffix(".txt").read_text("utf-8").partition("\n")[0].strip()
        answer = {"group": name.parts[0], "caption": caption}[self.asks]
        question: Message = {"role": "user", "content": ""}
        parts = [{"type": IMAGE, "name": str(name)}, {"type": "text", "text": QUESTIONS[self.asks]}]
        messages = [with_parts(question, parts), {"role": "assistant", "content": answer}]
        return {
            "messages": messages,
            "images": [str(file.resolve())],
            "sha256": [checked(str(file))],
        }
