"""Section `serve`: the rows of one batch through different adapters on one base model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import petl
from bench.clocks import Spread, in_turn
from bench.contenders import LORA, Contender, stirred
from bench.records import Record
from bench.shapes import Bench, Shape

COUNTS = (1, 4, 16, 64)  # adapters
READ = (16, 64)  # rows, and tokens of each: reading prompts
WRITE = (64, 1)  # likewise: decoding from there on
NEW = 6  # tokens that are decoded
SERVED = (
    LORA, "lora", "increlora", "mos", "mola 8/2", "adapter 48", "compacter 48", "binary on lora",
    "sparse 1 %",
)  # fmt: skip


def measure(rows: list[Contender], shape: Shape, rounds: int) -> list[Record]:
    """A record for each served row and each batch; only a decoder decodes."""
    sizes = [WRITE, READ] if shape.is_decoder else [READ]
    found: list[Record] = []
    for row in rows:
        if row.name in SERVED:
            found += _measure(row, shape, sizes, rounds)
    return found


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
        for bench, found in zip(benches, ratios, strict=True):
            if wanted <= bench.shape.rows:
                mixed = [names[i % wanted] for i in range(bench.shape.rows)]
                work = decoding if bench.shape.length == 1 else forward
                base, many = work(bench.base.eval(), bench), work(model, bench, adapter_names=mixed)
                steps = {"many": many}
                times = in_turn(base, steps, rounds=rounds, warm_up=1, device=shape.device)
                found[f"{wanted} adapters"] = times.over_floor("many")
    return [
        Record("serve", _told(bench.shape), row.name, is_own=row.is_own, ratios=found)
        for bench, found in zip(benches, ratios, strict=True)
    ]


def _told(shape: Shape) -> str:
    what = f"{NEW} tokens for {shape.rows} rows" if shape.length == 1 else f"{shape.rows} prompts"
    return f"{shape.name}, {what}" + ("" if shape.length == 1 else f" of {shape.length} tokens")


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


def decoding(model: Any, bench: Bench, **more: Any) -> Callable[[], Any]:
    """Greedy decoding of `NEW` tokens after the batch."""
    ids = bench.batch["input_ids"]
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **fixed, **more
            )

    return run


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
