"""The tables of a result, for the terminal and for markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.clocks import Spread
from bench.records import Record, Result
from petl.reports.formatting import Table

TITLES = {
    "step": "training step",
    "small": "training step, one row of 16 tokens",
    "bf16": "training step, bfloat16 base",
    "file": "files, and putting adapters in place",
    "peak": "memory of a process beyond the wrapped model",
    "generate": "greedy decoding, over the base model's",
    "dist": "training with the optimizer, processes x threads",
    "many": "many adapters, many modules",
    "peers": "training step of the adapters package",
    "serve": "a batch whose rows have several adapters, over the base model",
    "scale": "how cost grows",
    "compile": "training step under torch.compile, over the same without",
    "start-up": "start of a process",
}
GOALS = {"goal": "time / floor", "goal kernels": "kernels / layer"}  # and what they are for
ITSELF = "floor"  # the row that times the floor against itself
FAIL, NOISY = "FAIL", "NOISY"
MAIN = ("petl", "torch", "transformers", "peft")  # packages that a line has room for


def tables(result: Result) -> dict[str, Table]:
    """A table for each section and shape, by title."""
    groups: dict[str, list[Record]] = {}
    for record in result.records:
        title = f"{TITLES[record.section]}: {record.shape}"
        groups.setdefault(title, []).append(record)
    return {title + _of_floor(records): _table(records) for title, records in groups.items()}


def _of_floor(records: Sequence[Record]) -> str:
    """What only the floor has figures of, in words."""
    floor = next((record.facts for record in records if record.row == ITSELF), {})
    others = {name for record in records if record.row != ITSELF for name in record.facts}
    if not others:
        return ""
    told = [f"{name} {shown(figure)}" for name, figure in floor.items() if name not in others]
    return f" (floor: {', '.join(told)})" if told else ""


def _table(records: Sequence[Record]) -> Table:
    columns = _columns(records)
    rows = []
    for record in records:
        figures = {**record.counts, **record.ratios, **record.facts}
        cells = [shown(figures.get(name)) for name in columns]
        if record.failed:
            cells[0] = FAIL if record.is_own else "-"
        rows.append([record.row + (f" {NOISY}" if is_noisy(record) else ""), *cells])
    return Table(["", *columns], rows)


def _columns(records: Sequence[Record]) -> list[str]:
    """Names of the figures: ratios first, each goal behind what it is for, then the rest."""
    found: dict[str, None] = {}
    for kind in ("ratios", "counts", "facts"):
        for record in records:
            found |= dict.fromkeys(getattr(record, kind))
    floor = [record for record in records if record.row == ITSELF]
    if len(floor) < len(records):  # what only the floor has stands in the title
        others = {n for r in records if r.row != ITSELF for n in (*r.ratios, *r.counts, *r.facts)}
        found = {name: None for name in found if name in others}
    columns = [name for name in found if name not in GOALS]
    for goal, of in GOALS.items():
        if goal in found:
            columns.insert(columns.index(of) + 1, goal)
    return columns


def is_noisy(record: Record) -> bool:
    """Whether this is the floor against itself, and not steady."""
    return record.row == ITSELF and any(ratio.is_noisy for ratio in record.ratios.values())


def shown(figure: Any) -> str:
    """A figure in words; "" of none."""
    if figure is None:
        return ""
    if isinstance(figure, Spread):
        return f"{figure.median:.2f} ({figure.low:.2f}-{figure.high:.2f})"
    if figure != int(figure) and abs(figure) < 100:
        return f"{figure:.3g}" if abs(figure) < 1 else f"{figure:.2f}"
    return f"{figure:,.0f}"


def remarks(result: Result) -> list[str]:
    """What a reader must know beside the tables."""
    failed = [f"{', '.join(r.key)}: {r.failed}" for r in result.records if r.failed]
    if any(is_noisy(record) for record in result.records):
        failed.append(f"{NOISY}: the floor against itself is not steady; read times as rough")
    return failed


def circumstances(environment: Mapping[str, Any]) -> str:
    """Where and when it was measured, in one line."""
    packages = ", ".join(f"{k} {v}" for k, v in environment["packages"].items() if v and k in MAIN)
    device = environment["device"]
    machine = environment["processor"] if device == "cpu" else device
    times = sorted(environment["started"].split(", "))  # of runs that were put together
    when = times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"
    return (
        f"{when}; {machine}, {environment['threads']} thread(s), load "
        f"{environment['load']:.1f}; {packages}"
    )
