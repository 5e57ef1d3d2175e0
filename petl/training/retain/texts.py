"""Retained texts: those that petl brings, those of files, and those of other data of petl."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from petl.data.base import Stream, as_dataset, data_source, read_data
from petl.data.overlap import TrainingInputs, normalized
from petl.data.validation import Row
from petl.errors import InputError, UnsupportedError, did_you_mean, shown
from petl.system.files.read import iterate_json_lines
from petl.training.retain.settings import RetainConfig

if TYPE_CHECKING:
    from petl.data.tasks.base import Task

BUNDLED = "bundled"
FILE = Path(__file__).with_name("texts.jsonl")
COLUMN = "text"
MOST = 100_000  # texts of other data that are read
WORDS = re.compile(r"\w+")
logger = logging.getLogger(__name__)
CHARACTERS = 4  # of a token, about: the length of passages of a text that other data pack


class BundledText(TypedDict):
    """A line of the bundled file."""

    kind: str
    text: str


def require_texts(value: object, setting: str) -> None:
    """Raise InputError if the texts that a setting names cannot be read; other data are not read.

    Args:
        value: "bundled", a file or several, or settings as of `data`.
    """
    if isinstance(value, Mapping):
        data_source(cast("Mapping[str, Any]", value)).check()
    elif value is not None:
        read_texts(value, setting)


def texts_of(value: object, setting: str, max_length: int) -> list[str]:
    """Return the texts that a setting names.

    Args:
        value: as of `require_texts`.
        max_length: tokens of a text, for passages of long ones.

    Raises:
        InputError: they cannot be read, or there is no text among them.
    """
    if isinstance(value, Mapping):
        return _of_data(cast("Mapping[str, Any]", value), setting, CHARACTERS * max_length)
    return read_texts(value, setting)


def _of_data(settings: Mapping[str, object], setting: str, length: int) -> list[str]:
    data = read_data(settings)
    rows = as_dataset(data, MOST)
    if COLUMN not in rows.column_names:
        raise InputError(
            f"{setting}: the data {data.name} have no column {COLUMN}, which retained texts need: "
            f"there are {', '.join(rows.column_names)}; a template of a chat is not put around them"
        )
    texts = cast("list[str]", list(rows.select(range(min(MOST, len(rows))))[COLUMN]))
    return [part for text in texts for part in passages(text, length)] if data.task.packs else texts


def passages(text: str, length: int) -> Iterator[str]:
    """Yield a text in parts of whole lines, each of about `length` characters or one line."""
    part = ""
    for line in text.splitlines(keepends=True):
        # a line that is longer is a part of its own
        if part and len(part) + len(line) > length:
            yield part
            part = ""
        part += line
    if part.strip():
        yield part


def halves(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Divide texts in two by a hash of their words, so that equal ones are on one side."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        # of the words, so that the same text in capitals is on the same side; without symbols, so
        # that what a finished run replayed is on the side where it was
        words = " ".join(WORDS.findall(normalized(text))) or text
        sides[sha256(words.encode()).digest()[0] & 1].append(text)
    return sides


def texts_for(names: Sequence[str], task: "Task", settings: Mapping[str, object]) -> list[str]:
    """Return the texts that a finished run is measured on: none that it has trained on or replayed.

    Args:
        names: of --retain, as the value of `read_texts`.
        settings: of the run; {} if the adapter is of no run.

    Raises:
        InputError: as `read_texts`.
        UnsupportedError: the run's task is not about texts.
    """
    if not task.reads_text:
        raise UnsupportedError(
            f"--retain measures texts, and a model for {task.name} reads none of them"
        )
    texts = read_texts([*names], "--retain")
    known = known_inputs(settings)
    kept = [text for text in texts if not any(text in each for each in known)]
    if len(kept) < len(texts):
        count = len(texts) - len(kept)
        logger.info("%d retained texts were trained on or replayed, and are left out", count)
    if not kept:
        raise InputError(
            f"--retain: all {len(texts)} texts were trained on or replayed: give others"
        )
    return kept


def known_inputs(settings: Mapping[str, object]) -> list[TrainingInputs]:
    """Return what a run with these settings has trained on and replayed, as far as it is there."""
    found: list[TrainingInputs] = []
    try:
        found.append(TrainingInputs(replayed_texts(settings.get("retain"))))
        if isinstance(settings.get("data"), Mapping):
            data = read_data(cast("Mapping[str, object]", settings["data"]))
            # rows of a stream are read only while they train
            if not isinstance(data.train, Stream):
                found += filter(None, [TrainingInputs.of(data.task, data.train)])
    except InputError as error:
        logger.warning(
            "retained texts are not compared with all that the run trained on: %s", error
        )
    return found


def replayed_texts(retain: object) -> list[str]:
    """Return the texts that a run with these settings under `retain` has replayed.

    Raises:
        InputError: they cannot be read.
    """
    own = retain if isinstance(retain, Mapping) else {}
    if not own.get("mix"):
        return []
    length = own.get("max_length") or RetainConfig().max_length
    if own.get("mix_data") is not None:
        return texts_of(own["mix_data"], "retain.mix_data of the run", length)
    return halves(texts_of(own.get("data"), "retain.data of the run", length))[1]


def read_texts(value: object, setting: str) -> list[str]:
    """Return the texts of files with a column `text`, or those that petl brings.

    The bundled texts are of ten kinds, in turn, so that the first ones of them are of all kinds.

    Args:
        value: a file in the formats of `petl.data.files` or several, or "bundled" alone.
        setting: that names them, for messages.

    Raises:
        InputError: a file cannot be read or has no column `text`, or a value is no text.
    """
    if value in (BUNDLED, [BUNDLED]):
        return [line["text"] for line in iterate_json_lines(FILE, BundledText)]
    files = import_module("petl.data.files")  # which reads the columns of all tasks
    located = files.located_rows(setting, files.file_names(setting, value), _choose)
    return [_text(row, where) for where, row in located]


def _choose(present: Iterable[str], origin: str) -> list[str]:
    columns = list(present)
    if COLUMN not in columns:
        raise InputError(
            f"{origin} has no column {COLUMN}{did_you_mean(COLUMN, columns)}: retained texts are "
            f"in a column of that name; there are {', '.join(columns)}"
        )
    return [COLUMN]


def _text(row: Row, where: str) -> str:
    value = row[COLUMN]
    if not isinstance(value, str):
        raise InputError(f"{where}: {COLUMN} is {shown(value)}, not text")
    return value
