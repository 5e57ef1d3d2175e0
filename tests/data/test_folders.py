"""Image and audio folders, digits, and Asterisk prompts."""

import re

import numpy as np
import pytest
from media_fixtures import write_tone
from scipy.io import wavfile
from sklearn.datasets import load_digits

from petl.data.base import read_data
from petl.errors import InputError

pytest_plugins = ["media_fixtures", "training_fixtures"]

IMAGES = {"name": "images", "source": "image_folder", "task": "image_classification"}
SOUNDS = {"name": "sounds", "source": "audio_folder", "task": "audio_classification"}
SPEECH = {"name": "speech", "source": "speech", "task": "audio_classification"}
DIGITS = {"name": "digits", "source": "digits", "task": "image_classification"}


def names(split):
    return ["/".join(path.split("/")[-2:]) for path in split["path"]]


def test_each_subfolder_is_a_class(pictures):
    data = read_data({**IMAGES, "train": str(pictures), "test": str(pictures)})
    assert data.task.labels == ["blue", "red"]
    rows = sorted(zip(names(data.train), data.train["label"], strict=True))
    assert rows == [(f"{c}/{i}.png", n) for n, c in enumerate(["blue", "red"]) for i in range(3)]
    assert len(set(data.train["sha256"])) == 6


def test_without_a_test_folder_some_rows_are_held_out(sounds):
    data = read_data({**SOUNDS, "train": str(sounds), "test_share": 0.3, "max_seconds": 2.5})
    assert len(data.test) == 2
    assert sorted([*names(data.train), *names(data.test)]) == [
        f"{c}/{i}.wav" for c in ("high", "low") for i in range(3)
    ]
    assert data.task.max_seconds == 2.5
    again = read_data({**SOUNDS, "train": str(sounds), "test_share": 0.3})
    assert names(again.test) == names(data.test)
    fewer = read_data({**SOUNDS, "train": str(sounds), "test_share": 0.3, "train_rows": 1})
    assert names(fewer.test) == names(data.test)
    assert len(fewer.train) == 1


def test_files_may_be_nested_and_other_types_are_skipped(tmp_path, petl_log):
    for name in ("a", "b"):
        write_tone(tmp_path / name / "deep" / "down" / "x.WAV", 300)
        (tmp_path / name / ".hidden.wav").write_text("")
        (tmp_path / name / "notes.txt").write_text("")
    data = read_data({**SOUNDS, "train": str(tmp_path), "test_share": 0.5})
    assert len(data.train) + len(data.test) == 2
    assert "skipping 2 files of other types" in petl_log.text


def test_files_beside_the_classes_are_said_or_refused_if_most(tmp_path, petl_log):
    for name in ("a/x", "a/y", "b/x", "b/y", "z1", "z2"):
        write_tone(tmp_path / f"{name}.wav", 300)
    data = read_data({**SOUNDS, "train": str(tmp_path), "test_share": 0.5})
    assert len(data.train) + len(data.test) == 4
    assert "skipping 2 files beside the subfolders, such as z1.wav" in petl_log.text
    for name in ("z3", "z4", "z5"):
        write_tone(tmp_path / f"{name}.wav", 300)
    with pytest.raises(InputError):
        read_data({**SOUNDS, "train": str(tmp_path)})


def test_numeric_classes_are_sorted_by_value(tmp_path):
    for name in ("10", "9"):
        write_tone(tmp_path / name / "x.wav", 300)
    assert read_data({**SOUNDS, "train": str(tmp_path)}).task.labels == ["9", "10"]


def test_digits_are_scikit_learns(tmp_path):
    data = read_data({**DIGITS, "test_rows": 360})
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.task.labels == list("0123456789")
    ours = sorted(
        (np.ravel(r["pixels"]).tolist(), r["label"]) for s in (data.train, data.test) for r in s
    )
    plain = load_digits()
    theirs = sorted(
        (np.rint(x * 255 / 16).tolist(), int(y))
        for x, y in zip(plain.data, plain.target, strict=True)
    )
    assert ours == theirs
    assert (
        read_data({**DIGITS, "test_rows": 360, "train_rows": 9}).test["label"] == data.test["label"]
    )


@pytest.fixture
def prompts(tmp_path):
    """A tree like that of Debian's packages: one voice per language, and files without speech."""
    root = tmp_path / "usr/share/asterisk/sounds"
    for voice in ("en_US_f_Somebody", "ru_RU_f_Somebody"):
        for i in range(5):
            write_tone(root / voice / "digits" / f"{i}.wav", 200 + i)
        write_tone(root / voice / "silence" / "1.wav", 0)
        wavfile.write(root / voice / "empty.wav", 8000, np.zeros(0, np.int16))
    return tmp_path


@pytest.mark.parametrize("below", ["", "usr/share/asterisk/sounds"])
def test_prompts_with_speech_are_read_by_language(prompts, below):
    settings = {**SPEECH, "path": str(prompts / below), "languages": ["ru", "en"], "test_rows": 3}
    data = read_data(settings)
    assert data.task.labels == ["en", "ru"]
    assert (len(data.train), len(data.test)) == (7, 3)
    rows = [*zip(data.train["path"], data.train["label"], strict=True)]
    rows += zip(data.test["path"], data.test["label"], strict=True)
    assert all(re.search(r"/digits/\d\.wav$", path) for path, _ in rows)
    assert all(("ru_RU" in path) == (label == 1) for path, label in rows)
    assert len(set(rows)) == 10
