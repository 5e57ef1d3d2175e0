"""The study of VL-PET on speech, and Whisper's conversion; with small random weights."""

import struct
from itertools import product

import numpy as np
import pytest
import torch
import transcription
import whisper_tiny
from scipy.io import wavfile
from torch.nn import functional as F
from transcription import Split
from transformers import WhisperConfig, WhisperForConditionalGeneration
from whisper_tiny import END, START

import petl

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "max_source_positions": 10}
SIZES |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = WhisperConfig(**{**whisper_tiny.CONFIG, **SIZES, **HEADS, "init_std": 0.5})
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def split():
    torch.manual_seed(1)
    return Split(torch.randn(3, 80, 20), [[11, 12, 13], [14], [15, 16]])


def their_tensors(layers=4):
    """All tensors of Whisper tiny.en by CTranslate2's names, narrow; stacked ones are random."""
    norms, linears = ("gamma", "beta"), ("weight", "bias")
    names = [f"encoder/conv{i}/{kind}" for i, kind in product((1, 2), linears)]
    names += ["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        names += [f"{side}/position_encodings/encodings"]
        names += [f"{side}/layer_norm/{kind}" for kind in norms]
        parts = {"self_attention": 2, "ffn": 2} | ({"attention": 3} if side == "decoder" else {})
        for layer, (part, count) in product(range(layers), parts.items()):
            place = f"{side}/layer_{layer}/{part}"
            names += [f"{place}/layer_norm/{kind}" for kind in norms]
            names += [f"{place}/linear_{i}/{kind}" for i, kind in product(range(count), linears)]
    return {name: torch.randn(12, 2) for name in names}


def test_renamed_tensors_are_those_of_transformers():
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(WhisperConfig(**whisper_tiny.CONFIG))
    assert set(whisper_tiny.renamed(their_tensors())) == set(model.state_dict()) - {
        "proj_out.weight"
    }


def test_stacked_projections_are_taken_apart_in_order():
    tensors = their_tensors()
    state = whisper_tiny.renamed(tensors)
    own = tensors["encoder/layer_2/self_attention/linear_0/weight"]
    crossed = tensors["decoder/layer_1/attention/linear_1/weight"]
    assert torch.equal(state["model.encoder.layers.2.self_attn.q_proj.weight"], own[:4])
    assert torch.equal(state["model.encoder.layers.2.self_attn.v_proj.weight"], own[8:])
    assert torch.equal(state["model.decoder.layers.1.encoder_attn.k_proj.weight"], crossed[:6])
    assert torch.equal(state["model.decoder.layers.1.encoder_attn.v_proj.weight"], crossed[6:])


def test_a_file_of_ctranslate2_is_read():
    def text(word):
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    numbers = np.arange(6, dtype=np.float16).reshape(2, 3)
    setting = text("encoder/num_heads") + struct.pack("<BBIh", 0, 2, 2, 6)
    tensor = text("encoder/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + numbers.tobytes()
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    read = whisper_tiny.read(content + setting + tensor)
    assert {name: value.tolist() for name, value in read.items()} == {
        "encoder/weight": [[0, 1, 2], [3, 4, 5]]
    }


def test_the_decoder_reads_the_start_and_writes_tokens_and_the_end(split):
    batch = transcription.batch_of(split, [0, 1])
    assert batch["decoder_input_ids"].tolist() == [
        [*START, 11, 12, 13],
        [*START, 14, END, END],
    ]
    assert batch["labels"].tolist() == [
        [-100, 11, 12, 13, END],
        [-100, 14, END, -100, -100],
    ]


@torch.no_grad()
def test_the_loss_is_the_mean_over_all_tokens(small, split):
    total, number = 0.0, 0
    for features, tokens in zip(split.features, split.tokens, strict=True):
        ids = torch.tensor([[*START, *tokens]])
        logits = small(input_features=features[None], decoder_input_ids=ids).logits[0]
        for position, token in enumerate([*tokens, END], len(START) - 1):
            total -= F.log_softmax(logits[position], -1)[token].item()
            number += 1
    assert transcription.loss_of(small, split) == pytest.approx(total / number, rel=1e-5)


@torch.no_grad()
def test_answers_are_those_of_a_loop_without_a_cache(small, split):
    expected = []
    for features in split.features:
        ids = list(START)
        while len(ids) < transcription.NEW_TOKENS + len(START):
            read = torch.tensor([ids])
            output = small(input_features=features[None], decoder_input_ids=read)
            ids.append(int(output.logits[0, -1].argmax()))
            if ids[-1] == END:
                break
        expected.append([i for i in ids[len(START) :] if i != END])
    assert transcription.answers(small, split.features) == expected


def test_edits_count_replaced_missing_and_added_words():
    right = ["press", "one", "for", "sales"]
    assert transcription.edits(right, right) == 0
    assert transcription.edits(["press", "two", "for", "sales"], right) == 1
    assert transcription.edits(["one", "for", "sales"], right) == 1
    assert transcription.edits(["press", "one", "one", "for", "sales", "now"], right) == 2
    assert transcription.edits([], right) == 4
    assert transcription.words("Don't -- press ONE.") == ["don't", "press", "one"]


def test_babble_has_half_the_amplitude_and_fills_the_window(tmp_path):
    generator = np.random.default_rng(0)
    voice = tmp_path / "voice.wav"
    wavfile.write(voice, 16_000, generator.normal(size=20_000).astype(np.float32) / 10)
    clip = generator.normal(size=16_000).astype(np.float32)
    heard = transcription.with_babble(clip, [voice], np.random.default_rng(1))
    assert heard.shape == (48_000,)
    noise = heard.copy()
    noise[: len(clip)] -= clip
    assert np.square(noise).mean() == pytest.approx(np.square(clip).mean() / 4, rel=1e-3)
    assert np.square(noise[30_000:]).mean() > 0


def test_lora_gets_the_largest_rank_within_the_parameters_of_vl_pet(small, monkeypatch):
    def load(seconds):
        return WhisperForConditionalGeneration(small.config)

    monkeypatch.setattr(whisper_tiny, "load", load)
    monkeypatch.setitem(transcription.VL_PET, "r", 4)
    lora, vl_pet = (transcription.adapted(name) for name in ("lora", "vl_pet"))
    r = lora.peft_config["default"].r
    used, budget = transcription.count(lora), transcription.count(vl_pet)
    assert used <= budget < used * (r + 1) / r


@torch.no_grad()
def test_vl_pet_starts_at_whisper(small, split):
    before = small(**transcription.batch_of(split, [0, 1, 2])).logits
    model = petl.wrap(small, "vl_pet", **transcription.VL_PET).eval()
    assert torch.equal(model(**transcription.batch_of(split, [0, 1, 2])).logits, before)
    # attention and MLP of the encoder's block, and the values of the decoder's
    assert (
        len({name.split(".petl_")[0] for name, _ in model.named_parameters() if "petl_" in name})
        == 3
    )
    model.unload()
