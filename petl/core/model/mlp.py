"""The MLP of each block: which linear layers write its channels, and which one reads them.

Shapes: D width of the residual stream, F channels of an MLP, I in, O out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl.core.layers.layer import shape_of
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.structure import feed_forward_layers, owners_of_experts, width_of
from petl.errors import UnsupportedError

# fields of configs, and attributes of modules, that have the number of channels
WIDTH_FIELDS = (
    "intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim",
    "ffn_hidden_size", "hidden_dim", "d_inner",
)  # fmt: skip


@dataclass(frozen=True)
class Mlp:
    """The layers of an MLP by path in the model.

    Attributes:
        inputs: D to F: up, or gate and up; one layer D to 2 F if `fused`.
        down: F to D.
        width: F.
        fused: one layer computes gate and up, whose channels are its two halves.
    """

    inputs: tuple[str, ...]
    down: str
    width: int
    fused: bool


def find_mlp(model: nn.Module, path: str, widths: Iterable[int] = ()) -> Mlp:
    """Return the MLP of the block at `path`, found by the shapes of its linear layers.

    Args:
        widths: numbers of channels that the config names: of several candidates, those count that
            have one of them.

    Raises:
        UnsupportedError: the block is a mixture of experts, or has no MLP of a known form, several
            of them, or one with other layers than nn.Linear and Conv1D.
    """
    block, name = model.get_submodule(path), f"{path} of {type(model).__name__}"
    if owners_of_experts(block):
        raise UnsupportedError(
            f"{name} is a mixture of experts, whose channels cannot be pruned yet; choose a model "
            "with one MLP a block"
        )
    layers, D = feed_forward_layers(block), width_of(block)
    known = {*widths}  # Gemma 3n has low-rank layers of the same form beside its MLP
    found = list(_candidates(layers, D))
    found = [mlp for mlp in found if mlp.width in known] or found
    if len(found) != 1:
        listed = ", ".join(f"{k} {s.in_features} to {s.out_features}" for k, s in layers.items())
        raise UnsupportedError(
            f"{name} has {len(found) or 'no'} MLPs that can be pruned; expected is one, outside of "
            f"attention: a layer {D} to F, or two with a gate, or one {D} to 2 F, then one F to "
            f"{D}; found: {listed or 'no linear layers'}"
        )
    mlp = found[0]
    for each in (*mlp.inputs, mlp.down):
        layer = block.get_submodule(each)
        if type(layer) not in LINEAR_KINDS:
            raise UnsupportedError(
                f"{path}.{each} is {type(layer).__name__}, and only nn.Linear and Conv1D can be "
                "made smaller; load the model without quantization or adapters"
            )
    inputs = tuple(f"{path}.{each}" for each in mlp.inputs)
    return Mlp(inputs, f"{path}.{mlp.down}", mlp.width, mlp.fused)


def _candidates(layers: Mapping[str, tuple[int, int]], D: int) -> Iterator[Mlp]:
    """Yield what may be an MLP among linear layers, with paths as they are given."""
    order = list(layers)
    for down, (F, out) in layers.items():
        if out != D:
            continue
        # of a square one only the order tells which layer reads the channels
        before = order[: order.index(down)] if D == F else [each for each in order if each != down]
        inputs = [each for each in before if layers[each] == (D, F)]
        doubled = [each for each in before if layers[each] == (D, 2 * F)]
        is_last = D != F or down == order[-1]
        if is_last and (0 < len(inputs) <= 2 or (not inputs and len(doubled) == 1)):
            yield Mlp(tuple(inputs or doubled), down, F, fused=not inputs)


# Weights


def matrix_of(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as [O, I]."""
    weight: Any = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def kept_outputs(layer: Any, kept: Tensor) -> dict[int, object]:
    """Return the parameters of a layer with these outputs alone, by the `id` of the given ones."""
    weight = layer.weight.index_select(1 if isinstance(layer, Conv1D) else 0, kept)
    changes: dict[int, object] = {id(layer.weight): _as(layer.weight, weight)}
    if layer.bias is not None:
        changes[id(layer.bias)] = _as(layer.bias, layer.bias[kept])
    return changes


@torch.no_grad()
def kept_inputs(layer: Any, kept: Tensor) -> dict[int, object]:
    """Return the weight of a layer with these inputs alone, by the `id` of the given one."""
    weight = layer.weight.index_select(0 if isinstance(layer, Conv1D) else 1, kept)
    return {id(layer.weight): _as(layer.weight, weight)}


def _as(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)


def note_shape(model: nn.Module, path: str) -> None:
    """Let the attributes of the linear layer at `path`, and of its owner, follow its weight."""
    layer: Any = model.get_submodule(path)
    O, I = matrix_of(layer).shape
    names = ("nx", "nf") if isinstance(layer, Conv1D) else ("in_features", "out_features")
    owner = vars(model.get_submodule(path.rpartition(".")[0]))
    for name, old, new in zip(names, shape_of(layer), (I, O), strict=True):
        owner |= {key: new for key in WIDTH_FIELDS if old != new and owner.get(key) == old}
        setattr(layer, name, new)
