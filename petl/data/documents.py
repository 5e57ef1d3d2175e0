"""Folders of texts, `SUFFIXES`: their passages, to search, and pairs of a query and a passage."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from petl.data.base import RawData
from petl.data.delimited import lines_of
from petl.data.retrieval_sets import Pair, PairSource
from petl.errors import InputError
from petl.system.files.paths import path_of

MARKDOWN = (".md", ".markdown")
SUFFIXES = (*MARKDOWN, ".txt")
LONGEST = 800  # characters of a passage: about 200 tokens of English; assumption: one thought
FEWEST = 10  # pairs, of which a fifth is to score
HEADING = re.compile(r" {0,3}(#{1,6})\s+(.+)")
UNDERLINE = re.compile(r" {0,3}(=+|-+)\s*")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
SENTENCE_END = re.compile("(?<=[.!?])\\s+|(?<=[\u3002\uff01\uff1f])")


class Passage(NamedTuple):
    """A part of a text.

    Attributes:
        place: file and line, such as "notes/tea.md:12".
        heading: those above it, from the outermost; "" without one.
        is_first: it stands directly below its heading.
    """

    place: str
    heading: str
    text: str
    is_first: bool

    @property
    def searched(self) -> str:
        """The text below its heading."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text

    @property
    def pair(self) -> Pair | None:
        """The passage with its heading as the query, or else its rest with its first sentence.

        None if it has neither.
        """
        if self.heading and self.is_first:
            return Pair(self.heading, self.text)
        # as in the inverse cloze task: its first sentence stands for a question
        first, *others = sentences(self.text)
        rest = self.text[len(first) :].strip()
        return Pair(first, rest) if others and rest else None


class DocumentSection(NamedTuple):
    """What is below a heading, up to the next one: paragraphs with the line of each, from 1."""

    heading: str
    paragraphs: list[tuple[int, str]]


@dataclass(kw_only=True)
class Documents(PairSource):
    """The passages of the texts in a folder, with their headings or first sentences as queries."""

    path: str | None = None
    encoding: str | None = None  # of the texts; None: recognized
    max_length: int = 256

    def check(self) -> None:
        """Raise InputError unless the folder has texts."""
        if self.path is None:
            raise InputError(
                f"data.path is not given: the folder of texts, {', '.join(SUFFIXES)}, at any depth"
            )
        texts_in("data.path", self.path)

    def read(self) -> RawData:
        """Read the passages; columns `query` and `positive`, and those of test rows."""
        found = [*passages("data.path", str(self.path), self.encoding)]
        pairs = [passage.pair for passage in found]
        given = [pair for pair in pairs if pair is not None]
        if len({pair.positive for pair in given}) < FEWEST:
            raise InputError(
                f"data.path={self.path} has {len(given)} passages with a heading or several "
                f"sentences: at least {FEWEST} different ones are needed to train and to score"
            )
        alone = (p.text for p, pair in zip(found, pairs, strict=True) if pair is None)
        return self.split(given, alone)


def texts_in(setting: str, name: str) -> list[Path]:
    """The texts of a folder, at any depth, sorted, without hidden ones and links that lead out.

    Raises:
        InputError: there is none.
    """
    folder = path_of(setting, name)
    if not folder.is_dir():
        raise InputError(f"{setting}={name} is no folder")
    root = folder.resolve()
    found = [
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.resolve().is_relative_to(root)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(f"{setting}={name} has no file of the types {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def passages(setting: str, name: str, encoding: str | None = None) -> Iterator[Passage]:
    """Yield the passages of all texts in a folder.

    Raises:
        InputError: there is no text, or one cannot be read.
    """
    for file in texts_in(setting, name):
        with lines_of(file, "\n", encoding) as lines:
            kind = marked if file.suffix.lower() in MARKDOWN else plain
            for section in sections(kind(lines)):
                yield from parts_of(section, str(file))


def parts_of(section: DocumentSection, file: str) -> Iterator[Passage]:
    """Yield paragraphs of a section, joined and cut to at most `LONGEST` characters."""
    pieces = [(line, piece) for line, text in section.paragraphs for piece in cut(text)]
    # the line of the first piece is that of the passage
    start, joined, is_first = 0, "", True
    for line, piece in pieces:
        longer = f"{joined}\n\n{piece}" if joined else piece
        if joined and len(longer) > LONGEST:
            yield Passage(f"{file}:{start}", section.heading, joined, is_first)
            # what follows continues a thought, whose heading is no query for it
            joined, is_first, longer = "", False, piece
        start, joined = start if joined else line, longer
    if joined:
        yield Passage(f"{file}:{start}", section.heading, joined, is_first)


def cut(text: str) -> Iterator[str]:
    """Yield a text in parts of at most `LONGEST` characters, at ends of sentences if possible."""
    joined = ""
    for sentence in sentences(text) if len(text) > LONGEST else [text]:
        for piece in wrap(sentence, LONGEST) if len(sentence) > LONGEST else [sentence]:
            longer = f"{joined} {piece}" if joined else piece
            if joined and len(longer) > LONGEST:
                yield joined
                longer = piece
            joined = longer
    if joined:
        yield joined


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [part for part in SENTENCE_END.split(text) if part]


def sections(lines: Iterable[tuple[int, str, int]]) -> Iterator[DocumentSection]:
    """Yield the sections of lines, see `marked`; some have no paragraphs."""
    headings: list[str] = []  # by level
    section, own = DocumentSection("", []), list[tuple[int, str]]()
    for number, text, level in chain(lines, [(0, "", 0)]):
        if text and not level:
            own.append((number, text))
            continue
        if own:  # a blank line or a heading ends a paragraph
            section.paragraphs.append((own[0][0], "\n".join(line for _, line in own)))
            own = []
        if level:
            yield section
            headings[level - 1 :] = [""] * (level - 1 - len(headings)) + [text]
            section = DocumentSection(": ".join(filter(None, headings)), [])
    yield section


def plain(lines: Iterable[str]) -> Iterator[tuple[int, str, int]]:
    """Yield what `marked` does, of a text without headings."""
    return ((number, line.rstrip(), 0) for number, line in enumerate(lines, 1))


def marked(lines: Iterable[str]) -> Iterator[tuple[int, str, int]]:
    """Yield number and text of each line of Markdown, with the level of headings; else 0."""
    texts = [line.rstrip() for line in lines]
    # front matter, such as tags
    start = texts.index("---", 1) + 1 if texts[:1] == ["---"] and "---" in texts[1:] else 0
    fence, is_underline = "", False
    for number, (before, line, after) in enumerate(
        zip(["", *texts[start:]], texts[start:], [*texts[start + 1 :], ""], strict=False), start + 1
    ):
        mark, heading = FENCE.match(line), HEADING.fullmatch(line)
        if is_underline:
            is_underline = False
        elif fence:  # code, in which a # is no heading, and a blank line ends no paragraph
            fence = "" if line.strip().startswith(fence) else fence
            yield number, line or " ", 0
        elif mark:
            fence = mark[1]
            yield number, line, 0
        elif heading:
            text = heading[2].rstrip("#")  # it may be closed, behind a space
            yield number, text.rstrip() if text[-1:].isspace() else heading[2], len(heading[1])
        elif line and not before and (under := UNDERLINE.fullmatch(after)):
            is_underline = True
            yield number, line.strip(), 1 if "=" in under[1] else 2
        else:
            yield number, line, 0
