"""Section `serve`: the rows of one batch through different adapters on one base model."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import petl
from petl.bench.clocks import Spread, in_turn, milliseconds
from petl.bench.contenders import LORA, Contender, stirred
from petl.bench.records import Record
from petl.bench.report import ITSELF
from petl.bench.shapes import Bench, Shape

COUNTS = (1, 4, 16, 64)  # adapters
BATCHES = ((64, 1), (16, 64))  # rows, and tokens of each: decoding, and reading a prompt
SERVED = (LORA, "lora", "mos", "mola 8/2", "adapter 48", "compacter 48")


def measure(rows: list[Contender], shape: Shape, rounds: int) -> list[Record]:
    """A record for each served row and each batch."""
    found: list[Record] = []
    for row in rows:
        if row.name in SERVED:
            found += _measure(row, shape, rounds)
    return found


def _measure(row: Contender, shape: Shape, rounds: int) -> list[Record]:
    benches = [Bench(replace(shape, rows=r, length=n)) for r, n in BATCHES]
    model = served(row, benches[0])
    names = ["default"]
    ratios: list[dict[str, Spread]] = [{} for _ in benches]
    sizes = [bytes_of(model)]
    for wanted in COUNTS:
        while len(names) < wanted:
            names.append(f"a{len(names)}")
            model.add_adapter(names[-1], copy.deepcopy(model.peft_config[names[0]]))
            if len(names) == 2:
                sizes.append(bytes_of(model))
        model.eval()
        for bench, found in zip(benches, ratios, strict=True):
            if wanted <= bench.shape.rows:
                mixed = [names[i % wanted] for i in range(bench.shape.rows)]
                steps = {
                    f"{wanted} adapters": forward(model, bench, adapter_names=mixed),
                    ITSELF: forward(bench.base.eval(), bench),
                }
                times = in_turn(steps[ITSELF], steps, rounds=rounds, warm_up=1, device=shape.device)
                found[f"{wanted} adapters"] = times.over_floor(f"{wanted} adapters")
    switches = iter(names * 2)
    switch = milliseconds(lambda: model.set_adapter(next(switches)), shape.device)
    return [
        Record(
            "serve",
            str(bench.shape),
            row.name,
            is_own=row.is_own,
            ratios=found,
            counts={"B a further adapter": sizes[1] - sizes[0]},
            facts={"switch ms": switch},
        )
        for bench, found in zip(benches, ratios, strict=True)
    ]


def served(row: Contender, bench: Bench) -> Any:
    """A model of the bench with this adapter, ready for inference."""
    torch.manual_seed(1)
    model = stirred(row.put(bench, bench.twin()))
    if not row.theirs:
        petl.fuse_lora(model)
    return model.eval()


def forward(model: Any, bench: Bench, **more: Any) -> Callable[[], Any]:
    """A forward pass of the batch without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(input_ids=bench.batch["input_ids"], **more)

    return run


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
