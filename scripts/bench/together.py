"""Section `together`: adapters that train in one pass over one base, over one pass for each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import petl
from bench.clocks import Spread, in_turn
from bench.contenders import Contender, add_noise
from bench.records import Record
from bench.shapes import Bench, Shape
from petl.training.together.group import AdapterGroup, Member, share_weights

COUNTS = (2, 4, 8)  # adapters
SIZES = ((1, 16), (1, 64), (4, 64))  # rows of an adapter, and tokens of a row
TRAINED = ("lora", "increlora", "mos", "mola 8/2", "adapter 48", "compacter 48")


def measure(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each row that can train together and each size of a batch."""
    return [
        _measure(row, replace(shape, rows=n, length=tokens), rounds)
        for row in rows
        if row.name in TRAINED
        for n, tokens in SIZES
    ]


def _measure(row: Contender, shape: Shape, rounds: int) -> Record:
    bench = Bench(shape)
    base = bench.twin()
    members: list[Member] = []
    for seed in range(max(COUNTS)):
        torch.manual_seed(seed)
        model = add_noise(row.put(bench, share_weights(base)))
        petl.fuse_lora(model)
        members.append(Member(model.train()))
    batches = [shape.batch(seed) for seed in range(max(COUNTS))]
    ratios: dict[str, Spread] = {}
    for count in COUNTS:
        group = AdapterGroup()
        for member in members[:count]:
            group.join(member)
        one, many = alone(members[:count], batches), {"together": pass_of(group, batches[:count])}
        times = in_turn(one, many, rounds=rounds, warm_up=2, device=shape.device)
        ratios[f"{count} adapters"] = times.over_floor("together")
        group.dissolve()
    title = f"{shape.name}, {shape.rows} x {shape.length} tokens an adapter"
    return Record("together", title, row.name, is_own=row.is_own, ratios=ratios)


def alone(members: Sequence[Member], batches: Sequence[Any]) -> Callable[[], None]:
    """Return a function that makes a forward and backward pass of each member alone."""

    def run() -> None:
        for member, batch in zip(members, batches, strict=False):
            member.model(**batch).loss.backward()
        clear(members)

    return run


def pass_of(group: AdapterGroup, batches: Sequence[Any]) -> Callable[[], None]:
    """Return a function that makes one forward and backward pass of all members."""

    def run() -> None:
        group.backward(group.losses(batches))
        clear(group.members)

    return run


def clear(members: Sequence[Member]) -> None:
    """Clear the gradients, as an optimizer does."""
    for member in members:
        for parameter in member.trained:
            parameter.grad = None
