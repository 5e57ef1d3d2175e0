"""Any adapter that is one weight update per layer, as a LoRA: exact factors, else an SVD.

Shapes: I in, O out, R rank.
"""

from pathlib import Path
from statistics import mode
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl.core.adapter_file import WEIGHTS, trained_modules
from petl.core.compat import BaseTunerLayer, svd_factors
from petl.core.layers.layer import Adapter, AdapterLayer, Factors
from petl.core.model.targets import matched_names

PREFIX = "base_model.model."  # of every key in an adapter file


@torch.no_grad()
def as_lora(
    model: PeftModel, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors, as they are saved, of the LoRA that equals an adapter.

    The trained copies of `modules_to_save` are among the tensors.
    """
    factors = {
        name.removeprefix(PREFIX): factors_of(layer, adapter_name)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    tensors = {}
    for name, (A, B, _) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    tensors |= trained_modules(model, adapter_name)
    config = lora_config(model, factors, adapter_name)
    return config, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def factors_of(layer: nn.Module, adapter_name: str) -> Factors:
    """A [R, I], B [O, R] and the scale of one layer's update."""
    if isinstance(layer, AdapterLayer):
        (adapter,) = (adapter for _, adapter in layer.pick([adapter_name]))
        assert isinstance(adapter, Adapter)
        exact = adapter.factors()
        if exact is not None:
            return exact
    A, B = svd_factors(layer, adapter_name)
    # B's columns are as long as the singular values: drop those that are rounding
    length_R = B.float().norm(dim=0)
    floor = length_R.max() * torch.finfo(torch.float32).eps * max(*A.shape, *B.shape)
    kept = length_R > floor
    if not kept.any():
        kept[0] = True  # an update of zero is a LoRA of rank 1
    return Factors(A[kept], B[:, kept], 1.0)


def lora_config(model: PeftModel, factors: dict[str, Factors], adapter_name: str) -> LoraConfig:
    """The config of a LoRA with these factors; patterns where ranks or scales differ."""
    config: Any = model.peft_config[adapter_name]
    ranks = {name: len(A) for name, (A, _, _) in factors.items()}
    alphas = {name: scale * ranks[name] for name, (_, _, scale) in factors.items()}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    layers: list[Any] = [model.get_base_model().get_submodule(name) for name in factors]
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        target_modules=shortest_targets(model, list(factors)),
        modules_to_save=list(dict.fromkeys(config.modules_to_save or [])) or None,
        r=rank,
        lora_alpha=whole(alpha),
        rank_pattern=exceptions(ranks, rank),
        alpha_pattern={name: whole(a) for name, a in exceptions(alphas, alpha).items()},
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
    )


def exceptions(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """The entries that are not as usual, longest names first: PEFT takes the first that fits."""
    names = sorted(values, key=lambda name: (-len(name), name))
    return {name: values[name] for name in names if values[name] != usual}


def whole(number: float) -> Any:
    """An int where it is one, as PEFT declares `lora_alpha`."""
    return int(number) if float(number).is_integer() else number


def shortest_targets(model: PeftModel, names: list[str]) -> list[str]:
    """The last parts of `names` if they match just those modules, else `names`."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    short = LoraConfig(target_modules=suffixes)
    found = matched_names(short, model.get_base_model())
    return suffixes if sorted(found) == sorted(names) else sorted(names)


def save_lora(config: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter folder as PEFT does."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
