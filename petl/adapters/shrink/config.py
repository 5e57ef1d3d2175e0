"""The fields of a config that hold the number of channels or heads, and what they describe."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petl.core.layers.class_swap import original_class
from petl.core.model.mlp import WIDTH_FIELDS

Config = Any  # a PretrainedConfig, of any class


def configs_of(config: Config) -> Iterator[Config]:
    """Yield a config and those inside it."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):  # it may be null
            yield from configs_of(inner)


def width_fields(config: Config) -> Iterator[tuple[Config, str, int | list[int]]]:
    """Yield each field with a number of channels, as (config, name, value)."""
    for each in configs_of(config):
        for name in WIDTH_FIELDS:  # BART has two of them
            if name in vars(each):
                value = getattr(each, name)
                # GPT-2 and its relatives mean four times the width by null
                yield each, name, 4 * each.hidden_size if value is None else value


def widths_of(config: Config) -> set[int]:
    """Return the numbers of channels that a config names."""
    values = [value for _, _, value in width_fields(config)]
    return {n for value in values for n in (value if isinstance(value, list) else [value])}


def set_widths(config: Config, new: Mapping[int, int]) -> None:
    """Replace numbers of channels in a config, by the number that stands there."""
    for each, name, value in width_fields(config):
        found = [new.get(n, n) for n in value] if isinstance(value, list) else new.get(value, value)
        if found != value:  # null stays null
            setattr(each, name, found)


def set_list(config: Config, counts: Sequence[int]) -> None:
    """Set the number of channels of each block, where a config has a list of them."""
    for each, name, value in width_fields(config):
        if isinstance(value, list) and len(value) == len(counts):
            setattr(each, name, [*counts])


def odd_parameters(model: PreTrainedModel, blocks: Collection[str]) -> list[str]:
    """Return the parameters of blocks that have another shape than the model's config says."""
    # a copy: some classes write into the config that they are built from
    with torch.device("meta"):
        built: nn.Module = original_class(model)(copy.deepcopy(model.config))
    shapes = {name: p.shape for name, p in built.named_parameters()}
    inside = tuple(f"{path}." for path in blocks)
    return [
        name
        for name, p in model.named_parameters()
        # a task may have changed the head
        if name.startswith(inside) and shapes.get(name, p.shape) != p.shape
    ]
