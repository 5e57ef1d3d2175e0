"""Fashion-MNIST as files, and ViTs that are pretrained on five of its ten classes.

The images, 28 x 28 gray levels, are in the Debian package dataset-fashion-mnist (Xiao et al. 2017,
arXiv:1708.07747). A position in the package's train images belongs to one part only: those that the
ViTs are pretrained on are not among the rows of `petl train`.
"""

import gzip
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pretrain_digits import write_model

from petl.data.base import shuffled
from petl.data.tasks.media import ImageClassification
from petl.errors import InputError
from petl.system.imports.extras import optional
from petl.training.compose import compose
from petl.training.runs.run_config import read_config

PLACE, VARIABLE = "/usr/share/datasets/fashion-mnist", "FASHION_MNIST"
CLASSES, KNOWN = 10, 5  # of the images; those that the ViT is pretrained on are below KNOWN
TRAIN_ROWS, TEST_ROWS, PRETRAIN_ROWS = 1600, 10_000, 8000
EPOCHS = 4  # of pretraining
SEED = 13  # of the shuffle of the train images
# 197 tokens in 12 blocks, as in the ViT-B that the published schedules are for
MODELS = {"vit": ("model.settings.num_hidden_layers=12", "model.settings.patch_size=2")}


def folder_of_images() -> Path:
    """Return the folder of the package's files: $FASHION_MNIST, or where Debian puts them.

    Raises:
        InputError: it does not have them.
    """
    folder = Path(os.environ.get(VARIABLE, PLACE))
    if not (folder / "t10k-images-idx3-ubyte.gz").is_file():
        raise InputError(
            f"{folder} has no Fashion-MNIST; run: apt-get install dataset-fashion-mnist; or: "
            "apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR && "
            f"export {VARIABLE}=DIR{PLACE}"
        )
    return folder


def is_installed() -> bool:
    """Return True if the images are there."""
    try:
        folder_of_images()
    except InputError:
        return False
    return True


def write_images(folder: Path, models: Mapping[str, Sequence[str]] = MODELS) -> None:
    """Write train/CLASS and test/CLASS with image files, and NAME with each pretrained model.

    Args:
        models: by name, settings of a ViT; all of them begin with the same random numbers, and see
            the same images in the same order.

    Raises:
        InputError: the package or Pillow is missing.
    """
    pixels, labels = read("train")
    order = shuffled(len(labels), SEED)
    write_files(folder / "train", pixels, labels, order[:TRAIN_ROWS])
    test, own = read("t10k")
    write_files(folder / "test", test, own, range(min(TEST_ROWS, len(own))))
    known = [i for i in order[TRAIN_ROWS:] if labels[i] < KNOWN][:PRETRAIN_ROWS]
    rows = [{"pixels": pixels[i].tolist(), "label": int(labels[i])} for i in known]
    task = ImageClassification(classes=[str(name) for name in range(KNOWN)])
    common = ("+method=lora", "data=digits", "model=vit_random", "model.settings.image_size=28")
    for name, words in models.items():
        settings = read_config(compose([*common, *words])).resolved["model"]
        write_model(folder / name, settings, task, rows, EPOCHS)


def read(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images [N, 28, 28] and classes [N] of "train" or "t10k"."""
    folder = folder_of_images()
    images = idx(folder / f"{part}-images-idx3-ubyte.gz")
    return images, idx(folder / f"{part}-labels-idx1-ubyte.gz")


def idx(file: Path) -> np.ndarray:
    """Return the bytes in a compressed file of the IDX format as an array.

    Raises:
        InputError: it has not as many as its header says.
    """
    content = gzip.decompress(file.read_bytes())
    rank = content[3]
    shape = np.frombuffer(content[4 : 4 + 4 * rank], ">i4")
    values = np.frombuffer(content[4 + 4 * rank :], np.uint8)
    if len(values) != np.prod(shape):
        raise InputError(f"{file} has {len(values)} values, not {'x'.join(map(str, shape))}")
    return values.reshape(shape)


def write_files(
    folder: Path, pixels: np.ndarray, labels: np.ndarray, chosen: Iterable[int]
) -> None:
    """Write images as FOLDER/CLASS/NUMBER.png."""
    image = optional("PIL.Image", "image")
    for name in range(CLASSES):
        (folder / str(name)).mkdir(parents=True)
    for i in chosen:
        image.fromarray(pixels[i]).save(folder / str(labels[i]) / f"{i:05}.png")
