"""A small Llama with a CorDA adapter, and what to look at in it."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import petl
from petl.testing import tiny_llama
from petl.testing.models import causal_batch

R = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(count: int = 6, rows: int = 1) -> list[dict[str, Tensor]]:
    return [causal_batch(rows, seed=n) for n in range(count)]


def wrap(base: nn.Module | None = None, calibration: Any = None, **fields: Any) -> PeftModel:
    defaults = {"r": R, "lora_alpha": R, "target_modules": TARGETS}
    calibration = batches() if calibration is None else calibration
    base = tiny_llama(2) if base is None else base
    return petl.wrap(base, "corda", calibration=calibration, **{**defaults, **fields})


def layers(model: PeftModel) -> dict[str, Any]:
    tuner: Any = model.base_model
    return tuner.layers("default")


def update(layer: Any) -> Tensor:
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (layer.scaling["default"] * B @ A).detach()


@torch.no_grad()
def stir(model: PeftModel) -> PeftModel:
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def moments(base: nn.Module, data: list[dict[str, Tensor]], norm: str) -> dict[str, Tensor]:
    """Step 1 from captured inputs, sample by sample, in float64."""
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, out, name=name: inputs.setdefault(name, []).append(args[0])
        )
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in TARGETS
    ]
    with torch.no_grad():
        for batch in data:
            base.eval()(**batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, seen in inputs.items():
        total, count = 0, 0
        for x, batch in zip(seen, data, strict=True):
            for row, mask in zip(x, batch["attention_mask"], strict=True):
                X = row[mask.bool()].double()
                most = X.max().abs() if norm == "signed_max" else X.abs().max()
                X = X if norm == "none" else X / most
                total, count = total + X.t() @ X, count + 1
        found[name] = total / count
    return found
