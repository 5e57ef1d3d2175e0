"""Tiny models with random weights, built from configs, and batches for them. Nothing is downloaded.

Widths differ where real models' do (query and key, hidden and feed-forward), so that a method that
mixes up two of them fails.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, Tensor]

VOCABULARY, CLASSES, PAD = 96, 5, 0
LENGTH, TARGET_LENGTH = 10, 7  # tokens of a row, and of a row to generate


def tiny_llama(layers: int = 3, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A decoder with grouped queries: hidden 64, keys and values 32, feed-forward 96."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
        use_cache=False,
    )
    return _build(LlamaForCausalLM, config)


def tiny_gpt2(layers: int = 2) -> GPT2LMHeadModel:
    """A decoder whose linear layers are `Conv1D`."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_inner=96,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = _build(GPT2LMHeadModel, config)
    model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning
    return model


def tiny_bert(layers: int = 2) -> BertForSequenceClassification:
    """An encoder with a classification head."""
    config = _config(
        BertConfig,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=CLASSES,
        pad_token_id=PAD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _build(BertForSequenceClassification, config)


def tiny_t5(layers: int = 2) -> T5ForConditionalGeneration:
    """An encoder and a decoder, each of `layers` blocks."""
    config = _config(
        T5Config,
        vocab_size=VOCABULARY,
        d_model=64,
        d_ff=96,
        d_kv=16,
        num_heads=4,
        num_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.0,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        eos_token_id=None,
        use_cache=False,
    )
    return _build(T5ForConditionalGeneration, config)


def tiny_vit(layers: int = 2) -> ViTForImageClassification:
    """An image classifier of 16 x 16 pixels in 4 patches."""
    config = _config(
        ViTConfig,
        image_size=16,
        patch_size=8,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _build(ViTForImageClassification, config)


def _config(kind: Any, **fields: Any) -> Any:
    """A config; a type checker does not see the fields that all kinds share."""
    return kind(**fields)


def _build(kind: Any, config: Any) -> Any:
    """The same weights each time; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def causal_batch(rows: int, seed: int) -> Batch:
    """Rows of tokens, padded on the right, to be continued."""
    ids, mask = _tokens(rows, LENGTH, seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def class_batch(rows: int, seed: int) -> Batch:
    """Rows of tokens, padded on the right, and their classes."""
    ids, mask = _tokens(rows, LENGTH, seed)
    labels = torch.arange(rows) % CLASSES
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pair_batch(rows: int, seed: int) -> Batch:
    """Rows of tokens and rows to generate from them."""
    ids, mask = _tokens(rows, LENGTH, seed)
    targets, target_mask = _tokens(rows, TARGET_LENGTH, seed + 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": targets.masked_fill(target_mask == 0, -100),
    }


def image_batch(rows: int, seed: int) -> Batch:
    """Images and their classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % CLASSES}


def _tokens(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [rows, length]; row i is i % 4 tokens shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    lengths = length - torch.arange(rows) % 4
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


@dataclass(frozen=True)
class TinyModel:
    """A model to run checks on; a stranger may bring one.

    Attributes:
        name: shown in test ids.
        build: makes the model, with the same weights each time.
        make_batch: called with (rows, seed); model inputs with labels, of mixed lengths if it can.
        task_type: PEFT's, or None; a classification type makes PEFT train and save the head.
        labels_shifted: whether the loss predicts each label from the token before it.
        generates: whether it has a `generate` with a cache.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    make_batch: Callable[[int, int], Batch]
    task_type: str | None = None
    labels_shifted: bool = False
    generates: bool = False

    def base(self) -> PreTrainedModel:
        """A fresh copy of the model, in eval mode."""
        return deepcopy(_built(self.build))

    def batch(self, rows: int = 4, seed: int = 0) -> Batch:
        return self.make_batch(rows, seed)

    def items(self, batch: Batch) -> int:
        """How many labels the mean loss of a batch is over."""
        labels = batch["labels"][..., 1:] if self.labels_shifted else batch["labels"]
        return int(labels.ne(-100).sum())


@cache
def _built(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return build()


TINY_MODELS = {
    model.name: model
    for model in (
        TinyModel("llama", tiny_llama, causal_batch, "CAUSAL_LM", True, True),
        TinyModel("bert", tiny_bert, class_batch, "SEQ_CLS"),
        TinyModel("t5", tiny_t5, pair_batch, "SEQ_2_SEQ_LM", False, True),
        TinyModel("vit", tiny_vit, image_batch),
        TinyModel("gpt2", tiny_gpt2, causal_batch, None, True, True),
    )
}
