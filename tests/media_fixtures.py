"""Small sounds and pictures on disk, and overrides that train small models on them.

Import the fixtures that a test module uses: `from media_fixtures import sounds, pictures`.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

RATE = 8000  # samples a second
TONES = {"high": 1200, "low": 300}  # Hz
COLOURS = {"blue": (20, 40, 220), "red": (220, 40, 20)}

AST = [
    "model=ast_random", "model.settings.hidden_size=32", "model.settings.num_hidden_layers=2",
    "model.settings.num_attention_heads=2", "model.settings.intermediate_size=48",
    "model.settings.num_mel_bins=16", "model.settings.max_length=64",
    "model.settings.patch_size=8", "model.settings.frequency_stride=8",
    "model.settings.time_stride=8",
]  # fmt: skip
WHISPER = [
    "model=whisper_random", "model.settings.d_model=32", "model.settings.encoder_layers=2",
    "model.settings.encoder_attention_heads=2", "model.settings.encoder_ffn_dim=48",
    "model.settings.num_mel_bins=16", "model.settings.max_source_positions=50",
    "model.settings.classifier_proj_size=16",
]  # fmt: skip
VIT = [
    "model=vit_random", "model.settings.hidden_size=32", "model.settings.num_hidden_layers=2",
    "model.settings.num_attention_heads=2", "model.settings.intermediate_size=48",
    "model.settings.image_size=16", "model.settings.patch_size=8",
]  # fmt: skip
SHORT = [
    "train.steps=8", "train.batch_size=6", "train.log_steps=1", "train.warmup=0", "train.lr=5e-3",
    "train.save_steps=null", "train.frozen_head=false",
]  # fmt: skip


def write_tone(file: Path, hertz: float, seconds: float = 0.5, seed: int = 0) -> None:
    """A tone with some noise, as 16-bit wave."""
    file.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.RandomState(seed).standard_normal(len(time))
    samples = 0.4 * np.sin(2 * np.pi * hertz * time) + 0.02 * noise
    wavfile.write(file, RATE, (samples * 2**15).astype(np.int16))


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six sounds in two classes."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, hertz in TONES.items():
        for i in range(3):
            write_tone(folder / name / f"{i}.wav", hertz * (1 + 0.1 * i), seed=i)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six pictures in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(3):
            noise = np.random.RandomState(i).randint(-20, 20, (12, 10, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def audio(folder: Path) -> list[str]:
    return ["data=audio_folder", f"data.train={folder}", f"data.test={folder}", *SHORT]


def images(folder: Path) -> list[str]:
    return ["data=image_folder", f"data.train={folder}", f"data.test={folder}", *SHORT]
