"""Section `shrink`: the forward pass of a shrunk model, relative to the dense model's.

Goals: at most the share of the multiplications that is left, and 5 % of the dense pass; shrinking
itself costs at most 1.2 passes over its calibration rows.
"""

from typing import Any

import torch
from torch import Tensor

import petl
from bench import counters
from bench.clocks import in_turn
from bench.records import Record
from bench.shapes import Bench, Shape

SPARSITY, BATCHES = 0.5, 16
ABOVE, GOAL_COST = 0.05, 1.2


def measure(shape: Shape, rounds: int, batches: int = BATCHES) -> list[Record]:
    """Return the record of the forward pass, and of the cost of `petl.shrink`."""
    model: Any = Bench(shape).twin(shared=False).eval()
    rows = [{"input_ids": shape.batch(seed)["input_ids"]} for seed in range(batches)]
    small = petl.shrink(model, rows, sparsity=SPARSITY).model
    with torch.no_grad():
        forward = in_turn(
            lambda: model(**rows[0]).logits,
            {"small": lambda: small(**rows[0]).logits},
            rounds=rounds,
            warm_up=1,
            device=shape.device,
        )
        cost = in_turn(
            lambda: [model(**batch).logits for batch in rows],
            {"shrink": lambda: petl.shrink(model, rows, sparsity=SPARSITY)},
            rounds=rounds,
            warm_up=0,
            device=shape.device,
        )
    # of attention, which the counter leaves out: queries with keys, and with values
    attention = 4 * shape.tokens * shape.length * shape.hidden * shape.layers
    left = (flops(small, rows[0]) + attention) / (flops(model, rows[0]) + attention)
    return [
        Record(
            "shrink",
            str(shape),
            f"sparsity {SPARSITY}",
            ratios={
                "time / dense": forward.over_floor("small"),
                "time / passes": cost.over_floor("shrink"),
            },
            counts={"multiplications left": left},
            facts={"goal dense": left + ABOVE, "goal passes": GOAL_COST},
        )
    ]


def flops(model: Any, batch: dict[str, Tensor]) -> int:
    """Return the FLOPs of the products of linear layers in a forward pass."""
    return counters.flops(lambda: model(**batch).logits)
