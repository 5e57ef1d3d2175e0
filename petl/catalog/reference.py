"""Trainable parameters of each method on one reference model, so that methods can be compared.

A method for images or for diffusion models only is counted on another one.
"""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BertConfig, PreTrainedModel, ViTConfig

from petl.config.command_line import preset_of
from petl.core.parameters import trainable
from petl.core.registry import on_shapes
from petl.errors import InputError, ModuleKindError
from petl.runs.settings import method_fields

REFERENCE = "a BERT of MiniLM's shape without a head (6 layers, width 384, 22.7 M parameters)"
OF_IMAGES = "a ViT-B/16 without a head (12 layers, width 768, 86.4 M parameters)"
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


class Block(nn.Module):
    """A block of a U-Net, of which only the channels are known."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels


def build_for_diffusion() -> nn.Module:
    """Return what a method for U-Nets reads of Stable Diffusion's to count its parameters.

    It has no weights and no `forward`.
    """
    model: Any = nn.Module()
    parts = [nn.Module() for _ in range(1 + len(DECODER))]
    for part, channels in zip(parts, (((1280, 1280),), *DECODER), strict=True):
        part.add_module("resnets", nn.ModuleList(Block(*pair) for pair in channels))
    model.mid_block, model.up_blocks = parts[0], nn.ModuleList(parts[1:])
    return model


def count_trainable(name: str) -> int | str:
    """Return the number of trainable parameters of a method with its YAML, or why it has none."""
    return counted(name)[0]


MODELS: tuple[tuple[Any, str], ...] = (
    (build, REFERENCE),
    (build_for_images, OF_IMAGES),
    (build_for_diffusion, OF_DIFFUSION),
)


def counted(name: str) -> tuple[int | str, str]:
    """Return `count_trainable`, and the model: the first of `REFERENCE`, `OF_IMAGES` and
    `OF_DIFFUSION` whose kind the method adapts.
    """
    preset = preset_of(name)
    if preset.get("tasks") == []:  # a method that serves several: counted with one
        preset = {**preset, "tasks": ["task"]}
    fields = method_fields({"name": name, **preset}, "FEATURE_EXTRACTION", STEPS)
    reasons = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on speed and fit: this model is not trained
        for make, reference in MODELS:
            try:
                model = on_shapes(make, fields)
                return sum(parameter.numel() for _, parameter in trainable(model)), reference
            except ModuleKindError as error:
                reasons.append(str(error))
            except InputError as error:
                return str(error), reference
    return reasons[0], REFERENCE
