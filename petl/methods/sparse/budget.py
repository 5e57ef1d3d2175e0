"""The number of tuned weights of each layer."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.layers.block import BlockAdapters
from petl.core.layers.layer import LayerShape
from petl.core.spec.checks import rank_of
from petl.core.spec.config import require
from petl.errors import InputError
from petl.methods.sparse.config import SparseConfig

Shapes = Mapping[str, LayerShape]


def deltas_by_module(config: SparseConfig, model: nn.Module, shapes: Shapes) -> dict[str, int]:
    """The number of tuned weights of each target: the same fraction of each, rounded down.

    The targets that `rank_pattern` matches share what they have together by their shares.

    Raises:
        InputError: the number exceeds the weights, or `num_deltas` names other modules.
    """
    sizes = {key: shape.in_features * shape.out_features for key, shape in shapes.items()}
    if config.num_deltas is not None:
        return _given(config.num_deltas, sizes)
    # distributed in proportion to the sizes of the targets
    number, total = _number(config, model, shapes), sum(sizes.values())
    require(
        number <= total,
        f"number of tunable weights {number} exceeds the {total} weights of the target modules; "
        "set a smaller density, r or num_tunable_weights",
    )
    shares = {key: rank_of(config, key, 0) for key in sizes}
    matched = sum(size for key, size in sizes.items() if shares[key])
    weighted = sum(size * shares[key] for key, size in sizes.items())
    deltas = {
        key: number * matched * size * shares[key] // (total * weighted)
        if shares[key]
        else number * size // total
        for key, size in sizes.items()
    }
    for key, count in deltas.items():
        require(
            count <= sizes[key],
            f"rank_pattern gives {key} {count} tuned weights, and it has {sizes[key]}; set a "
            "smaller density, r or num_tunable_weights, or shares that differ less",
        )
    return deltas


def _number(config: SparseConfig, model: nn.Module, shapes: Shapes) -> int:
    if config.num_tunable_weights is not None:
        return config.num_tunable_weights
    if config.r is not None:
        # parameters of a rank-r LoRA
        return config.r * sum(shape.in_features + shape.out_features for shape in shapes.values())
    # of the complete base model
    return int(config.density * base_size(model, set()))


def _given(deltas: dict[str, int], sizes: dict[str, int]) -> dict[str, int]:
    different = sorted(set(deltas) ^ set(sizes))
    if different:
        raise InputError(
            f"num_deltas and target_modules name different modules ({different[0]} is in one "
            "only); set num_deltas=null to distribute the weights again"
        )
    for key, count in deltas.items():
        size = sizes[key]
        require(0 <= count <= size, f"num_deltas of {key} is {count}, not in 0..{size}")
    return {key: deltas[key] for key in sizes}


def base_size(module: nn.Module, seen: set[int]) -> int:
    """Number of base parameters, tied ones counted once, quantized ones by their entries.

    Args:
        seen: ids of the parameters counted so far, to which it adds.
    """
    if isinstance(module, BlockAdapters):  # its block, around it, is counted without it
        return 0
    if isinstance(module, BaseTunerLayer):
        return base_size(module.get_base_layer(), seen)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return base_size(module.original_module, seen)
    size = sum(base_size(child, seen) for child in module.children())
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            # a 4-bit weight packs two entries into a byte
            size += _unpacked_size(module) if name == "weight" else parameter.numel()
    return size


def _unpacked_size(module: Any) -> int:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    return module.weight.numel()
