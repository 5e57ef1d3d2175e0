"""Section `many`: up to a thousand adapters on one base model, and a thousand adapted modules."""

import copy
import gc
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict

import petl
from bench.apart import resident
from bench.clocks import Spread, in_turn, milliseconds, seconds, uncollected
from bench.contenders import Contender
from bench.records import Record
from bench.scale import exponent
from bench.serve import bytes_of, forward, served
from bench.shapes import Bench, Shape

COUNTS = (1, 10, 100, 1000)  # adapters
LAYERS = 2
PATIENCE = 20  # seconds of adding adapters, after which larger counts are left out
ROOM = 2e9  # bytes of adapters, likewise
HOSTED = (
    "lora", "increlora", "mos", "mola 8/2", "adapter 48", "compacter 48", "binary on lora",
    "sparse 1 %",
)  # fmt: skip
BATCHES = ((16, 8), (64, 1))  # rows, and tokens of each

MODULES = (140, 280, 560, 1120)  # adapted, of small blocks with seven linear layers each
TINY = {"hidden": 64, "heads": 4, "kv_heads": 2, "ff": 96, "vocabulary": 512}


def adapters(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """What a further adapter takes, and what many of them cost whoever uses one."""
    return [
        record for row in rows if row.name in HOSTED for record in _adapters(row, shape, rounds)
    ]


def _adapters(row: Contender, shape: Shape, rounds: int) -> list[Record]:
    small = replace(shape, layers=LAYERS)
    benches = [Bench(replace(small, rows=r, length=n)) for r, n in BATCHES]
    row = row.fitting(small.layers)
    model = served(row, benches[0])
    gc.collect()  # what came before must not be given back meanwhile
    names, empty, before = ["default"], bytes_of(model), resident()
    records: list[Record] = []
    spent, own = 0.0, 0.0
    for wanted in COUNTS:
        took = []
        while len(names) < wanted and spent + sum(took) < PATIENCE and own * wanted < ROOM:
            config = copy.deepcopy(model.peft_config["default"])
            names.append(f"a{len(names)}")
            took.append(seconds(lambda n=names[-1], c=config: model.add_adapter(n, c), "cpu"))
            if len(names) == 2:
                own = bytes_of(model) - empty
        if len(names) < wanted:
            break
        spent += sum(took)
        held = {} if wanted == 1 else {"B each": (bytes_of(model) - empty) / (wanted - 1)}
        facts = {} if not took else {"add ms": 1000 * statistics.fmean(took)}
        if wanted >= 100:  # fewer are lost in what the allocator holds
            facts["resident B each"] = (resident() - before) / (wanted - 1)
        records.append(
            Record(
                "many",
                f"{shape.name}, {LAYERS} layers",
                f"{row.name}, {wanted}",
                is_own=row.is_own,
                counts=held,
                ratios=_mixed(model.eval(), benches, names, rounds),
                facts={**facts, **_moves(model, names)},
            )
        )
    return records


def _mixed(
    model: Any, benches: Sequence[Bench], names: Sequence[str], rounds: int
) -> dict[str, Spread]:
    """Batches through as many adapters as there are, or rows, over the same through one."""
    found = {}
    for bench in benches:
        rows, length = bench.shape.rows, bench.shape.length
        mixed = [names[i * len(names) // rows] for i in range(rows)]
        steps = {"mixed": forward(model, bench, adapter_names=mixed)}
        one = forward(model, bench)
        times = in_turn(one, steps, rounds=rounds, warm_up=1, device=bench.shape.device)
        found[f"mixed / one, {rows} x {length}"] = times.over_floor("mixed")
    return found


def _moves(model: Any, names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of switching to another, turning all off and on, and loading one from a file."""
    others = iter([names[-1], names[0]] * 2)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        load = seconds(lambda: petl.load(model, Path(folder), adapter_name="loaded"), "cpu")
    model.delete_adapter("loaded")
    return {
        "switch ms": milliseconds(lambda: model.set_adapter(next(others)), "cpu"),
        "disable ms": milliseconds(lambda: _off_and_on(model), "cpu"),
        "load ms": 1000 * load,
    }


def _off_and_on(model: Any) -> None:
    with model.disable_adapter():
        pass


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
