"""Tiny base models and inputs whose numbers come from a formula.

They depend neither on petl nor on the initialisation or the random numbers of torch, so that the
adapters saved beside this file always load onto the weights that they were trained on.
"""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

VOCABULARY, CLASSES = 40, 3
ROWS, LENGTH = 3, 7  # of every batch


def formula(name: str, *shape: int) -> Tensor:
    """Values in [-1, 1) that depend on `name` and `shape` only: splitmix64 of a counter."""
    count = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = count * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    values = (x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    return torch.from_numpy(values.astype(np.float32)).view(*shape)


@torch.no_grad()
def fill(model: Any) -> Any:
    """Set every parameter by `formula` of its name: matrices of unit gain, norms near 1."""
    for name, parameter in model.named_parameters():
        values = formula(name, *parameter.shape)
        if parameter.dim() > 1:
            values = values * (3 / parameter.shape[-1]) ** 0.5
        elif name.endswith("bias"):
            values = values * 0.1
        else:
            values = 1 + values * 0.1
        parameter.copy_(values)
    return model.eval()


class Stack(nn.Module):
    """A plain torch model whose layers have one path and two shapes: 16 to 24 and 24 to 16."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((16, 24), (24, 16), (16, 24), (24, 16))
        self.layers = nn.ModuleList(nn.Linear(*shape) for shape in shapes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        loss = None if labels is None else nn.functional.cross_entropy(x, labels)
        return SequenceClassifierOutput(loss=loss, logits=x)


def llama(layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            use_cache=False,
        )
    )


def bert(labels: int = CLASSES, vocabulary: int = VOCABULARY) -> BertForSequenceClassification:
    config: Any = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    config.num_labels = labels
    return BertForSequenceClassification(config)


def gpt2() -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_inner=24,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            use_cache=False,
        )
    )
    model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning
    return model


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_heads=2,
            num_layers=1,
            num_decoder_layers=1,
            dropout_rate=0.0,
            tie_word_embeddings=False,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=None,
            use_cache=False,
        )
    )


BUILDERS = {
    "llama": lambda: llama(2),
    "llama-4-layers": lambda: llama(4),
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "stack": Stack,
}


def base(name: str) -> Any:
    """The base model called `name`, in eval mode, with the same weights each time."""
    return fill(BUILDERS[name]())


def batch(name: str, number: int = 0) -> dict[str, Tensor]:
    """Inputs with labels for the base model `name`; rows of tokens are padded on the right."""
    labels = (torch.arange(ROWS) + number) % CLASSES
    if name == "stack":
        return {"x": formula(f"x {number}", ROWS, 16), "labels": labels}
    ids = tokens(f"tokens {number}", LENGTH)
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 1, LENGTH - 3])[:, None]).long()
    ids = ids * mask
    if name == "t5":
        labels = tokens(f"targets {number}", LENGTH - 2)
    elif name != "bert":
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tokens(name: str, length: int) -> Tensor:
    """Token ids from 3 on, [ROWS, length]."""
    share = (formula(name, ROWS, length).double() + 1) / 2
    return 3 + (share * (VOCABULARY - 3)).long()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of `model` in eval mode, float32."""
    return model.eval()(**inputs).logits.float()
