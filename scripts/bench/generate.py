"""Section `generate`: greedy decoding with the adapter unmerged and merged."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from bench.clocks import Step, in_turn
from bench.contenders import Contender
from bench.records import Record
from bench.report import ITSELF
from bench.shapes import Bench, Shape

PROMPT, NEW = 16, 24  # tokens


def measure(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each row, relative to the base model; none for an encoder."""
    if not shape.is_decoder:
        return []
    bench = Bench(replace(shape, rows=1, length=PROMPT))
    base = _generating(bench.twin(), bench)
    return [_record(row, bench, base, rounds) for row in rows if not row.draws]


def _record(row: Contender, bench: Bench, base: Step, rounds: int) -> Record:
    model = row.wrap(bench)
    steps = {ITSELF: base, "unmerged": _generating(model, bench)}
    if row.merges:
        steps["merged"] = _generating(merged(model), bench)
    device = bench.shape.device
    times = in_turn(base, steps, rounds=rounds, warm_up=1, device=device)
    facts = {}
    if device != "cpu":
        facts = {f"{name} ms / token": times.median(name) * 1000 / NEW for name in steps}
    return Record(
        "generate",
        f"{bench.shape.name}, {NEW} tokens after {PROMPT}",
        row.name,
        is_own=row.is_own,
        ratios={f"{name} / base": times.over_floor(name) for name in steps if name != ITSELF},
        facts=facts,
    )


def merged(model: PeftModel) -> PeftModel:
    """Return a deep copy of a model with its adapter merged."""
    copied: Any = copy.deepcopy(model)
    copied.merge_adapter()
    return copied


def _generating(model: Any, bench: Bench) -> Step:
    model.eval()
    ids = bench.batch["input_ids"]
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}

    def run() -> None:
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed)

    return run
