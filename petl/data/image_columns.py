"""The columns of conversations with images, and the images that they name, checked."""

import base64
import logging
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar

from petl.data.answer_columns import AnswerColumns
from petl.data.conversations import IMAGE, Part, parts_of, with_parts
from petl.data.downloads import downloaded
from petl.data.formats import Format, recognized
from petl.data.task_columns import AnySourceRows, ColumnSettings
from petl.data.tasks import Message, later
from petl.data.validation import FOLDER, Row, require
from petl.errors import InputError, shown
from petl.system.files.paths import path_of, why_impossible

if TYPE_CHECKING:
    from petl.data.tasks.base import Task

MARK = "<image>"  # LLaVA's, in a text
USUAL = ("image", "images")
MAX_BYTES = 2**26  # of a download, as of a file
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
IMAGES = "petl.data.tasks.image_text.images"  # imported where there are images to read


logger = logging.getLogger(__name__)


class ImageTextColumns(AnswerColumns):
    """Conversations with images, which parts of their turns name, or a column of each row."""

    reads_images = True
    own_settings: ClassVar[tuple[str, ...]] = (
        *("messages", "role", "content", "roles", "prompt", "answer", "format", "system"),
        "generate",
        *("image", "image_folder", "image_urls"),
    )

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.columns = USUAL if settings.image is None else (settings.image,)
        self.formats = tuple(
            replace(each, optional=(*each.optional, *self.columns)) for each in self.formats
        )
        if self.named:
            (self.named,) = self.formats
        self.digests: dict[str, str] = {}  # of files, which rows may share
        if any(each.convert is None or each.refusal for each in self.formats):
            raise InputError(
                f"data.format={settings.format} is not for data.task=image_text: "
                f"{', '.join(each.name for each in _conversations())}"
            )
        if settings.image_folder is not None:
            folder = path_of("data.image_folder", settings.image_folder)
            if not folder.is_dir():
                raise InputError(f"data.image_folder={settings.image_folder} is not a directory")

    def usual_format(self) -> Format:
        """Conversations in the column messages."""
        return _conversations()[0]

    def recognized(self) -> tuple[Format, ...]:
        """The formats of conversations."""
        return _conversations()[1:]

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns of the format, those of images, and the folder of the file."""
        names = list(present)
        if self.settings.image is not None:
            require([self.settings.image], names, origin)
        return [*super().choose(names, origin), FOLDER]

    def announce(self, chosen: Format, names: Collection[str], origin: str) -> None:
        """Also warn of a pair of texts without a column of images; turns have parts for them."""
        super().announce(chosen, names, origin)
        if self.labeled and chosen.learned and {*self.columns}.isdisjoint(names):
            logger.warning(
                "%s has no column %s, so no image; data.image names another one: %s",
                origin,
                " or ".join(self.columns),
                ", ".join(sorted({*names} - {FOLDER})),
            )

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build a task on images and text."""
        self.look(rows)
        return later(
            "image_text", max_length=self.settings.max_length, generate=self.settings.generate
        )

    def convert(self, row: Row) -> Row:
        """Columns `messages`, `images` (paths and data URLs) and `sha256` of their content."""
        folder = Path(row.get(FOLDER) or ".")
        row = {name: value for name, value in row.items() if name != FOLDER}
        chosen = self.format_of(tuple(row))
        assert chosen is not None, "choose() has refused rows without a format"
        assert chosen.convert is not None, "plain texts are refused"
        given = [source for name in self.columns for source in sources_in(row.get(name), name)]
        messages = self.messages(row, chosen.convert)
        # a question with its answer has no place for images but before it
        placed, sources = place(messages, given, before=bool(chosen.learned))
        images = [self.located(source, folder) for source in sources]
        return {
            "messages": placed,
            "images": images,
            "sha256": [self.digest(image) for image in images],
        }

    def located(self, source: str, folder: Path) -> str:
        """The path of an image inside the folder of its file, or of `data.image_folder`.

        Raises:
            ValueError: there is no such file, or it is elsewhere.
        """
        if source[:5].lower() == "data:":
            return source
        if URL.match(source):
            return str(downloaded(source, self.settings.image_urls or (), MAX_BYTES))
        reason = why_impossible(source)
        if reason:
            raise ValueError(f"has the image {shown(source)}, which is not a path: {reason}")
        root = folder if self.settings.image_folder is None else Path(self.settings.image_folder)
        root = root.expanduser().resolve()
        path = (root / source).resolve()  # follows links, wherever they lead
        if not path.is_relative_to(root):
            raise ValueError(
                f"has the image {shown(source)}, which is outside of {root}: put it there, or set "
                "data.image_folder to a folder that contains all images"
            )
        if not path.is_file():
            reason = "is not a regular file" if path.exists() else "does not exist"
            raise ValueError(f"has the image {shown(source)}: {path} {reason}")
        return str(path)

    def digest(self, image: str) -> str:
        """The SHA-256 of an image, which can be read as far as its header shows."""
        if image not in self.digests:
            try:
                self.digests[image] = resolve_name(f"{IMAGES}:checked")(image)
            except ValueError as error:
                raise ValueError(f"has an image that cannot be used: {error}") from error
        return self.digests[image]


def _conversations() -> tuple[Format, ...]:
    return tuple(each for each in recognized() if not each.refusal)


def sources_in(value: object, column: str) -> list[str]:
    """The images in a column: one or a list; paths, data URLs, or `datasets`' bytes with a path."""
    if value is None:
        return []
    sources = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, Mapping) and isinstance(each.get("bytes"), bytes):
            sources.append(f"data:;base64,{base64.b64encode(each['bytes']).decode()}")
        elif isinstance(each, Mapping) and isinstance(each.get("path"), str):
            sources.append(each["path"])
        elif isinstance(each, str) and each:
            sources.append(each)
        else:
            raise ValueError(f"{column} has {shown(each)}, not the path or data URL of an image")
    return sources


def place(
    messages: list[Message], given: list[str], *, before: bool
) -> tuple[list[Message], list[str]]:
    """Put the images of a row where its turns mark them.

    Args:
        given: images in a column, which parts without source and `<image>` in texts stand for.
        before: images that no turn marks are at the beginning of the first question.

    Returns:
        The messages, whose parts have the names of images, and the images in their order.

    Raises:
        ValueError: there are more marks than images, or fewer.
    """
    waiting, sources, placed = deque(given), [], []
    if before and given and not any(_marks(message) for message in messages):
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        parts: list[Part] = [{"type": IMAGE} for _ in given]
        messages = [*messages]
        messages[first] = with_parts(messages[first], [*parts, *parts_of(messages[first])])
    for message in messages:
        parts = []
        for part in _split(message) if given else parts_of(message):
            if part["type"] == IMAGE:
                source = part.get("source") or (waiting.popleft() if waiting else None)
                if source is None:
                    raise ValueError(f"has {len(given)} images, but its turns mark more of them")
                sources.append(source)
                part = {"type": IMAGE, "name": shown(source)[1:-1]}
            parts.append(part)
        has_image = any(part["type"] == IMAGE for part in parts)
        placed.append(with_parts(message, parts) if has_image else message)
    if waiting:
        raise ValueError(
            f"has {len(given)} images, but its turns mark {len(given) - len(waiting)} of them "
            f"(by {MARK}, or by parts of type image)"
        )
    return placed, sources


def _split(message: Message) -> list[Part]:
    """The parts of a message, with an image at each mark, and without the line break beside it."""
    parts: list[Part] = []
    for part in parts_of(message):
        if part["type"] == IMAGE or MARK not in part["text"]:
            parts.append(part)
            continue
        first, *others = part["text"].split(MARK)
        parts.append({"type": "text", "text": first.removesuffix("\n")})
        for text in others:
            parts += [{"type": IMAGE}, {"type": "text", "text": text.removeprefix("\n")}]
    return [part for part in parts if part["type"] == IMAGE or part["text"]]


def _marks(message: Message) -> bool:
    return any(part["type"] == IMAGE for part in _split(message))
