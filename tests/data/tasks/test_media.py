"""Encoded images and audio clips of one shape."""

import hashlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from scipy.io import wavfile
from transformers import (
    ASTFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from petl.data.tasks.media import AudioClassification, ImageClassification
from petl.errors import InputError

AST = {"num_mel_bins": 16, "max_length": 40}
WHISPER = {"feature_size": 16, "chunk_length": 1}


def split(paths, labels=None):
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    rows = {"path": [str(p) for p in paths], "sha256": sums, "label": labels or [0] * len(paths)}
    return Dataset.from_dict(rows)


@pytest.fixture
def clips(tmp_path):
    """Two clips of noise, the second longer."""
    paths = [tmp_path / "short.wav", tmp_path / "long.wav"]
    for path, seconds in zip(paths, (0.1, 0.3), strict=True):
        samples = 0.1 * np.random.RandomState(0).standard_normal(round(seconds * 16000))
        wavfile.write(path, 16000, samples.astype(np.float32))
    return paths


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for i, path in enumerate(paths):
        pixels = np.random.RandomState(i).randint(0, 256, (6 + i, 9, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def batch(task, processor, rows):
    encoded = task.encode(processor, rows)
    return task.collate(processor)([encoded[i] for i in range(len(encoded))])


def test_images_are_the_output_of_the_processor(photos):
    task = ImageClassification(classes=["x", "y"])
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    made = batch(task, processor, split(photos, [1, 0]))
    expected = processor([Image.open(p) for p in photos], return_tensors="pt")["pixel_values"]
    assert made["pixel_values"].dtype == torch.float32
    assert torch.equal(made["pixel_values"], expected)
    assert made["labels"].tolist() == [1, 0]
    assert made["labels"].dtype == torch.int64


def test_images_may_be_given_as_pixels():
    task = ImageClassification(classes=["x", "y"])
    processor = ViTImageProcessorPil(size={"height": 2, "width": 2}, do_normalize=False)
    rows = Dataset.from_dict({"pixels": [[[0, 51], [102, 255]]], "label": [1]})
    found = batch(task, processor, rows)["pixel_values"]
    expected = torch.tensor([[0.0, 0.2], [0.4, 1.0]]).expand(1, 3, 2, 2)
    torch.testing.assert_close(found, expected)


def test_images_that_keep_different_sizes_are_refused(photos):
    task = ImageClassification(classes=["x", "y"])
    with pytest.raises(InputError, match=r"a\.png .*\[3, 6, 9\]"):
        task.encode(ViTImageProcessorPil(do_resize=False), split(photos))


def test_all_files_that_cannot_be_read_are_named_once(photos):
    broken = [photos[0].with_name(f"broken{i}.png") for i in range(12)]
    for path in broken:
        path.write_bytes(b"no image")
    paths, task = [photos[0], *broken[:2], photos[1]], ImageClassification(classes=["x", "y"])
    with pytest.raises(InputError) as refused:
        task.encode(ViTImageProcessorPil(size={"height": 4, "width": 4}), split(paths))
    assert [str(refused.value).count(path.name) for path in broken[:2]] == [1, 1]
    with pytest.raises(InputError, match=r"12 of 12 (.|\n)* 4 more"):
        task.encode(ViTImageProcessorPil(size={"height": 4, "width": 4}), split(broken))


@pytest.mark.parametrize(
    ("extractor", "name", "shape"),
    [
        (ASTFeatureExtractor(**AST), "input_values", (40, 16)),
        (WhisperFeatureExtractor(**WHISPER), "input_features", (16, 100)),
    ],
    ids=["ast", "whisper"],
)
def test_spectrograms_are_the_output_of_the_extractor(clips, extractor, name, shape):
    task = AudioClassification(classes=["x", "y"], max_seconds=5)
    made = batch(task, extractor, split(clips, [0, 1]))
    waves = [wavfile.read(path)[1] for path in clips]
    expected = extractor(waves, sampling_rate=16000, return_tensors="pt")[name]
    assert made.keys() == {name, "labels"}
    assert made[name].shape == (2, *shape)
    torch.testing.assert_close(made[name], expected)


@pytest.mark.parametrize("samples", [1, 100])
def test_a_clip_of_less_than_a_window_is_padded_with_silence(tmp_path, samples):
    path = tmp_path / "click.wav"
    wavfile.write(path, 16000, np.full(samples, 0.1, np.float32))
    task, extractor = AudioClassification(classes=["x", "y"]), ASTFeatureExtractor(**AST)
    made = batch(task, extractor, split([path], [0]))
    wave = np.zeros(800, np.float32)  # 0.05 s
    wave[:samples] = 0.1
    expected = extractor([wave], sampling_rate=16000, return_tensors="pt")["input_values"]
    torch.testing.assert_close(made["input_values"], expected)


@pytest.mark.parametrize("masked", [True, False])
def test_waves_are_padded_to_the_maximum_length(clips, masked):
    task = AudioClassification(classes=["x", "y"], max_seconds=0.25)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=masked, do_normalize=False)
    made = batch(task, extractor, split(clips))
    waves = torch.zeros(2, 4000)
    for row, path in zip(waves, clips, strict=True):
        samples = torch.from_numpy(wavfile.read(path)[1][:4000])
        row[: len(samples)] = samples
    assert torch.equal(made["input_values"], waves)
    assert made.keys() == {"input_values", "labels", *(["attention_mask"] if masked else [])}
    if masked:
        assert made["attention_mask"].sum(1).tolist() == [1600, 4000]


def test_rows_are_encoded_once_for_the_same_content(clips, cache, monkeypatch):
    task = AudioClassification(classes=["x", "y"])
    decoded = []
    original = AudioClassification.decode

    def decode(self, processor, rows, place):
        decoded.append(rows["path"][place])
        return original(self, processor, rows, place)

    monkeypatch.setattr(AudioClassification, "decode", decode)
    first = task.encode(ASTFeatureExtractor(**AST), split(clips))
    again = task.encode(ASTFeatureExtractor(**AST), split(clips))
    assert len(decoded) == 2
    assert np.array_equal(first[1]["input_values"], again[1]["input_values"])
    clips[0].write_bytes(clips[1].read_bytes())
    task.encode(ASTFeatureExtractor(**AST), split(clips))
    assert len(decoded) == 4
    task.encode(ASTFeatureExtractor(**{**AST, "max_length": 41}), split(clips))
    assert len(decoded) == 6
    assert len(list((cache / "encoded").glob("*.arrow"))) == 3


def test_images_count_as_one_unit_per_row(photos):
    task = ImageClassification(classes=["x", "y"])
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    encoded = task.encode(processor, split(photos))
    made = task.collate(processor)([encoded[0], encoded[1]])
    assert task.lengths(encoded) == [1, 1]
    assert (task.count(made), task.items(made), task.width(made)) == (2, 2, None)
