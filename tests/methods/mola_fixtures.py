"""Stacks of linear layers with MoLA on them, and MoLA's equations as loops.

Shapes: I in, O out, R rank of one expert, E experts, K picked, T tokens.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

import petl
from petl import testing

I, O = 12, 10


class Block(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Stack(nn.Module):
    """Linear layers one above the other: the simplest model with a depth."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def wrap_stack(*widths: int, **fields):
    """A wrapped stack whose tensors are all random, so that each of them matters."""
    model = petl.wrap(Stack(*widths), "mola", **{"r": 2, **fields})
    with torch.no_grad():
        for parameter in testing.trainable(model).values():
            parameter.normal_(std=0.5)
    return model


def adapter_of(model, layer: int = 0, name: str = "default"):
    return model.base_model.model.layers[layer].fc.adapters[name]


def double(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter as float64 leaves."""
    return {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}


def softmax(logit_E: Tensor) -> Tensor:
    powers = [math.e**x for x in logit_E]
    return torch.stack([p / sum(powers) for p in powers])


def picks(prob_E: Tensor, k: int) -> list[int]:
    return sorted(range(len(prob_E)), key=lambda e: -float(prob_E[e]))[:k]


def experts_by_loop(x_TI, prob_TE, A, B, *, r: int, k: int, scale: float) -> Tensor:
    """The update of each token, [T, O]: equation 2, one token and one expert at a time."""
    updates = []
    for x, prob in zip(x_TI, prob_TE, strict=True):
        chosen = picks(prob, k)
        update = torch.zeros(B.shape[0], dtype=x.dtype)
        for e in chosen:
            gate = prob[e] / sum(prob[i] for i in chosen)
            A_e, B_e = A[e * r : (e + 1) * r], B[:, e * r : (e + 1) * r]
            update = update + scale * gate * (B_e @ (A_e @ x))
        updates.append(update)
    return torch.stack(updates)


def balance_by_loop(prob_TE: Tensor, k: int) -> Tensor:
    """N sum_e f_e P_e, with f counted and P averaged by a loop."""
    T, E = prob_TE.shape
    count = [0] * E
    for prob in prob_TE:
        for e in picks(prob, k):
            count[e] += 1
    f = [count[e] / (T * k) for e in range(E)]
    return E * sum(f[e] * sum(prob_TE[:, e]) / T for e in range(E))
