"""Trainable parameters of each method on one reference model, so that methods can be compared."""

import warnings

import torch
from transformers import AutoModel, BertConfig, PreTrainedModel

from petl.config.compose import preset_of
from petl.config.method_fields import method_fields
from petl.core.dry_run import on_shapes
from petl.core.parameters import trainable
from petl.errors import InputError

REFERENCE = "a BERT of MiniLM's shape without a head (6 layers, width 384, 22.7 M parameters)"
STEPS = 1000  # length of the run, for methods with a schedule (assumption)


def build() -> PreTrainedModel:
    """Build the reference model on the meta device: all-MiniLM-L6-v2, the default of a run."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):  # shapes are enough to count parameters
        return AutoModel.from_config(config)


def count_trainable(name: str) -> int | str:
    """Return the number of trainable parameters of a method with its YAML, or why it has none."""
    try:
        preset = preset_of(name)
        if preset.get("tasks") == []:  # a method that serves several: counted with one
            preset = {**preset, "tasks": ["task"]}
        fields = method_fields({"name": name, **preset}, "FEATURE_EXTRACTION", STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on speed and fit: this model is not trained
            model = on_shapes(build, fields)
    except InputError as error:
        return str(error)
    return sum(parameter.numel() for _, parameter in trainable(model))
