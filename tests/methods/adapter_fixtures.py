"""Adapters of a model, one of them with random tensors, and a small classifier of images."""

import torch
from peft import PeftModel
from tiny_families import FAMILIES
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import petl


def adapters(model: PeftModel) -> dict[str, nn.Module]:
    """By path in the base model, the adapters called "default"."""
    tuned = {n: m for n, m in model.named_modules() if isinstance(m, petl.AdapterLayer)}
    return {n.removeprefix("base_model.model."): m.adapters["default"] for n, m in tuned.items()}


def one_layer(**fields) -> nn.Module:
    """An adapter on the feed-forward of a ViT block, its tensors random."""
    model = petl.wrap(
        FAMILIES["vit"].build(), "adapter", **{"r": 6, "locations": ["ffn"], **fields}
    )
    adapter = adapters(model)["layers.0.mlp.fc2"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return adapter


def vit_classifier() -> nn.Module:
    torch.manual_seed(0)
    settings = {**FAMILIES["vit"].settings, "hidden_dropout_prob": 0.0, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**settings))
