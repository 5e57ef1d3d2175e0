"""Section `file`: size of the adapter file, and time to wrap, save, load and merge."""

import math
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel

import petl
from bench.clocks import milliseconds, seconds
from bench.contenders import Contender, add_noise
from bench.records import Record
from bench.shapes import Bench, Shape
from petl.core.layers.layer import Adapter

REPEATS = 3


def measure(rows: list[Contender], shape: Shape) -> list[Record]:
    """Return a record for the first row of each method whose adapter is one file."""
    bench = Bench(shape)
    single = (row for row in reversed(rows) if row.method != "xlora" and not row.theirs)
    first = {row.method: row for row in single}
    return [_record(row, bench) for row in reversed(first.values())]


def _record(row: Contender, bench: Bench) -> Record:
    device = bench.shape.device
    with TemporaryDirectory() as folder:
        wraps = []
        for _ in range(REPEATS):
            base = bench.twin(shared=False)
            models: list[PeftModel] = []
            wraps.append(seconds(lambda b=base, m=models: m.append(row.put(bench, b)), device))
        model: Any = add_noise(models[0])
        save = milliseconds(lambda: model.save_pretrained(folder), device, repeats=REPEATS)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        loads = []
        for _ in range(REPEATS):
            base = bench.twin(shared=False)
            loads.append(seconds(lambda b=base: petl.load(b, folder), device))
    facts = {
        "wrap ms": 1000 * statistics.median(wraps),
        "save ms": save,
        "load ms": 1000 * statistics.median(loads),
    }
    if row.merges:
        facts["merge ms"] = 1000 * seconds(model.merge_adapter, device)
    needed = information(row, model)
    return row.record(
        "file",
        bench.shape,
        counts={"bytes": size, "bytes / information": size / needed},
        facts=facts,
    )


def information(row: Contender, model: PeftModel) -> float:
    """Return the bytes that an adapter needs at least: its weights, and the choice of a subset.

    The choice of K of N weights takes log2 of "N choose K" bits.
    """
    total = sum(p.numel() for p in model.parameters() if p.requires_grad) * row.bits / 8
    for module in model.modules():
        if isinstance(module, Adapter) and hasattr(module, "indices"):
            N, K = math.prod(module.shape), len(module.get_buffer("indices"))
            nats = math.lgamma(N + 1) - math.lgamma(K + 1) - math.lgamma(N - K + 1)
            total += nats / math.log(2) / 8
    return total
