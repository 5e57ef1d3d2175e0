"""Test rows that are training rows: exactly, but for case, space and punctuation, or nearly."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from petl.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from petl.data.tasks.base import Task

ROLE = "role"  # of texts that are queries and documents
# between or before numbers these are no punctuation: 12 - 7 is not 12 / 7, and -5 is not 5
OPERATORS = re.compile(r"[-*/](?=\s*\d)")
SIGNS = {"-": "\u2212", "*": "\u00d7", "/": "\u00f7"}  # which are symbols
PERMUTATIONS, SHINGLE = 128, 3  # of MinHash; words of a shingle
AT_ONCE = 1000  # rows that are read together: alone each takes 40 microseconds
RECALL = (0.1, 0.9)  # weights of candidates that are not similar, and of misses
CONTENT = ("sha256", "pixels")  # columns of images and sounds, whose paths may differ


@dataclass(frozen=True)
class Overlap:
    """How many of the test `rows` have the input of a training row.

    Attributes:
        exact: exactly.
        alike: further ones that differ in case, space or punctuation alone.
        near: further ones that are similar (`data.near_duplicates`); None: not looked for.
    """

    rows: int
    exact: int
    alike: int
    near: int | None = None

    @property
    def found(self) -> int:
        """Test rows that are training rows, of each kind."""
        return self.exact + self.alike + (self.near or 0)

    @property
    def is_most(self) -> bool:
        """True if more than half of the test rows are training rows."""
        return 2 * self.found > self.rows

    def entry(self) -> dict[str, int]:
        """The entry of scores.json."""
        return {name: count for name, count in vars(self).items() if count is not None}

    def __str__(self) -> str:
        other = f", {self.alike} of them but for case, space and punctuation" if self.alike else ""
        other += f", {self.near} of them nearly" if self.near else ""
        return f"{self.found} of {self.rows} test rows occur in training{other}"


class TrainingInputs:
    """The inputs of training rows, as hashes: the texts of all rows at once may fill the memory.

    Args:
        texts: one a row.
        similarity: from which on a text is nearly one of them, in (0, 1): the Jaccard index of
            their sets of three words in a row, estimated by MinHash; None: none is.
        columns: of raw rows that are their input.
    """

    def __init__(
        self, texts: Iterable[str], similarity: float | None = None, columns: Sequence[str] = ()
    ) -> None:
        self.columns = columns
        self._exact, self._alike = set[int](), set[int]()
        self._near = None if similarity is None else NearTexts(similarity)
        for text in texts:
            self._exact.add(hash(text))
            words = normalized(text)
            # equal texts have one sketch
            if self._near is not None and hash(words) not in self._alike:
                self._near.add(words)
            self._alike.add(hash(words))

    @classmethod
    def of(
        cls, task: "Task", train: "Dataset", similarity: float | None = None
    ) -> "TrainingInputs | None":
        """Read the inputs of raw rows; None if their columns name none."""
        columns = input_columns(task, train.column_names)
        return cls(input_texts(train, columns), similarity, columns) if columns else None

    def __contains__(self, text: str) -> bool:
        return hash(normalized(text)) in self._alike

    def overlap(self, test: "Dataset") -> Overlap | None:
        """Compare raw test rows; None if they lack a column of the training rows.

        Of rows that are queries and documents to rank, the queries.
        """
        if ROLE in test.column_names:
            from petl.data.judgements import QUERY  # for rows to rank alone

            # documents are those of training too
            is_query = [role == QUERY for role in test[ROLE]]
            return self.compare(compress(test["text"], is_query))
        if not {*self.columns} <= {*test.column_names}:
            return None
        return self.compare(input_texts(test, self.columns))

    def compare(self, texts: Iterable[str]) -> Overlap:
        """Compare the inputs of test rows."""
        rows = exact = alike = near = 0
        for text in texts:
            rows += 1
            words = normalized(text)
            if hash(text) in self._exact:
                exact += 1
            elif hash(words) in self._alike:
                alike += 1
            elif self._near is not None and words in self._near:
                near += 1
        return Overlap(rows, exact, alike, None if self._near is None else near)


class NearTexts:
    """Texts of which one that is similar is found, by the package datasketch.

    Raises:
        InputError: the package is missing.
    """

    def __init__(self, similarity: float) -> None:
        try:
            self._package: Any = import_module("datasketch")
        except ImportError as error:
            raise InputError(
                f"data.near_duplicates={similarity:g} needs the package datasketch: pip install "
                "'petl[near]', or leave it null"
            ) from error
        self._similarity, self._sketches = similarity, list[Any]()
        self._index = self._package.MinHashLSH(
            threshold=similarity, num_perm=PERMUTATIONS, weights=RECALL
        )

    def add(self, words: str) -> None:
        """Add a text, as `normalized` returns it."""
        sketch = self._sketch(words)
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)

    def __contains__(self, words: str) -> bool:
        sketch = self._sketch(words)
        # the index gives candidates, some of which are not similar
        return any(
            sketch.jaccard(self._sketches[number]) >= self._similarity
            for number in self._index.query(sketch)
        )

    def _sketch(self, words: str) -> Any:
        each = words.split()
        # a text of fewer words is a shingle itself
        parts = zip(*(each[i:] for i in range(SHINGLE)), strict=False)
        shingles = {" ".join(part) for part in parts} or {words}
        sketch = self._package.MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        return sketch


class Shows(Protocol):
    """What a task says of its rows: the columns that are their input."""

    shown: ClassVar[tuple[str, ...]]


def input_columns(task: Shows | type[Shows], names: Iterable[str]) -> list[str]:
    """The columns of raw rows that are their input; empty if they are unknown."""
    # `given`: columns for the reward of an answer
    found = [n for n in names if (n in task.shown or n in CONTENT) and n != "given"]
    return [name for name in found if name != "path"] or found


def question_text(task: Shows, row: Mapping[str, Any]) -> str:
    """The input of a raw row, of conversations and preferences without the answer."""
    # other answers to it are no other input
    names = ["prompt"] if "prompt" in row else input_columns(task, row)
    asked = {name: row[name] for name in names}
    if "messages" in asked:
        from petl.data.conversations import without_last_answer  # other rows do not need it

        asked["messages"] = without_last_answer(asked["messages"])
    return normalized(input_text(asked))


def beginnings(texts: Sequence[str]) -> list[str]:
    """Of each text the shortest of them with which it begins, by whole words."""
    # a text stands right before those that begin with it: a space is before any letter
    found, first = {}, None
    for text in sorted({*texts}):
        first = first if first and f"{text} ".startswith(f"{first} ") else text
        found[text] = first
    return [found[text] for text in texts]


def input_texts(rows: "Dataset", columns: Sequence[str]) -> Iterator[str]:
    """Yield the inputs of raw rows; many are read at a time, since each alone takes longer."""
    for part in rows.select_columns([*columns]).iter(AT_ONCE):
        each = zip(*(part[name] for name in columns), strict=True)
        yield from (input_text(dict(zip(columns, values, strict=True))) for values in each)


def input_text(row: Mapping[str, object]) -> str:
    """The input of a row as one text; other values than texts as JSON."""
    values = (v if isinstance(v, str) else json.dumps(v, default=str) for v in row.values())
    return "\x1f".join(values)


class _Kept(dict[int, str]):
    """What each character of a text becomes, by its code: computed once each."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        # letters with their marks, numbers, symbols; identifiers have underscores
        match unicodedata.category(letter)[0]:
            case "L" | "M" | "N":
                self[code] = letter
            case "S":
                self[code] = f" {letter} "
            case _:
                self[code] = "_" if letter == "_" else " "
        return self[code]


KEPT = _Kept()


def normalized(text: str) -> str:
    """The words and symbols of a text in lower case; the text itself if it has none.

    Characters that are one in Unicode are one: letters may be composed with their marks or not.
    """
    # caseless matching of canonically equal texts (The Unicode Standard, section 3.13)
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    signs = OPERATORS.sub(lambda found: SIGNS[found[0]], folded)
    return " ".join(signs.translate(KEPT).split()) or text
