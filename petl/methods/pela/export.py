"""The plain small model: two linear layers in place of each adapted one.

A folder has config.json and the weights as transformers writes them, and ranks.json with the rank
of each replaced layer by its path.
"""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from petl.core.experts.layer import has_adapted_experts
from petl.core.layers.layer import AdapterLayer, shape_of
from petl.core.model.changed import changed_copy, load_changed, remember
from petl.core.model.linear import LINEAR_KINDS
from petl.core.parameters import quantization_of
from petl.core.spec.config import require
from petl.errors import InputError, UnsupportedError
from petl.methods.pela.method import Pela, PelaAdapter
from petl.system.files.read import read_json

RANKS = "ranks.json"


@torch.no_grad()
def export(model: PeftModel) -> nn.Module:
    """Return a copy of the base model in which the factors are plain linear layers.

    Each adapted layer is `nn.Sequential(Linear(I, R, bias=False), Linear(R, O))` in the dtype of
    the base layer; trained heads are part of the copy. The adapted weights of the base are not
    copied, hooks neither. All parameters of the copy require a gradient. `model` does not change.

    Raises:
        InputError: the active adapter is not PELA's.
        UnsupportedError: the base model is quantized.
    """
    tuner: Any = model.base_model
    require(
        isinstance(getattr(type(tuner), "method", None), Pela),
        f"{type(tuner).__name__} has no low-rank layers to export; pass a model that was wrapped "
        "with method 'pela'",
    )
    base: Any = model.get_base_model()
    if quantization_of(base):
        raise UnsupportedError(
            f"the base model is quantized ({quantization_of(base)}), and its other layers would "
            "stay so: load the adapter onto the model without quantization and export that"
        )
    (name,) = tuner.active_adapters
    if has_adapted_experts(base):
        raise UnsupportedError(
            "the class of the model keeps the weights of experts in one tensor, which has no place "
            "for factors: adapt it without them (exclude_modules=[experts]) to export it"
        )
    changes: dict[int, object] = {}
    for module in base.modules():
        if isinstance(module, AdapterLayer) and name in module.adapters:
            changes[id(module)] = plain_layer(module, name)
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            changes[id(module)] = copy.deepcopy(trained)
    small = changed_copy(base, changes).requires_grad_(True)
    remember(small, RANKS, {"ranks": ranks_of(small)})
    return small


def plain_layer(layer: AdapterLayer, name: str) -> nn.Sequential:
    """The low-rank layer of adapter `name` as two linear layers, on the device of the layer."""
    adapter = cast(PelaAdapter, layer.adapters[name])
    device, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    A, B, bias = adapter.low_A, adapter.low_B, adapter.bias
    plain = low_rank_layer(A.shape[1], len(B), len(A), has_bias=bias is not None)
    for target, value in ((plain[0].weight, A), (plain[1].weight, B), (plain[1].bias, bias)):
        if target is not None and value is not None:
            cast(Tensor, target).copy_(value)
    return plain.to(device, dtype).train(layer.training)


def low_rank_layer(width: int, out: int, rank: int, *, has_bias: bool) -> nn.Sequential:
    """`nn.Sequential(Linear(I, R, bias=False), Linear(R, O))`."""
    parts = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=has_bias)
    return with_weight(nn.Sequential(*parts))


def with_weight(layer: nn.Sequential) -> nn.Sequential:
    """Let `layer.weight` be that of the last linear layer, without registering it again.

    Some models read the dtype of a layer's weight (T5), or initialize it by that name (GPT-2).
    """
    layer.__dict__["weight"] = layer[-1].weight
    return layer


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of each low-rank layer of an exported model, by path."""
    return {
        name: module[0].out_features
        for name, module in model.named_modules()
        if type(module) is nn.Sequential
        and [type(part) for part in module] == [nn.Linear, nn.Linear]
        and module[0].bias is None
    }


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write an exported model: as `save_pretrained` does, and the ranks."""
    model.save_pretrained(folder)


def load(config: PretrainedConfig, folder: str | Path) -> PreTrainedModel:
    """Build an exported model from its folder, in evaluation mode; no base weights are needed.

    Args:
        config: of the base model, such as `AutoConfig.from_pretrained(folder)`.
        folder: what `save` or `petl export --small` wrote.

    Raises:
        InputError: the folder has no ranks, ranks that do not fit the model, or other tensors than
            the model.
    """
    folder = Path(folder)
    ranks = read_json(folder / RANKS, dict[str, dict[str, int]]).get("ranks")
    require(bool(ranks), f"{folder / RANKS} has no ranks; export the model again")
    model = load_changed(
        config, folder, lambda model: put_low_rank(model, ranks, folder / RANKS), RANKS
    )
    for path in ranks:
        # the loader has made new tensors
        with_weight(cast(nn.Sequential, model.get_submodule(path)))
    return model


def put_low_rank(model: nn.Module, ranks: dict[str, int], file: Path) -> None:
    """Replace linear layers of a model by low-rank ones with random values."""
    remember(model, RANKS, {"ranks": ranks})
    for path, rank in ranks.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError as error:
            raise InputError(f"{file} names {path}, which the model lacks") from error
        require(
            isinstance(layer, LINEAR_KINDS),
            f"{file} names {path}, which is {type(layer).__name__} and no linear layer",
        )
        width, out = shape_of(layer)
        require(
            1 <= rank <= min(width, out),
            f"{file} gives {path} rank {rank}, which is not in 1..{min(width, out)}",
        )
        has_bias = getattr(layer, "bias", None) is not None
        model.set_submodule(path, low_rank_layer(width, out, rank, has_bias=has_bias))
