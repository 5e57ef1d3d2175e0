"""Trainable parameters of each method on one reference model, so that methods can be compared.

A method for images only, for encoder-decoders, for models that generate, or for diffusion models
has another model.
"""

import warnings

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)

from petl.core.parameters import adapter_parameters, trainable
from petl.core.registry import build_config, is_computed, on_shapes
from petl.core.spec.facts import facts_of
from petl.errors import InputError, ModuleKindError, UnsupportedError
from petl.system.settings.command_line import preset_of
from petl.training.runs.config import method_fields

REFERENCE = "a BERT of MiniLM's shape without a head (6 layers, width 384, 22.7 M parameters)"
OF_IMAGES = "a ViT-B/16 without a head (12 layers, width 768, 86.4 M parameters)"
OF_PAIRS = "a BART-base without a head (6 + 6 layers, width 768, 139.4 M parameters)"
OF_TEXTS = (
    "a Llama of SmolLM2-135M's shape (30 layers, width 576, 134.5 M parameters), computed without "
    "training"
)
OF_CLASSES = "a BERT of MiniLM's shape with a head of 15 classes"
OF_DIFFUSION = "the U-Net of Stable Diffusion 1.5 (859.5 M parameters)"
# input and output channels of the blocks of its decoder, behind 1280 channels
DECODER = (
    ((2560, 1280), (2560, 1280), (2560, 1280)),
    ((2560, 1280), (2560, 1280), (1920, 1280)),
    ((1920, 640), (1280, 640), (960, 640)),
    ((960, 320), (640, 320), (640, 320)),
)
STEPS = 1000  # length of the run, for methods with a schedule (assumption)


def build() -> PreTrainedModel:
    """Build the reference model on the meta device: all-MiniLM-L6-v2, the default of a run."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):  # shapes are enough to count parameters
        return AutoModel.from_config(config)


def build_for_images() -> PreTrainedModel:
    """Build the reference model of methods for images on the meta device."""
    with torch.device("meta"):
        return AutoModel.from_config(ViTConfig(), add_pooling_layer=False)


def build_encoder_decoder() -> PreTrainedModel:
    """Build the reference model of methods for encoder-decoders on the meta device."""
    config = BartConfig(
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    with torch.device("meta"):
        return AutoModel.from_config(config)


def build_to_generate() -> PreTrainedModel:
    """Build the reference model of methods that compute what a model generates, on meta."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def build_classifier() -> PreTrainedModel:
    """Build the reference model of methods that replace a classification head, on meta."""
    config = build().config
    config.num_labels = 15
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


class ChannelBlock(nn.Module):
    """A block of a U-Net, of which only the channels are known."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels


def build_for_diffusion() -> nn.Module:
    """Return what a method for U-Nets reads of Stable Diffusion's to count its parameters.

    It has no weights and no `forward`.
    """
    model = nn.Module()
    parts = [nn.Module() for _ in range(1 + len(DECODER))]
    for part, channels in zip(parts, (((1280, 1280),), *DECODER), strict=True):
        part.add_module("resnets", nn.ModuleList(ChannelBlock(*pair) for pair in channels))
    model.mid_block, model.up_blocks = parts[0], nn.ModuleList(parts[1:])
    return model


REFERENCES = (
    (build, REFERENCE),
    (build_for_images, OF_IMAGES),
    (build_encoder_decoder, OF_PAIRS),
    (build_to_generate, OF_TEXTS),
    (build_for_diffusion, OF_DIFFUSION),
)


def counted(name: str) -> tuple[int | str, str]:
    """Return the number of trainable parameters of a method with its YAML, or why it has none.

    Of a method that trains nothing, the numbers that it computes are counted. Beside it stands the
    model: the first of its kind that the method adapts.
    """
    preset = preset_of(name)
    if preset.get("tasks") == []:  # a method that serves several: counted with one
        preset = {**preset, "tasks": ["task"]}
    fields = method_fields({"name": name, **preset}, "FEATURE_EXTRACTION", STEPS)
    config = build_config(**fields)
    computed, reasons = is_computed(config), []
    needs_head = facts_of(config).replaces_head
    references = ((build_classifier, OF_CLASSES),) if needs_head else REFERENCES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on speed and fit: this model is not trained
        for make, reference in references:
            try:
                model = on_shapes(make, fields)
                if computed:
                    return adapter_parameters(model), reference
                return sum(parameter.numel() for _, parameter in trainable(model)), reference
            except (ModuleKindError, UnsupportedError) as error:
                reasons.append(str(error))
            except InputError as error:
                return str(error), reference
    return reasons[0], REFERENCE
