"""Data that come in packages: WordNet inside petl, a play and puzzles from packages of others."""

import gzip
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from petl.data.base import RawData, Source, cut, shuffled
from petl.tasks import Classification

# The lexicographer files of verbs in the order of their numbers, 29 to 43: lexnames(5WN).
WORDNET_CLASSES = [
    *("body", "change", "cognition", "communication", "competition"),
    *("consumption", "contact", "creation", "emotion", "motion"),
    *("perception", "possession", "social", "stative", "weather"),
]
WORDNET_FILE = Path(__file__).parent / "wordnet_verbs.tsv.gz"
WORDNET_NOTICE = Path(__file__).parent / "wordnet_license.txt"
WORDNET_TEST_START = 4000  # place in the shuffled order where the test rows begin


@dataclass
class WordNet(Source):
    """Verb definitions of WordNet 3.0 (Princeton University), by the field the verb belongs to.

    The test rows stand at a fixed place of the shuffled order, so that they stay the same
    whatever the number of training rows.
    """

    def read(self) -> RawData:
        with gzip.open(WORDNET_FILE, "rt", encoding="ascii") as lines:
            rows = [line.rstrip("\n").split("\t") for line in lines]
        order = shuffled(len(rows), self.seed)
        test = cut(order[WORDNET_TEST_START:], self.test_rows, "data.test_rows")
        rest = order[:WORDNET_TEST_START] + order[WORDNET_TEST_START + len(test) :]
        number = {label: i for i, label in enumerate(WORDNET_CLASSES)}

        def split(picked: list[int]) -> Dataset:
            labels, texts = zip(*(rows[i] for i in picked), strict=True)
            return Dataset.from_dict({"text": texts, "label": [number[label] for label in labels]})

        return RawData(
            task=Classification(classes=list(WORDNET_CLASSES), max_length=self.max_length),
            train=split(cut(rest, self.train_rows, "data.train_rows")),
            test=split(test),
            name=self.name,
        )
