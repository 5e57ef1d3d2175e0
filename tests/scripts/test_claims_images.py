"""The claim on merged tokens: its files, its pretrained ViT, and a trial with few images."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
from claims import fashion, page, running
from claims.catalog import CLAIMS, WORDS
from claims_fixtures import TEST_IMAGES, TRAIN_IMAGES
from PIL import Image
from transformers import AutoModelForImageClassification

from petl.errors import InputError

pytest_plugins = ["training_fixtures", "claims_fixtures"]

MERGING, WORDS_OF = CLAIMS["pyra"], WORDS["pyra"]


def test_train_images_are_not_those_of_the_pretrained_model(images_package, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        fashion, "write_model", lambda folder, settings, task, rows, epochs: seen.update(rows=rows)
    )
    fashion.write_images(tmp_path / "data")
    pixels, labels = fashion.read("train")
    files = sorted((tmp_path / "data/train").rglob("*.png"))
    assert len(files) == 40
    for file in files:
        i = int(file.stem)
        assert file.parent.name == str(labels[i])
        assert np.array_equal(np.asarray(Image.open(file)), pixels[i])
    assert len([*(tmp_path / "data/test").rglob("*.png")]) == TEST_IMAGES
    trained_on = {pixels[int(file.stem)].tobytes() for file in files}
    assert len(seen["rows"]) == 8
    for row in seen["rows"]:
        image = np.array(row["pixels"], np.uint8)
        assert image.tobytes() not in trained_on
        (i,) = [k for k in range(TRAIN_IMAGES) if np.array_equal(pixels[k], image)]
        assert row["label"] == labels[i] < 5


@pytest.mark.thorough
def test_the_claim_is_tried_from_pretraining_to_verdicts(images_package, tmp_path, made):
    short = ("train.epochs=null", "train.steps=2", "train.batch_size=4")
    setting = replace(MERGING.setting, rates=(1e-3,), seeds=(0, 1))
    setting = replace(setting, overrides=(*setting.overrides, *short))
    claim = replace(MERGING, setting=setting)
    found = running.try_claim(claim, tmp_path, "the command")
    assert len(made) == 8  # two seeds of four contenders
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "fashion/data/vit")
    assert model.config.num_labels == 5
    assert model.config.num_hidden_layers == 12
    assert model.vit.embeddings.position_embeddings.shape[1] == 197
    width, removed = 96, 197 - 5  # tokens that are left after the published schedule
    more = (
        found.contenders[WORDS_OF["pyra"]].parameters
        - found.contenders[WORDS_OF["lora"]].parameters
    )
    assert more == removed + 12 * 3 * width
    assert (
        found.contenders[WORDS_OF["merged"]].parameters
        == found.contenders[WORDS_OF["lora"]].parameters
    )
    assert all(map(found.is_complete, claim.statements))
    assert "not tried" not in "".join(row[1] for row in page.summary(claim, found).rows)
    made.clear()
    assert running.try_claim(claim, tmp_path, "the command") == found
    assert made == []


def test_missing_and_damaged_images_are_refused(images_package, tmp_path, monkeypatch):
    file = images_package / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(InputError, match="has 19 values, not 20"):
        fashion.read("t10k")
    monkeypatch.setenv(fashion.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InputError, match="has no Fashion-MNIST; run: apt-get install dataset"):
        fashion.folder_of_images()
    assert not fashion.is_installed()
