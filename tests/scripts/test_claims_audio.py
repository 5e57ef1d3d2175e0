"""The claim on adapters of an audio model: its files, its encoder, and a trial with few clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import whisper_tiny
from claims import page, prompts, running
from claims.catalog import CLAIMS, WORDS
from scipy.io import wavfile
from transformers import (
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from petl.errors import InputError

pytest_plugins = ["training_fixtures", "claims_fixtures"]

PLACEMENTS = CLAIMS["audio"]
CONFORMER, LORA = (WORDS["audio"][key] for key in ("conformer", "lora"))

NAMES = {
    f"{start}{i}": topic
    for start, topic in (
        ("vm-hello-", "voicemail"),
        ("conf-one-", "conferences"),
        ("confbridge-two-", "conferences"),
        ("digits/day-", "numbers"),
        ("letters/a", "spelling"),
        ("phonetic/b_", "spelling"),
        ("demo-abouttotry-", "other"),
        ("dictate/pause", "other"),
    )
    for i in range(4)
}
SMALL = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
SMALL |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Packages with a noise for each name and language, and a small Whisper."""
    folder = tmp_path / "package"
    rng = np.random.default_rng(0)
    for language in prompts.LANGUAGES:
        for name in (*NAMES, "silence/1"):
            file = folder / f"{language}_XX_f_Speaker" / f"{name}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            wavfile.write(file, 8000, rng.integers(-99, 99, 900, dtype=np.int16))
    monkeypatch.setenv(prompts.VARIABLE, str(folder))
    monkeypatch.setattr(whisper_tiny, "CONFIG", {**whisper_tiny.CONFIG, **SMALL})
    monkeypatch.setattr(whisper_tiny, "load", load)
    return folder


def load(seconds):
    torch.manual_seed(0)
    config = WhisperConfig(**whisper_tiny.CONFIG, max_source_positions=50 * seconds)
    return WhisperForConditionalGeneration(config)


def test_no_prompt_is_in_both_parts_and_its_class_is_that_of_its_name(package, tmp_path):
    data = tmp_path / "data"
    prompts.write_prompts(data)
    contents = {
        file.read_bytes(): (file.parent.parent.name, file.parent.name)
        for file in [*data.rglob("*.wav")]
    }
    assert len(contents) == len(NAMES) * 5  # silence is left out
    for name, topic in NAMES.items():
        clips = [*package.glob(f"*/{name}.wav")]
        found = {contents[clip.read_bytes()] for clip in clips}
        assert len(clips) == 5
        assert {topic} == {each for _, each in found}
        assert len({part for part, _ in found}) == 1
    assert {part for part, _ in contents.values()} == {"train", "test"}


def test_the_encoder_is_written_without_a_head(package, tmp_path):
    prompts.write_encoder(tmp_path / "whisper")
    read, info = WhisperForAudioClassification.from_pretrained(
        tmp_path / "whisper", output_loading_info=True
    )
    theirs = load(2).get_encoder().state_dict()
    ours = read.encoder.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"projector", "classifier"}
    assert read.config.max_source_positions == 100


def test_the_claim_is_tried_from_files_to_verdicts(package, tmp_path, made, monkeypatch):
    monkeypatch.setattr(prompts, "TRAIN_ROWS", 40)
    monkeypatch.setattr(prompts, "TEST_ROWS", 20)
    short = ("train.epochs=null", "train.steps=1", "train.batch_size=4")
    setting = replace(PLACEMENTS.setting, rates=(1e-3,), seeds=(0, 1))
    setting = replace(setting, overrides=(*setting.overrides, *short))
    # the two contenders whose sizes have to be equal
    claim = replace(PLACEMENTS, setting=setting, statements=PLACEMENTS.statements[2:])
    found = running.try_claim(claim, tmp_path, "the command")
    assert len(made) == 4
    width, layers, kernel = SMALL["d_model"], SMALL["encoder_layers"], 31
    assert found.contenders[CONFORMER].parameters == layers * (
        3 * width * 11 + kernel * 11 + 5 * 11 + width
    )
    linears = 4 * (width + width) + 2 * (width + SMALL["encoder_ffn_dim"])
    assert found.contenders[LORA].parameters == layers * 2 * linears
    assert all(map(found.is_complete, claim.statements))
    assert "not tried" not in "".join(row[1] for row in page.summary(claim, found).rows)


def sizes(width, layers, r):
    """Parameters of adapters after or beside the feed-forward networks."""
    return layers * (2 * width * r + r + width)


def test_contenders_have_about_equal_sizes_with_whisper_tiny():
    width, layers = whisper_tiny.CONFIG["d_model"], whisper_tiny.CONFIG["encoder_layers"]
    adapters = sizes(width, layers, 17)
    conformer = layers * (3 * width * 11 + 31 * 11 + 5 * 11 + width)
    lora = layers * 2 * (4 * 2 * width + 2 * (width + whisper_tiny.CONFIG["encoder_ffn_dim"]))
    assert max(adapters, conformer, lora) / min(adapters, conformer, lora) < 1.03


def test_missing_prompts_are_refused(package, tmp_path, monkeypatch):
    monkeypatch.setenv(prompts.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InputError, match="has no prompts in 'en'; run: apt-get install asterisk"):
        prompts.folder_of_prompts()
    assert not prompts.is_installed()
