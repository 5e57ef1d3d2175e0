"""Section `generate`: greedy decoding with the adapter unmerged and merged."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel

from bench.clocks import Step, in_turn
from bench.contenders import Contender
from bench.records import Record
from bench.report import ITSELF
from bench.serve import decoding
from bench.shapes import Bench, Shape

PROMPT, NEW = 16, 24  # tokens


def measure(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each row, relative to the base model; none for an encoder."""
    if not shape.is_decoder:
        return []
    bench = Bench(replace(shape, rows=1, length=PROMPT))
    base = decoding(bench.twin().eval(), bench, NEW)
    return [_record(row, bench, base, rounds) for row in rows if not row.draws]


def _record(row: Contender, bench: Bench, base: Step, rounds: int) -> Record:
    model = row.wrap(bench)
    steps = {ITSELF: base, "unmerged": decoding(model.eval(), bench, NEW)}
    if row.merges:
        steps["merged"] = decoding(merged(model).eval(), bench, NEW)
    device = bench.shape.device
    times = in_turn(base, steps, rounds=rounds, warm_up=1, device=device)
    facts = {}
    if device != "cpu":
        facts = {f"{name} ms / token": times.median(name) * 1000 / NEW for name in steps}
    return row.record(
        "generate",
        f"{bench.shape.name}, {NEW} tokens after {PROMPT}",
        ratios={f"{name} / base": times.over_floor(name) for name in steps if name != ITSELF},
        facts=facts,
    )


def merged(model: PeftModel) -> PeftModel:
    """Return a deep copy of a model with its adapter merged."""
    copied: Any = copy.deepcopy(model)
    copied.merge_adapter()
    return copied
