"""A model some of whose linear layers have other widths than its config says: widths.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from petl.core.layers.layer import shape_of
from petl.core.model.changed import remember
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.mlp import matrix_of, note_shape
from petl.core.spec.config import require
from petl.errors import InputError
from petl.system.files.paths import WIDTHS as FILE
from petl.system.files.read import read_json

Widths = Mapping[str, list[int]]  # by path of a linear layer, its inputs and outputs


def read_widths(folder: Path) -> Widths:
    """Return the content of widths.json; empty without the file.

    Raises:
        InputError: it has something else than pairs of numbers from 1.
    """
    file = folder / FILE
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


def put_widths(model: nn.Module, layers: Widths, folder: Path) -> None:
    """Give linear layers of a model other widths; their values are lost."""
    file = folder / FILE  # for messages
    if layers:
        remember_widths(model, layers)
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
        # larger ones would only cost memory: no shrunk model has them
        require(
            width <= before.in_features and out <= before.out_features,
            f"{file} gives {path} {width} inputs and {out} outputs, more than {[*before]}",
        )
        shape = (out, width) if matrix_of(layer) is layer.weight else (width, out)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=layer.weight.dtype))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.new_empty(out))
        note_shape(model, path)


def remember_widths(model: nn.Module, layers: Widths) -> None:
    """Make a model save these widths with its weights."""
    remember(model, FILE, {"layers": layers} if layers else {})
