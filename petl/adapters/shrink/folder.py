"""A folder with a shrunk model: the weights, and widths.json where MLPs have unequal widths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from petl.adapters.shrink.config import odd_parameters
from petl.core.layers.layer import shape_of
from petl.core.model.changed import load_changed
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.mlp import matrix_of, note_shape
from petl.core.spec.config import require
from petl.errors import InputError, first_line
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.training.ranks.importance import blocks_of

WIDTHS = "widths.json"
Widths = Mapping[str, list[int]]  # by path of a linear layer, its inputs and outputs


def widths_in(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return inputs and outputs of the layers that differ from the model's config, by path."""
    odd = {name.rpartition(".")[0] for name in odd_parameters(model, blocks_of(model))}
    paths = [path for path, _ in model.named_modules() if path in odd]
    return {path: [*shape_of(model.get_submodule(path))] for path in paths}


def write_widths(model: PreTrainedModel, folder: Path) -> None:
    """Write widths.json into a model's folder, if the class of the model needs it."""
    layers = widths_in(model)
    if layers:
        write_atomic(folder / WIDTHS, as_json({"layers": layers}, in_order=True))


def read_widths(folder: Path) -> Widths:
    """Return the content of widths.json; empty without the file.

    Raises:
        InputError: it has something else than pairs of numbers from 1.
    """
    file = folder / WIDTHS
    if not file.is_file():
        return {}
    layers = read_json(file, dict[str, dict[str, list[int]]]).get("layers", {})
    for path, sizes in layers.items():
        require(
            len(sizes) == 2 and min(sizes) >= 1,
            f"{file} gives {path} the sizes {sizes}, not two numbers from 1: inputs and outputs",
        )
    require(bool(layers), f"{file} names no layers; write it again with petl shrink")
    return layers


def load_shrunk(folder: str | Path) -> PreTrainedModel:
    """Load a model that `petl shrink` wrote, with equal or unequal widths, in evaluation mode.

    The class and the dtype are those that were saved.

    Raises:
        InputError: there is no such model, or widths.json does not fit it.
    """
    folder = Path(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    return load_with(config, folder, read_widths(folder))


def load_with(config: PretrainedConfig, folder: Path, layers: Widths) -> PreTrainedModel:
    """Load a model some of whose layers have other widths than its config says."""
    return load_changed(config, folder, lambda model: put_widths(model, layers, folder), WIDTHS)


def put_widths(model: nn.Module, layers: Widths, folder: Path) -> None:
    """Give linear layers of a model other widths; their values are lost."""
    file = folder / WIDTHS
    for path, (width, out) in layers.items():
        try:
            layer: Any = model.get_submodule(path)
        except AttributeError as error:
            raise InputError(f"{file} names {path}, which the model lacks") from error
        require(
            isinstance(layer, LINEAR_KINDS),
            f"{file} names {path}, which is {type(layer).__name__} and no linear layer",
        )
        before = shape_of(layer)
        require(
            width <= before.in_features and out <= before.out_features,
            f"{file} gives {path} {width} inputs and {out} outputs, more than {[*before]}",
        )
        shape = (out, width) if matrix_of(layer) is layer.weight else (width, out)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=layer.weight.dtype))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.new_empty(out))
        note_shape(model, path)
