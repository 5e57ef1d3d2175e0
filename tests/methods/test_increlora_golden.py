"""IncreLoRA against recorded values of the authors' layer and allocator.

FeiyuZhang98/IncreLoRA, loralib/increlora.py at 7cb7830, in float64, on small networks whose weights
and data are the formula `wave`. Two things were set as the paper has them: the reserve is there
before the first step, and the driver's penalty counts the reserve while ranks grow only.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from increlora_fixtures import grows
from torch import Tensor, nn

import petl
from petl.methods.increlora import active_layers, importance_scores


def wave(shape: tuple[int, ...], seed: float, scale: float) -> Tensor:
    n = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(seed + n * n * 0.37 + 1.7 * n)).view(shape)


class Net(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


@dataclass
class Golden:
    """A published run: after each step, task loss, penalty, importances, spreads and ranks."""

    name: str
    widths: list[int]
    lr: float
    fields: dict[str, Any]
    task: list[float]
    penalty: list[float]
    importance: dict[int, list[float]]  # by step, of each module
    spread: dict[int, list[float]]
    ranks: dict[int, list[int]]  # by the step after which they changed
    update: list[tuple[float, float]]  # of each module at the end: sum |dW|, sum dW * wave


BY_STEP = ("importance", "spread", "ranks")
GOLDENS = [
    Golden(**{k: dict(v) if k in BY_STEP else v for k, v in entry.items()})
    for entry in json.loads(Path(__file__).with_name("increlora_golden.json").read_text())
]


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_published_run_is_reproduced(golden: Golden) -> None:
    net = Net(golden.widths)
    for k, layer in enumerate(net.layers):
        layer.weight.data = wave(layer.weight.shape, k + 1, 0.5)
        layer.bias.data = torch.zeros(layer.out_features, dtype=torch.float64)
    fields = {"restart_warmup": False, **golden.fields}
    model = petl.wrap(net, "increlora", **fields).double().train()
    tuner: Any = model.base_model
    layers = list(active_layers(model).values())
    for k, layer in enumerate(layers):
        for i in range(len(layer.E)):
            layer.lora_A.data[i] = wave((1, layer.shape.in_features), 10 * k + i + 0.3, 0.3)[0]
            layer.lora_B.data[:, i] = wave((layer.shape.out_features,), 10 * k + i + 0.6, 0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=golden.lr)
    x, target = wave((7, golden.widths[0]), 0.5, 1.0), wave((7, golden.widths[-1]), 0.9, 1.0)
    weight = golden.fields["orth_reg_weight"]
    ranks = [1] * len(layers)
    for step, (task, penalty) in enumerate(zip(golden.task, golden.penalty, strict=True)):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        assert float(loss.detach()) == pytest.approx(task, rel=1e-6)
        assert float(tuner.context.total()) == pytest.approx(weight * penalty, rel=1e-6)
        grew = grows(model, step)
        optimizer.step()
        assert grew == (step in golden.ranks)
        ranks = golden.ranks.get(step, ranks)
        assert [layer.active_rank for layer in layers] == ranks
        scores = list(importance_scores(model).values())
        for name, wanted in (("I", golden.importance), ("U", golden.spread)):
            if step in wanted:
                assert [s[name] for s in scores] == pytest.approx(wanted[step], rel=1e-5)
    for layer, (size, projection) in zip(layers, golden.update, strict=True):
        delta = layer.delta().detach()
        assert float(delta.abs().sum()) == pytest.approx(size, rel=1e-5)
        at_wave = float((delta * wave(delta.shape, 0.1, 1.0)).sum())
        assert at_wave == pytest.approx(projection, rel=1e-4)
