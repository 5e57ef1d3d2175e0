"""IncreLoRA against recorded values of the authors' layer and allocator.

FeiyuZhang98/IncreLoRA, loralib/increlora.py at 7cb7830, in float64, on small networks whose weights
and data are the formula `wave`. Two things were set as the paper has them: the reserve is there
before the first step, and the driver's penalty counts the reserve while ranks grow only.
"""

from dataclasses import dataclass
from itertools import pairwise
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


GOLDENS = [
    Golden(
        name="grows by one, to the end",
        widths=[6, 8, 5, 4],
        lr=0.4,
        fields={
            "init_r": 1,
            "target_r": 2,
            "rank_step": 1,
            "top_h": 1,
            "tinit": 2,
            "deltaT": 2,
            "beta1": 0.85,
            "beta2": 0.85,
            "lora_alpha": 16,
            "orth_reg_weight": 0.1,
            "advance_learn": True,
        },
        task=[
            0.382983552,
            0.367825544,
            0.353467066,
            0.340010583,
            0.331556985,
            0.334692385,
            0.305158917,
            0.295463841,
            0.269820516,
            0.257556059,
            0.230704028,
        ],
        penalty=[
            1.10388531,
            1.09883794,
            1.09114025,
            1.08134652,
            1.07161757,
            1.14979193,
            1.13815519,
            1.2306347,
            1.21780477,
            0.987683181,
            0.967096978,
        ],
        importance={
            1: [0.000243191164, 0.000356029014, 0.000169729866],
            5: [0.000659832382, 0.00266737831, 0.00300679212],
            10: [0.00140787917, 0.00493493127, 0.00554792898],
        },
        spread={
            1: [0.000206703209, 0.000302604645, 0.000144240912],
            5: [0.000453758379, 0.00169855768, 0.00209517361],
            10: [0.000869297098, 0.00271788753, 0.00310314837],
        },
        ranks={4: [1, 2, 1], 6: [1, 2, 2], 8: [1, 2, 3]},
        update=[(4.67657053, 0.567614901), (7.99861558, 0.167830949), (2.86800782, -0.0598405822)],
    ),
    Golden(
        name="grows by two",
        widths=[5, 9, 7, 6, 3],
        lr=0.2,
        fields={
            "init_r": 1,
            "target_r": 4,
            "rank_step": 2,
            "top_h": 2,
            "tinit": 1,
            "deltaT": 3,
            "beta1": 0.6,
            "beta2": 0.7,
            "lora_alpha": 8,
            "orth_reg_weight": 0.3,
            "advance_learn": True,
        },
        task=[
            0.41484145,
            0.412558621,
            0.41048012,
            0.408546119,
            0.411735685,
            0.411178887,
            0.410620916,
            0.41171915,
            0.411333092,
        ],
        penalty=[
            1.34027034,
            1.33743742,
            1.33451738,
            1.33152409,
            1.59728479,
            1.5951515,
            1.5930147,
            1.85473288,
            1.85103894,
        ],
        importance={
            1: [0.000225093462, 2.98405265e-06, 2.5752036e-05, 8.78885e-05],
            4: [0.000891693949, 3.08600788e-05, 0.000161720392, 0.000343607364],
            8: [0.000785788776, 9.90713203e-05, 0.000418091686, 0.000206992891],
        },
        spread={
            1: [0.000101259757, 1.26689763e-06, 1.15328072e-05, 3.95241695e-05],
            4: [0.000294982008, 1.20160585e-05, 4.89911272e-05, 0.000115975452],
            8: [0.000128291808, 2.21083991e-05, 8.76182893e-05, 6.9225732e-05],
        },
        ranks={3: [3, 1, 1, 3], 6: [5, 1, 1, 5]},
        update=[
            (0.384930547, -0.0528946798),
            (0.0448173284, -0.00373713944),
            (0.19403558, -0.0192870465),
            (0.0379096889, 0.00799740709),
        ],
    ),
    Golden(
        name="without advance learning",
        widths=[6, 8, 5, 4],
        lr=0.4,
        fields={
            "init_r": 1,
            "target_r": 4,
            "rank_step": 1,
            "top_h": 2,
            "tinit": 2,
            "deltaT": 3,
            "beta1": 0.85,
            "beta2": 0.85,
            "lora_alpha": 16,
            "orth_reg_weight": 0.1,
            "advance_learn": False,
        },
        task=[
            0.382986692,
            0.367737025,
            0.353051635,
            0.339385251,
            0.348792208,
            0.332340797,
            0.316253369,
            0.321503168,
            0.305555593,
            0.290544052,
            0.294547299,
            0.279269815,
            0.265362775,
            0.266330838,
            0.249846548,
        ],
        penalty=[
            0.812556068,
            0.80752424,
            0.79877948,
            0.786860641,
            0.950572975,
            0.938792502,
            0.924778672,
            1.10481818,
            1.09313257,
            1.08067836,
            1.27009209,
            1.25959804,
            1.24909848,
            1.47673933,
            1.46843987,
        ],
        importance={
            1: [0.000245285761, 0.000357729132, 0.000171785167],
            7: [0.00141024884, 0.00374540235, 0.00255915575],
            14: [0.00494334978, 0.00782522996, 0.00625099834],
        },
        spread={
            1: [0.000208492897, 0.000304069762, 0.000146017392],
            7: [0.000943064038, 0.00211723334, 0.0013703755],
            14: [0.00213922963, 0.00285574537, 0.00264293102],
        },
        ranks={3: [1, 2, 2], 6: [1, 3, 3], 9: [1, 4, 4], 12: [2, 5, 4]},
        update=[(3.9162091, 0.510387554), (5.22484842, 0.0414089116), (2.54034245, 0.0123347687)],
    ),
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
