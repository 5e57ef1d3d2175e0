"""Section `many`: up to 1,000 adapters on one base model, and up to 1,120 adapted modules."""

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
from bench.clocks import Spread, in_turn, milliseconds, seconds, uncollected
from bench.contenders import Contender
from bench.isolated import own_memory, resident
from bench.records import Record
from bench.scale import exponent
from bench.serve import bytes_of, forward, served
from bench.shapes import Bench, Shape

COUNTS = (1, 10, 100, 1000)  # adapters
LAYERS = 2
PATIENCE = 20  # seconds of adding adapters, after which larger counts are skipped (assumption)
ROOM = 2e9  # bytes of adapters, likewise (assumption)
HOSTED = (
    "lora", "increlora", "mos", "mola 8/2", "adapter 48", "compacter 48", "binary on lora",
    "sparse 1 %",
)  # fmt: skip
MAPPED = "mola 8/2"  # a thousand are more than ROOM, unless their tensors stay in the files
BATCHES = ((16, 8), (64, 1))  # number of rows, and tokens per row

MODULES = (140, 280, 560, 1120)  # adapted modules: small blocks with seven linear layers each
TINY = {"hidden": 64, "heads": 4, "kv_heads": 2, "ff": 96, "vocabulary": 512}


def adapters(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return records of the cost of each further adapter, and of using one among many."""
    records = []
    for row in (row for row in rows if row.name in HOSTED):
        records += _adapters(row, shape, rounds)
        if row.name == MAPPED:
            records.append(_mapped(row, shape))
    return records


def _adapters(row: Contender, shape: Shape, rounds: int) -> list[Record]:
    small = replace(shape, layers=LAYERS)
    benches = [Bench(replace(small, rows=r, length=n)) for r, n in BATCHES]
    row = row.fitting(small.layers)
    model = served(row, benches[0])
    gc.collect()  # memory of earlier rows must not be freed during the measurement
    names, empty, before = ["default"], bytes_of(model), resident()
    records: list[Record] = []
    spent, own = 0.0, 0.0
    for wanted in COUNTS:
        times = []
        while len(names) < wanted and spent + sum(times) < PATIENCE and own * wanted < ROOM:
            config = copy.deepcopy(model.peft_config["default"])
            names.append(f"a{len(names)}")
            times.append(seconds(lambda n=names[-1], c=config: model.add_adapter(n, c), "cpu"))
            if len(names) == 2:
                own = bytes_of(model) - empty
        if len(names) < wanted:
            break
        spent += sum(times)
        size = {} if wanted == 1 else {"B each": (bytes_of(model) - empty) / (wanted - 1)}
        facts = {} if not times else {"add ms": 1000 * statistics.fmean(times)}
        if wanted >= 100:  # the memory of fewer is less than the free lists of the allocator
            facts["resident B each"] = (resident() - before) / (wanted - 1)
        records.append(
            row.record(
                "many",
                f"{shape.name}, {LAYERS} layers",
                f", {wanted}",
                counts=size,
                ratios=_mixed(model.eval(), benches, names, rounds),
                facts={**facts, **_moves(model, names)},
            )
        )
    return records


def _mapped(row: Contender, shape: Shape) -> Record:
    """Return the record of as many adapters as there may be, mapped from files."""
    bench, count = Bench(replace(shape, layers=LAYERS)), COUNTS[-1]
    model = served(row.fitting(LAYERS), bench)
    gc.collect()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        own, all_of_it, times = own_memory(), resident(), []
        for i in range(1, count):
            add = {"adapter_name": f"a{i}", "low_cpu_mem_usage": True}
            times.append(seconds(lambda add=add: petl.load(model, Path(folder), **add), "cpu"))
        facts = {
            "resident B each": (resident() - all_of_it) / (count - 1),
            "own B each": (own_memory() - own) / (count - 1),
            "load ms": 1000 * statistics.fmean(times[-10:]),
        }
    return row.record("many", f"{shape.name}, {LAYERS} layers", f", {count}, mapped", facts=facts)


def _mixed(
    model: Any, benches: Sequence[Bench], names: Sequence[str], rounds: int
) -> dict[str, Spread]:
    """Time of batches with as many adapters as there are (or rows), relative to one adapter."""
    ratios = {}
    for bench in benches:
        rows, length = bench.shape.rows, bench.shape.length
        mixed = [names[i * len(names) // rows] for i in range(rows)]
        steps = {"mixed": forward(model, bench, adapter_names=mixed)}
        one = forward(model, bench)
        times = in_turn(one, steps, rounds=rounds, warm_up=1, device=bench.shape.device)
        ratios[f"mixed / one, {rows} x {length}"] = times.over_floor("mixed")
    return ratios


def _moves(model: Any, names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of switching adapters, disabling and enabling them, loading and saving one."""
    others = iter([names[-1], names[0]] * 2)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        load = seconds(lambda: petl.load(model, Path(folder), adapter_name="loaded"), "cpu")
        last = [names[-1]]
        save = milliseconds(lambda: model.save_pretrained(folder, selected_adapters=last), "cpu")
    model.delete_adapter("loaded")
    return {
        "switch ms": milliseconds(lambda: model.set_adapter(next(others)), "cpu"),
        "disable ms": milliseconds(lambda: _disable_and_enable(model), "cpu"),
        "load ms": 1000 * load,
        "save ms": save,
    }


def _disable_and_enable(model: Any) -> None:
    with model.disable_adapter():
        pass


def modules(rows: Sequence[Contender], shape: Shape) -> list[Record]:
    """Return records of the growth of wrapping and state dicts with the number of modules."""
    first = {row.method: row for row in reversed(rows) if row.method != "xlora" and not row.theirs}
    return [_modules(row, shape) for row in reversed(first.values())]


def _modules(row: Contender, shape: Shape) -> Record:
    costs: dict[str, list[float]] = {"wrap": [], "read": [], "write": []}
    counts = [count for count in MODULES if row.is_own or count == MODULES[-1]]
    for count in counts:
        bench = Bench(replace(shape, **TINY, layers=count // 7, rows=1, length=4))
        with uncollected():  # a collection takes longer with more objects
            for name, cost in _costs(row, bench).items():
                costs[name].append(cost)
    facts = {f"{name} s": taken[-1] for name, taken in costs.items()}
    if len(counts) > 1:
        facts |= {f"{name} exponent": exponent(counts, taken) for name, taken in costs.items()}
    return row.record("many", f"{counts[-1]} linear layers", facts=facts)


def _costs(row: Contender, bench: Bench) -> dict[str, float]:
    """Seconds of wrapping, and of reading and writing the adapter's state dict."""
    models: list[Any] = []
    wrap = seconds(lambda: models.append(row.put(bench, bench.base)), "cpu")
    state: list[Any] = []
    read = seconds(lambda: state.append(get_peft_model_state_dict(models[0])), "cpu")
    write = seconds(lambda: set_peft_model_state_dict(models[0], state[0]), "cpu")
    return {"wrap": wrap, "read": read, "write": write}
