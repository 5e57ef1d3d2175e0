"""Tiny models with random weights, built from configs without a download, and batches for them.

Widths differ where those of real models do (query and key, hidden and feed-forward), so that a
method that confuses two of them fails.
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
LENGTH, TARGET_LENGTH = 10, 7  # tokens of an input, and of a target of an encoder-decoder


def tiny_llama(layers: int = 3, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """Build a Llama with grouped-query attention: hidden 64, keys and values 32, MLP 96."""
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
    """Build a GPT-2, whose linear layers are `Conv1D`."""
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
    model.loss_type = "ForCausalLM"  # transformers' fallback, without its warning
    return model


def tiny_bert(layers: int = 2) -> BertForSequenceClassification:
    """Build a BERT with a classification head."""
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
    """Build a T5 with `layers` blocks in encoder and decoder each."""
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
    """Build a ViT for images of 16 x 16 pixels in 4 patches."""
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


def _config(cls: Any, **fields: Any) -> Any:
    """Create a config; the type checker does not know the fields of its base class."""
    return cls(**fields)


def _build(cls: Any, config: Any) -> Any:
    """Create a model with the same weights each time, without touching the random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval()


def causal_batch(rows: int, seed: int) -> Batch:
    """Return token ids, padded on the right, with themselves as labels."""
    ids, mask = _tokens(rows, LENGTH, seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def class_batch(rows: int, seed: int) -> Batch:
    """Return token ids, padded on the right, with classes as labels."""
    ids, mask = _tokens(rows, LENGTH, seed)
    labels = torch.arange(rows) % CLASSES
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pair_batch(rows: int, seed: int) -> Batch:
    """Return token ids of inputs and of targets, padded on the right."""
    ids, mask = _tokens(rows, LENGTH, seed)
    targets, target_mask = _tokens(rows, TARGET_LENGTH, seed + 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": targets.masked_fill(target_mask == 0, -100),
    }


def image_batch(rows: int, seed: int) -> Batch:
    """Return images with classes as labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % CLASSES}


def _tokens(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, [rows, length]; row i is i % 4 tokens shorter."""
    generator = torch.Generator().manual_seed(seed)
    # from 3: 0 is padding, 1 and 2 are often special tokens
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    # mixed lengths, so that a method that ignores the mask fails
    lengths = length - torch.arange(rows) % 4
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


@dataclass(frozen=True)
class TinyModel:
    """A model to run checks on, one of `TINY_MODELS` or your own.

    Attributes:
        name: shown in test ids.
        build: builds the model, with the same weights each time.
        make_batch: called with (rows, seed), returns model inputs with labels, preferably of
            several lengths.
        task_type: PEFT's, or None; with a classification type PEFT trains and saves the head.
        labels_shifted: True if the loss predicts each label from the token before it.
        generates: True if it has a `generate` with a cache.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    make_batch: Callable[[int, int], Batch]
    task_type: str | None = None
    labels_shifted: bool = False
    generates: bool = False

    def base(self) -> PreTrainedModel:
        """Return a new copy of the model, in eval mode."""
        # copying is faster than building
        return deepcopy(_built(self.build))

    def batch(self, rows: int = 4, seed: int = 0) -> Batch:
        """Return model inputs with labels."""
        return self.make_batch(rows, seed)

    def items(self, batch: Batch) -> int:
        """Return the number of labels over which the loss of a batch is averaged."""
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
