"""Section `compile`: a training step with `torch.compile`, relative to the same step without."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.clocks import in_turn
from bench.contenders import Contender
from bench.records import Record
from bench.shapes import Bench, Shape
from bench.step import UNFIT
from petl.errors import first_line

LAYERS = 1  # compilation takes seconds per layer, and further layers behave like the first


def measure(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each row."""
    bench = Bench(replace(shape, layers=LAYERS))
    return [_record(row.fitting(LAYERS), bench, rounds) for row in rows if not row.recomputes]


def _record(row: Contender, bench: Bench, rounds: int) -> Record:
    """Compiled over eager; or the reason why it cannot be compiled, such as a missing compiler."""
    model = row.wrap(bench)
    torch.compiler.reset()
    counters.clear()
    compiled_model: Any = torch.compile(model)
    eager, compiled = bench.step(model), bench.step(compiled_model)
    start = time.perf_counter()
    try:
        compiled()
    except UNFIT as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return row.record("compile", bench.shape, failed=reason)
    compile_seconds = time.perf_counter() - start
    breaks = sum(counters["graph_break"].values())
    device = bench.shape.device
    times = in_turn(eager, {"compiled": compiled}, rounds=rounds, warm_up=1, device=device)
    return row.record(
        "compile",
        bench.shape,
        ratios={"compiled / eager": times.over_floor("compiled")},
        counts={"graph breaks": breaks},
        facts={"seconds to compile": compile_seconds},
    )
