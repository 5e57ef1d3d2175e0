"""Section `serve`: batches whose rows use different adapters of one base model.

A call of `generate` keeps the adapters that it has stacked for the next one with the same rows.
Calls that find them are measured, and the first call, which stacks them, in a column of its own.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import petl
from bench.clocks import Spread, in_turn
from bench.contenders import LORA, Contender, add_noise
from bench.records import Record
from bench.shapes import Bench, Shape

COUNTS = (1, 4, 16, 64)  # adapters
PREFILL = (16, 64)  # number of rows, and tokens per row
DECODE = (64, 1)  # likewise
NEW = 6  # tokens to decode
SERVED = (
    LORA, "lora", "increlora", "mos", "mola 8/2", "adapter 48", "compacter 48", "binary on lora",
    "sparse 1 %",
)  # fmt: skip
# of a call with 64 adapters that finds them stacked; sparse updates are not
GOALS = {"mola 8/2": 2.0, **dict.fromkeys(
    ("lora", "increlora", "mos", "adapter 48", "compacter 48", "binary on lora"), 1.3
)}  # fmt: skip


def measure(rows: list[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each served row and each batch; encoders do not decode."""
    sizes = [DECODE, PREFILL] if shape.is_decoder else [PREFILL]
    records: list[Record] = []
    for row in rows:
        if row.name in SERVED:
            records += _measure(row, shape, sizes, rounds)
    return records


def _measure(
    row: Contender, shape: Shape, sizes: Sequence[tuple[int, int]], rounds: int
) -> list[Record]:
    benches = [Bench(replace(shape, rows=r, length=n)) for r, n in sizes]
    model = served(row, benches[0])
    names = ["default"]
    ratios: list[dict[str, Spread]] = [{} for _ in benches]
    for wanted in COUNTS:
        while len(names) < wanted:
            names.append(f"a{len(names)}")
            model.add_adapter(names[-1], copy.deepcopy(model.peft_config[names[0]]))
        model.eval()
        for bench, own in zip(benches, ratios, strict=True):
            if wanted <= bench.shape.rows:
                mixed = [names[i % wanted] for i in range(bench.shape.rows)]
                work = decoding if bench.shape.length == 1 else forward
                base, many = work(bench.base.eval(), bench), work(model, bench, adapter_names=mixed)
                steps = {"many": many}
                if wanted == max(COUNTS) and work is decoding:
                    steps |= first_call(model, many)
                times = in_turn(base, steps, rounds=rounds, warm_up=1, device=shape.device)
                own[f"{wanted} adapters"] = times.over_floor("many")
                if "first" in steps:
                    own[f"{wanted} adapters, first call"] = times.over_floor("first")
    return [
        row.record("serve", _title(bench.shape), ratios=own, facts=goals(row, bench.shape, own))
        for bench, own in zip(benches, ratios, strict=True)
    ]


def first_call(model: Any, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Return steps of which the last, "first", is a call that finds nothing stacked.

    Nothing for PEFT's LoRA, of which each call is one.
    """
    kept = getattr(model.base_model, "kept_rows", None)
    # forgotten in a step of its own, whose time is not used: freeing memory takes time too
    return {} if kept is None else {"forget": kept.forget, "first": call}


def goals(row: Contender, shape: Shape, ratios: Mapping[str, Spread]) -> dict[str, float]:
    """Return the goal of a row that decodes with as many adapters as it is for."""
    found = {"goal 64 adapters": GOALS[row.name]} if row.name in GOALS else {}
    return found if shape.length == 1 and "64 adapters" in ratios else {}


def _title(shape: Shape) -> str:
    # part of the key of a record: changes break comparisons with earlier results
    what = f"{NEW} tokens for {shape.rows} rows" if shape.length == 1 else f"{shape.rows} prompts"
    return f"{shape.name}, {what}" + ("" if shape.length == 1 else f" of {shape.length} tokens")


def served(row: Contender, bench: Bench) -> Any:
    """Return a model of the bench with this adapter, in evaluation mode."""
    torch.manual_seed(1)
    model = add_noise(row.put(bench, bench.twin()))
    if not row.theirs:
        petl.fuse_lora(model)
    return model.eval()


def forward(model: Any, bench: Bench, **more: Any) -> Callable[[], Any]:
    """Return a function that makes a forward pass of the batch without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(input_ids=bench.batch["input_ids"], **more)

    return run


def decoding(model: Any, bench: Bench, new: int = NEW, **more: Any) -> Callable[[], Any]:
    """Return a function that decodes `new` tokens after the batch, greedily."""
    ids = bench.batch["input_ids"]
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **fixed, **more
            )

    return run


def bytes_of(model: torch.nn.Module) -> int:
    """Return the bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
