"""Section `together`: adapters that train in one pass over one base, over one pass for each.

Groups have as many adapters as `petl.train_together` puts into a pass, so many large batches take
several passes. Memory is counted by the bytes of tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import petl
from bench.clocks import Spread, in_turn
from bench.contenders import Contender, add_noise
from bench.records import Record
from bench.shapes import Bench, Shape
from petl.core.model.copies import share_weights
from petl.core.parameters import LiveBytes
from petl.efficiency.together.batches import room_for
from petl.efficiency.together.group import AdapterGroup, Member

COUNTS = (2, 4, 8)  # adapters
SIZES = ((1, 16), (1, 64), (4, 64))  # rows of an adapter, and tokens of a row
TRAINED = ("lora", "increlora", "mos", "mola 8/2", "adapter 48", "compacter 48")
GOALS = {  # of LoRA's largest group, by shape and size
    "llama": dict(zip(SIZES, (0.48, 0.78, 1.0), strict=True)),
    "minilm": dict(zip(SIZES, (0.42, 0.68, 0.9), strict=True)),
}
GOAL_PEAK = 1.05


def measure(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each row that can train together and each size of a batch.

    Others than LoRA are measured at the smallest size alone: the larger ones take minutes each.
    """
    return [
        _measure(row, replace(shape, rows=n, length=tokens), rounds)
        for row in rows
        if row.name in TRAINED
        for n, tokens in (SIZES if row.name == "lora" else SIZES[:1])
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
    room = room_for(batches[:1])
    for count in COUNTS:
        if room < count < max(COUNTS):  # several full passes, as the largest number is
            continue
        groups = grouped(members[:count], room)
        one, many = alone(members[:count], batches), {"together": passes_of(groups, batches)}
        times = in_turn(one, many, rounds=rounds, warm_up=1, device=shape.device)
        ratios[f"{count} adapters"] = times.over_floor("together")
        for group in groups:
            group.dissolve()
    goal = GOALS.get(shape.name, {}).get((shape.rows, shape.length))
    bounded = row.name == "lora" and goal is not None
    return row.record(
        "together",
        f"{shape.name}, {shape.rows} x {shape.length} tokens an adapter",
        ratios=ratios,
        counts={"peak / parts": peak_over_parts(members, batches)},
        facts={"goal 8 adapters": goal, "goal peak": GOAL_PEAK} if bounded else {},
    )


def grouped(members: Sequence[Member], room: int) -> list[AdapterGroup]:
    """Return groups of these members, of at most `room` each."""
    groups: list[AdapterGroup] = []
    for start in range(0, len(members), room):
        groups.append(AdapterGroup())
        for member in members[start : start + room]:
            groups[-1].join(member)
    return groups


def peak_over_parts(members: Sequence[Member], batches: Sequence[Any]) -> float:
    """Return the peak bytes of a pass of one group over what its parts take.

    These are the weights of the base, once, the weights of each adapter, and what the pass of each
    adapter alone has alive at its peak.
    """
    room = room_for(batches[:1])
    (group,) = grouped(members[:room], room)
    alone(members[:1], batches)()  # compute what modules keep from their first pass
    one = peak(alone(members[:1], batches), group.members)
    many = passes_of([group], batches)
    many()  # stacks the weights, which are not counted as a part of the pass
    together = peak(many, group.members)
    held = bytes_held(group.members)
    group.dissolve()
    return (held + together) / (held + len(group.members) * one)


def peak(run: Callable[[], None], members: Sequence[Member]) -> int:
    """Return the largest number of bytes of tensors that `run` has alive, without the weights."""
    with LiveBytes(weights_of(members)) as live:
        run()
    return live.peak


def bytes_held(members: Sequence[Member]) -> int:
    """Return the bytes of all weights; those that members share count once."""
    storages = (tensor.untyped_storage() for tensor in weights_of(members))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def weights_of(members: Sequence[Member]) -> list[Tensor]:
    """Return parameters and buffers of the members' models."""
    return [t for m in members for t in (*m.model.parameters(), *m.model.buffers())]


def alone(members: Sequence[Member], batches: Sequence[Any]) -> Callable[[], None]:
    """Return a function that makes a forward and backward pass of each member alone."""

    def run() -> None:
        for member, batch in zip(members, batches, strict=False):
            member.model(**batch).loss.backward()
        clear(members)

    return run


def passes_of(groups: Sequence[AdapterGroup], batches: Sequence[Any]) -> Callable[[], None]:
    """Return a function that makes a forward and backward pass of each group."""

    def run() -> None:
        start = 0
        for group in groups:
            end = start + len(group.members)
            group.backward(group.losses(batches[start:end]))
            clear(group.members)
            start = end

    return run


def clear(members: Sequence[Member]) -> None:
    """Clear the gradients, as an optimizer does."""
    for member in members:
        for parameter in member.trained:
            parameter.grad = None
