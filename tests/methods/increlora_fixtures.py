"""A tiny Llama with IncreLoRA on it, and IncreLoRA's equations component by component."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import petl
from petl.testing import tiny_llama
from petl.testing.models import causal_batch

RESERVE = 1e-5
ADAPTER = "adapter_model.safetensors"
STEPS = 12
FIELDS = {"tinit": 1, "deltaT": 3, "lora_alpha": 8, "target_total_rank": 23, "top_h": 3}


def tokens(rows: int, seed: int = 0) -> dict[str, Tensor]:
    return causal_batch(rows, seed)


def grown(**fields: Any) -> PeftModel:
    """A tiny Llama that grows every second step, with weights that matter."""
    torch.manual_seed(0)
    defaults = {"tinit": 1, "deltaT": 2, "lora_alpha": 8, "restart_warmup": False}
    model = petl.wrap(tiny_llama(2), "increlora", **{**defaults, **fields})
    with torch.no_grad():
        for layer in layers(model).values():
            R = layer.live
            layer.E[:R] = torch.randn(R, 1)
            layer.lora_A.mul_(10)
            layer.lora_B.mul_(10)
    return model.train()


def layers(model: PeftModel) -> dict[str, Any]:
    tuner: Any = model.base_model
    return tuner.active_layers


def dense(layer: Any, *, reserve: int = 0) -> Tensor:
    """The update as the equation has it, component by component."""
    R, (I, O) = int(layer.rank), layer.shape
    update = torch.zeros(O, I)
    for i in range(R + reserve):
        weight = layer.E[i, 0] if i < R else RESERVE
        update = update + weight * torch.outer(layer.lora_B[:, i], layer.lora_A[i])
    return layer.config.lora_alpha / (R + 1e-5) * update


def orthogonality(model: PeftModel, reserve: int) -> Tensor:
    found = []
    for layer in layers(model).values():
        n = int(layer.rank) + reserve
        A, B = layer.lora_A[:n], layer.lora_B[:, :n]
        grams = (A @ A.t(), B.t() @ B)
        found.extend((gram - torch.eye(n)).square().sum().sqrt() for gram in grams)
    return torch.stack(found).mean()


def train(model: PeftModel, steps: range, optimizer: Any) -> list[float]:
    life = petl.lifecycle(model)
    losses = []
    for step in steps:
        loss = model(**tokens(4, seed=step)).loss
        loss.backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trained(model: PeftModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def wrap(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return petl.wrap(
        tiny_llama(2), "increlora", **{**FIELDS, "total_step": STEPS, **fields}
    ).train()


def living(model: PeftModel) -> list[Tensor]:
    """All that counts of each layer, in one order."""
    found = []
    for layer in layers(model).values():
        R = layer.live
        rows = (layer.lora_A[:R], layer.lora_B[:, :R], layer.E[:R])
        found += [t.detach() for t in (*rows, layer.rank, layer.ema, layer.steps[:, :R])]
    return found


def backward(model: PeftModel, step: int) -> float:
    loss = model(**causal_batch(4, step)).loss
    loss.backward()
    return float(loss.detach())
