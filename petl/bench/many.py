"""Section `many`: up to a thousand adapters on one base model, and a thousand adapted modules."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from petl.bench.clocks import seconds, uncollected
from petl.bench.contenders import Contender, stirred
from petl.bench.records import Record
from petl.bench.scale import exponent
from petl.bench.serve import bytes_of, forward
from petl.bench.shapes import Bench, Shape

COUNTS = (1, 10, 100, 1000)  # adapters
LAYERS = 2
PATIENCE = 60  # seconds of adding adapters, after which larger counts are left out
HOSTED = ("lora", "mos", "adapter 48", "compacter 48")
BATCH = (16, 8)  # rows, and tokens of each

MODULES = (140, 280, 560, 1120)  # adapted, of small blocks with seven linear layers each
TINY = {"hidden": 64, "heads": 4, "kv_heads": 2, "ff": 96, "vocabulary": 512}


def adapters(rows: Sequence[Contender], shape: Shape) -> list[Record]:
    """What a further adapter takes, and what many of them cost whoever uses one."""
    return [_adapters(row, shape) for row in rows if row.name in HOSTED]


def _adapters(row: Contender, shape: Shape) -> Record:
    bench = Bench(replace(shape, layers=LAYERS, rows=BATCH[0], length=BATCH[1]))
    row = _fitting(row, bench.shape)
    torch.manual_seed(1)
    model: Any = stirred(row.put(bench, bench.twin())).eval()
    names, sizes, spent = ["default"], [bytes_of(model)], 0.0
    facts: dict[str, float] = {}
    for wanted in COUNTS:
        while len(names) < wanted and spent < PATIENCE:
            config = copy.deepcopy(model.peft_config["default"])
            names.append(f"a{len(names)}")
            spent += seconds(lambda n=names[-1], c=config: model.add_adapter(n, c), shape.device)
            sizes.append(bytes_of(model) if len(names) in COUNTS else 0)
        if len(names) < wanted:
            break
        model.eval()
        mixed = [names[i * len(names) // BATCH[0]] for i in range(BATCH[0])]
        one = _middle(forward(model, bench), shape.device)
        many = _middle(forward(model, bench, adapter_names=mixed), shape.device)
        switch = _middle(lambda: model.set_adapter(names[-1]), shape.device)
        facts |= {f"switch ms, {wanted}": 1000 * switch, f"mixed / one, {wanted}": many / one}
        model.set_adapter("default")
    added = len(names) - 1
    return Record(
        "many",
        f"{shape.name}, {LAYERS} layers, batch of {BATCH[0]} x {BATCH[1]}",
        f"{row.name}, up to {len(names)} adapters",
        is_own=row.is_own,
        counts={"B a further adapter": (max(sizes) - sizes[0]) / max(1, _last(sizes))},
        facts={"add ms": 1000 * spent / max(1, added), **facts},
    )


def _last(sizes: Sequence[int]) -> int:
    """How many adapters had been added when the largest size was taken."""
    return max(index for index, size in enumerate(sizes) if size)


def _middle(action: Callable[[], Any], device: str) -> float:
    return sorted(seconds(action, device) for _ in range(3))[1]


def _fitting(row: Contender, shape: Shape) -> Contender:
    """MoS with the budget that so few layers need."""
    if row.method != "mos":
        return row
    budget = max(2, math.ceil(row.fields["r"] / shape.layers))
    return replace(row, fields={**row.fields, "equivalent_rank": budget})


def modules(rows: Sequence[Contender], shape: Shape) -> list[Record]:
    """How wrapping and state dicts grow with the number of adapted modules."""
    first = {row.method: row for row in reversed(rows) if row.method != "xlora" and not row.theirs}
    return [_modules(row, shape) for row in reversed(first.values())]


def _modules(row: Contender, shape: Shape) -> Record:
    costs: dict[str, list[float]] = {"wrap": [], "read": [], "write": []}
    counts = [count for count in MODULES if row.is_own or count == MODULES[-1]]
    for count in counts:
        bench = Bench(replace(shape, **TINY, layers=count // 7, rows=1, length=4))
        with uncollected():  # a collection costs more the more there is, whatever is measured
            for name, cost in _costs(row, bench).items():
                costs[name].append(cost)
    facts = {f"{name} s": taken[-1] for name, taken in costs.items()}
    if len(counts) > 1:
        facts |= {f"{name} exponent": exponent(counts, taken) for name, taken in costs.items()}
    return Record("many", f"{counts[-1]} linear layers", row.name, is_own=row.is_own, facts=facts)


def _costs(row: Contender, bench: Bench) -> dict[str, float]:
    """Seconds of wrapping, and of reading and writing the adapter's tensors."""
    made: list[Any] = []
    wrap = seconds(lambda: made.append(row.put(bench, bench.base)), "cpu")
    state: list[Any] = []
    read = seconds(lambda: state.append(get_peft_model_state_dict(made[0])), "cpu")
    write = seconds(lambda: set_peft_model_state_dict(made[0], state[0]), "cpu")
    return {"wrap": wrap, "read": read, "write": write}
