"""Test rows that are training rows: exactly, or but for case, space and punctuation."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from petl.data.tasks.base import Task

WORDS = re.compile(r"\w+")
CONTENT = ("sha256", "pixels")  # columns of images and sounds, whose paths may differ


@dataclass(frozen=True)
class Overlap:
    """How many of the test `rows` have the input of a training row.

    Attributes:
        exact: exactly.
        alike: further ones that differ in case, space or punctuation alone.
    """

    rows: int
    exact: int
    alike: int

    @classmethod
    def of(cls, task: "Task", train: "Dataset", test: "Dataset") -> "Overlap | None":
        """Compare raw rows; None if their columns name no input."""
        columns = input_columns(task, train.column_names)
        if not columns or not {*columns} <= {*test.column_names}:
            return None
        train, test = train.select_columns(columns), test.select_columns(columns)
        return cls.of_texts(map(input_text, train), map(input_text, test))

    @classmethod
    def of_texts(cls, train: Iterable[str], test: Iterable[str]) -> "Overlap":
        """Compare the inputs of rows."""
        # hashes: the texts of all rows at once may fill the memory
        known, near = set(), set()
        for text in train:
            known.add(hash(text))
            near.add(hash(normalized(text)))
        rows = exact = alike = 0
        for text in test:
            rows += 1
            if hash(text) in known:
                exact += 1
            elif hash(normalized(text)) in near:
                alike += 1
        return cls(rows, exact, alike)

    @property
    def is_most(self) -> bool:
        """True if more than half of the test rows are training rows."""
        return 2 * (self.exact + self.alike) > self.rows

    def __str__(self) -> str:
        near = f", {self.alike} of them but for case, space and punctuation" if self.alike else ""
        return f"{self.exact + self.alike} of {self.rows} test rows occur in training{near}"


def input_columns(task: "Task", names: Iterable[str]) -> list[str]:
    """The columns of raw rows that are their input; empty if they are unknown."""
    found = [name for name in names if name in task.shown or name in CONTENT]
    return [name for name in found if name != "path"] or found


def input_text(row: Mapping[str, object]) -> str:
    """The input of a row as one text; other values than texts as JSON."""
    values = (v if isinstance(v, str) else json.dumps(v, default=str) for v in row.values())
    return "\x1f".join(values)


def normalized(text: str) -> str:
    """The words of a text in lower case; the text itself if it has none."""
    return " ".join(WORDS.findall(text.casefold())) or text
