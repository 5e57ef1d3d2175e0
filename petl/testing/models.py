"""Tiny models with random weights, built from configs without a download, and batches for them.

Widths differ where those of real models do (query and key, hidden and feed-forward), so that a
method that confuses two of them fails.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput

Batch = dict[str, Tensor]
T = TypeVar("T")

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
    return build_seeded(LlamaForCausalLM, config)


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
    model = build_seeded(GPT2LMHeadModel, config)
    model.loss_type = "ForCausalLM"  # transformers' fallback, without its warning
    return model


def tiny_bert(layers: int = 2) -> BertForSequenceClassification:
    """Build a BERT with a classification head."""
    config = create_config(
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
    return build_seeded(BertForSequenceClassification, config)


def tiny_t5(layers: int = 2) -> T5ForConditionalGeneration:
    """Build a T5 with `layers` blocks in encoder and decoder each."""
    config = create_config(
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
    return build_seeded(T5ForConditionalGeneration, config)


def tiny_vit(layers: int = 2) -> ViTForImageClassification:
    """Build a ViT for images of 16 x 16 pixels in 4 patches."""
    config = create_config(
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
    return build_seeded(ViTForImageClassification, config)


# of a model with experts whose weights are stacked
EXPERTS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "use_cache": False,
}


def tiny_qwen3_moe() -> Qwen3MoeForCausalLM:
    """Build a Qwen3 with 4 experts of width 24, of which each token has 2."""
    config = create_config(Qwen3MoeConfig, **EXPERTS, num_experts=4, moe_intermediate_size=24)
    return build_seeded(Qwen3MoeForCausalLM, config)


def tiny_gpt_oss() -> GptOssForCausalLM:
    """Build a gpt-oss with 4 experts of width 24, which have biases and transposed weights."""
    config = create_config(GptOssConfig, **EXPERTS, num_local_experts=4, intermediate_size=24)
    return build_seeded(GptOssForCausalLM, config)


class UNetConfig(PreTrainedConfig):
    """Config of `TinyUNet`: its width, and how many more encoder blocks read the text."""

    model_type = "petl_tiny_unet"

    def __init__(self, width: int = 8, more: int = 0, **kwargs: Any) -> None:
        self.width, self.more = width, more
        super().__init__(**kwargs)


class UNetBlock(GradientCheckpointingLayer):
    """A residual block, called with a feature map and the embedding of the timestep."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm1, self.norm2 = nn.GroupNorm(4, in_channels), nn.GroupNorm(4, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(width, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Return a feature map [N, out_channels, H, W]."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time_proj(F.silu(temb))[..., None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class TextAttention(nn.Module):
    """Cross-attention of the pixels to the text, [N, C, H, W] and [N, T, K]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.to_k, self.to_v = nn.Linear(width, channels), nn.Linear(width, channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Return x plus what its pixels read in the text."""
        q, k, v = self.to_q(x.flatten(2).mT), self.to_k(text), self.to_v(text)
        read = self.to_out(F.scaled_dot_product_attention(q, k, v))
        return x + read.mT.reshape(x.shape)


class UNetPart(nn.Module):
    """Blocks, and an attention behind each or none, with the names of diffusers' U-Nets."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)

    def forward(self, h: Tensor, temb: Tensor, text: Tensor, *skips: Tensor) -> Tensor:
        """Return the last block's output; each block gets one of `skips`, if there are some."""
        for i, block in enumerate(self.resnets):
            h = block(torch.cat([h, skips[i]], 1) if skips else h, temb)
            if self.attentions:
                h = self.attentions[i](h, text)
        return h


class TinyUNet(PreTrainedModel):
    """A U-Net of two levels, of widths W and 2 W.

    It has diffusers' names, and needs no diffusers. As its decoder reads them, the skips have 2 W,
    W, W and W channels; those of further encoder blocks are not read.
    """

    config_class = UNetConfig
    main_input_name = "sample"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UNetBlock"]

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        W, D = config.width, 2 * config.width
        self.time_in = nn.Linear(1, W)
        self.conv_in = nn.Conv2d(4, W, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                UNetPart(
                    [UNetBlock(W, W, W) for _ in range(1 + config.more)],
                    [TextAttention(W, W) for _ in range(1 + config.more)],
                ),
                UNetPart([UNetBlock(W, D, W)], []),
            ]
        )
        self.downsampler = nn.Conv2d(W, W, 3, stride=2, padding=1)
        self.mid_block = UNetPart([UNetBlock(D, D, W)], [TextAttention(D, W)])
        self.up_blocks = nn.ModuleList(
            [
                UNetPart([UNetBlock(2 * D, D, W), UNetBlock(D + W, W, W)], []),
                UNetPart(
                    [UNetBlock(2 * W, W, W) for _ in range(2)],
                    [TextAttention(W, W) for _ in range(2)],
                ),
            ]
        )
        self.conv_out = nn.Conv2d(W, 4, 3, padding=1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as torch initializes them: 0.02 is too small for convolutions."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the first layer, whose output has a gradient if inputs are to require one."""
        return self.conv_in

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, labels: Tensor | None = None
    ) -> ImageClassifierOutput:
        """Return a prediction [N, 4, H, W] as logits, and its squared error to the labels."""
        temb = self.time_in(timestep[:, None].to(sample.dtype) / 1000)
        h = self.conv_in(sample)
        skips = [h]
        skips.append(self.down_blocks[0](h, temb, text))
        skips.append(self.downsampler(skips[-1]))
        skips.append(self.down_blocks[1](skips[-1], temb, text))
        h = self.mid_block(skips[-1], temb, text)
        h = self.up_blocks[0](h, temb, text, skips.pop(), skips.pop())
        h = F.interpolate(h, scale_factor=2.0)
        h = self.up_blocks[1](h, temb, text, skips.pop(), skips.pop())
        out = self.conv_out(F.silu(h))
        loss = None if labels is None else F.mse_loss(out, labels.to(out.dtype))
        return ImageClassifierOutput(loss=cast(Any, loss), logits=out)


def tiny_unet(more: int = 0) -> TinyUNet:
    """Build a U-Net for feature maps of 8 x 8 with `more` further blocks in its encoder."""
    return build_seeded(TinyUNet, UNetConfig(more=more))


def create_config(cls: Callable[..., T], **fields: object) -> T:
    """Create a config; the type checker does not know the fields of its base class."""
    return cls(**fields)


def build_seeded(cls: Any, config: object) -> Any:
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


def noise_batch(rows: int, seed: int) -> Batch:
    """Return noisy feature maps with timesteps, text embeddings and the noise as labels."""
    generator = torch.Generator().manual_seed(seed)
    sample, noise = (torch.randn(rows, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(rows, LENGTH, 8, generator=generator)
    timestep = torch.randint(1000, (rows,), generator=generator)
    return {"sample": sample + noise, "timestep": timestep, "text": text, "labels": noise}


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
    """A model to run checks on, one of `TINY_MODELS` or `OTHER_MODELS`, or your own.

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
        return deepcopy(self.original())

    def original(self) -> PreTrainedModel:
        """Return the model that is copied, to look at its parts."""
        return _built(self.build)

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
# of kinds that few methods adapt
OTHER_MODELS = {
    model.name: model
    for model in (
        TinyModel("unet", tiny_unet, noise_batch),
        TinyModel("qwen3_moe", tiny_qwen3_moe, causal_batch, "CAUSAL_LM", True, True),
        TinyModel("gpt_oss", tiny_gpt_oss, causal_batch, "CAUSAL_LM", True, True),
    )
}
