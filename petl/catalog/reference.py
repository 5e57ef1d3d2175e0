"""Trainable parameters of each method on one reference model, so that methods can be compared."""

import warnings

import torch
from transformers import AutoModel, BertConfig, PreTrainedModel

from petl.config.compose import preset_of
from petl.config.method_fields import method_fields
from petl.core.dry_run import on_shapes
from petl.core.parameters import trainable
from petl.errors import InputError

REFERENCE = "MiniLM's shape, without a head: a BERT of 6 layers of 384, 22.7 M parameters"
STEPS = 1000  # of the run that methods with a schedule are told of


def build() -> PreTrainedModel:
    """The reference model on the meta device: all-MiniLM-L6-v2, what train.py adapts by default."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):
        return AutoModel.from_config(config)


def count(name: str) -> int | str:
    """Parameters that method `name` trains there with its YAML, or why it cannot adapt it."""
    try:
        fields = method_fields({"name": name, **preset_of(name)}, "FEATURE_EXTRACTION", STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of speed and fit: nobody trains this model
            model = on_shapes(build, fields)
    except InputError as error:
        return str(error)
    return sum(parameter.numel() for _, parameter in trainable(model))
