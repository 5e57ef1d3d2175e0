"""Texts for claims about language models, as files: definitions of verbs."""

from collections.abc import Iterable
from pathlib import Path

from petl.data.base import read_data
from petl.data.bundled import WORDNET_CLASSES
from petl.generation.prediction.tables import as_line
from petl.system.files.disk import write_atomic
from petl.training.compose import compose

TRAIN_ROWS, TEST_ROWS = 4000, 1000
LONGEST = 64  # tokens of a row, of all of these texts


def write_verbs(folder: Path) -> None:
    """Write verbs-train and verbs-test as JSON lines: definitions of verbs with their classes."""
    limits = [f"data.train_rows={TRAIN_ROWS}", f"data.test_rows={TEST_ROWS}"]
    verbs = read_data(compose(["data=wordnet", *limits]).data)
    for part, rows in (("train", verbs.train), ("test", verbs.test)):
        texts = (f"{row['text']} ({WORDNET_CLASSES[row['label']]})" for row in rows)
        write_lines(folder / f"verbs-{part}.jsonl", texts)


def write_lines(file: Path, texts: Iterable[str]) -> None:
    """Write texts as JSON lines."""
    write_atomic(file, "".join(f"{as_line({'text': text})}\n" for text in texts))
