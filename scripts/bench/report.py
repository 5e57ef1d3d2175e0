"""The tables of a result, for the terminal and for markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.clocks import Spread
from bench.records import Record, Result
from petl.experiments.reports.formatting import Table

TITLES = {
    "step": "training step",
    "small": "training step, one example of 16 tokens",
    "bf16": "training step, bfloat16 base model",
    "file": "adapter files; wrapping, saving, loading, merging",
    "peak": "peak memory of a process beyond the wrapped model",
    "generate": "greedy decoding, relative to the base model",
    "cache": "decoding with keys and values in place, relative to those of transformers",
    "dist": "data-parallel training with the optimizer, processes x threads",
    "many": "many adapters, many modules",
    "peers": "training step of the adapters package",
    "serve": "a batch with several adapters, relative to the base model",
    "clients": "answers of petl serve, processor time of its process",
    "together": "training several adapters in one pass, relative to a pass for each of them",
    "scale": "growth of the cost",
    "growth": "rows of data and runs, processor seconds",
    "compile": "training step with torch.compile, relative to without",
    "merge": "merged tokens, relative to all tokens",
    "unet": "tuners of skip connections, relative to LoRA of rank 8 on attention",
    "experts": "LoRA on stacks of experts, relative to PEFT's forward pass",
    "tokens": "LoRA on a long row of which tokens are left out, relative to all of it",
    "frozen": "training step without what need not be computed",
    "drafting": "answers with drafts, relative to plain decoding",
    "copied": "answers of an encoder-decoder with drafts, relative to plain decoding",
    "start-up": "start of a process",
    "job": "whole jobs, one process each",
    "shrink": "forward pass of a shrunk model, relative to the dense one's",
    "watch": "training step under petl.watch after its first steps, relative to without",
    "search": "ranking by vectors, relative to products and topk",
}
ITSELF = "floor"  # the row that times the lower bound against itself
BOUND = "frozen-backbone lower bound"
# how names of values and rows are shown; records keep the short names, so that results of all
# versions can be read and compared
LABELS = {
    ITSELF: BOUND,
    "time / floor": "time / lower bound",
    "time / LoRA": "time / PEFT's LoRA",
    "goal": "goal: time / lower bound",
    "FLOPs / floor": "FLOPs / lower bound",
    "peak / floor": "peak memory / lower bound",
    "peak MB": "peak memory (MB)",
    "peak / LoRA": "peak memory / PEFT's LoRA",
    "goal peak / LoRA": "goal: peak memory / PEFT's LoRA",
    "kept B / token, layer": "saved activations, bytes per token per layer",
    "kept / LoRA": "saved activations / PEFT's LoRA",
    "goal time / LoRA": "goal: time / PEFT's LoRA",
    "goal kept / LoRA": "goal: saved activations",
    "kernels / layer": "kernel launches per adapted layer",
    "without a store / floor": "without a store / lower bound",
    "head alone / floor": "last block at all positions / lower bound",
    "all positions / floor": "head too / lower bound",
    "B / position": "bytes on disk per position",
    "goal kernels": "goal: kernel launches",
    "goal base": "goal: time / base",
    "time / passes": "petl.shrink / forward passes over its rows",
    "goal dense": "goal: time / dense",
    "goal passes": "goal: petl.shrink / forward passes",
    "time / products": "time / products and topk",
    "time / loop": "time / PeftModel.generate",
    "goal loop": "goal: time / PeftModel.generate",
    "goal llama.cpp": "goal: time / llama.cpp",
    "goal products": "goal: time / products",
    "time / copied": "time / plain generate",
    "goal copied": "goal: time / plain generate",
    "goal time / plain": "goal: time / plain",
    "tokens / pass": "tokens a pass",
    "goal MB": "goal: peak memory (MB)",
    "goal speed": "goal: speed",
    "goal speed / plain base": "goal: speed / plain base",
    "goal 8 adapters": "goal: 8 adapters",
    "goal 64 adapters": "goal: 64 adapters",
    "peak / parts": "peak memory / base, adapters and passes of each",
    "goal peak": "goal: peak memory",
    "goal plain": "goal: time / plain merging",
    "goal saved": "goal: saved / inner",
    "step / inner": "training step / inner method's",
    "saved / inner": "saved activations / inner method's",
    "waits": "host-device syncs",
    "optimizer ms": "optimizer (ms)",
    "first layer saves": "fraction saved without gradients of the embeddings",
    "kept MB": "saved activations (MB)",
    "bytes / information": "bytes / information content",
    **{f"{name} ms": f"{name} (ms)" for name in ("wrap", "save", "load", "merge", "add", "switch")},
    "disable ms": "disable and enable (ms)",
    "joined / alone": "step with all-reduce / without",
    "B reduced": "all-reduced bytes per step",
    "collectives": "collective operations per step",
    "B each": "bytes per adapter",
    "resident B each": "resident bytes (RSS) per adapter",
    "own B each": "of these, mapped from no file (RssAnon)",
}
GOALS = {  # and the values they bound
    "goal": "time / floor",
    "goal kernels": "kernels / layer",
    "goal time / LoRA": "time / LoRA",
    "goal kept / LoRA": "kept / LoRA",
    "goal peak / LoRA": "peak / LoRA",
    "goal base": "time / base",
    "goal dense": "time / dense",
    "goal passes": "time / passes",
    "goal products": "time / products",
    "goal loop": "time / loop",
    "goal llama.cpp": "time / llama.cpp",
    "goal copied": "time / copied",
    "goal time / plain": "time / plain",
    "goal MB": "peak MB",
    "goal plain": "time / plain merging",
    "goal saved": "saved / inner",
    "goal speed": "speed",
    "goal speed / plain base": "speed / plain base",
    "goal 8 adapters": "8 adapters",
    "goal 64 adapters": "64 adapters",
    "goal peak": "peak / parts",
    **{
        f"goal {part} / {base}": f"{part} / {base}"
        for part in ("training", "job")
        for base in ("Trainer", "Trainer, by length")
    },
}
FAIL, NOISY = "FAIL", "NOISY"
MAIN = ("petl", "torch", "transformers", "peft")  # packages that fit into a line


def tables(result: Result) -> dict[str, Table]:
    """Return a table for each section and shape, by title."""
    groups: dict[str, list[Record]] = {}
    for record in result.records:
        title = f"{TITLES[record.section]}: {record.shape}"
        groups.setdefault(title, []).append(record)
    return {title + _of_floor(records): _table(records) for title, records in groups.items()}


def _of_floor(records: Sequence[Record]) -> str:
    """Values that only the lower bound has, as text for the title."""
    floor = next((record.facts for record in records if record.row == ITSELF), {})
    others = {name for record in records if record.row != ITSELF for name in record.facts}
    if not others:
        return ""
    values = [
        f"{label(name)} {format_value(value)}"
        for name, value in floor.items()
        if name not in others
    ]
    return f" ({BOUND}: {', '.join(values)})" if values else ""


def _table(records: Sequence[Record]) -> Table:
    columns = _columns(records)
    rows = []
    for record in records:
        values = {**record.counts, **record.ratios, **record.facts}
        cells = [format_value(values.get(name)) for name in columns]
        if record.failed:
            cells[0] = FAIL if record.is_own else "-"
        rows.append([row_label(record), *cells])
    return Table(["", *map(label, columns)], rows)


def label(name: str) -> str:
    """Return how the name of a value or row is shown."""
    return LABELS.get(name, name)


def row_label(record: Record) -> str:
    """Return how the name of a record's row is shown, with its note."""
    note = f" ({record.note})" if record.note else ""
    return label(record.row) + note + (f" {NOISY}" if is_noisy(record) else "")


def _columns(records: Sequence[Record]) -> list[str]:
    """Names of the values: ratios first, each goal after the value that it bounds, then others."""
    names: dict[str, None] = {}
    for kind in ("ratios", "counts", "facts"):
        for record in records:
            names |= dict.fromkeys(getattr(record, kind))
    floor = [record for record in records if record.row == ITSELF]
    if len(floor) < len(records):  # the title has the values of the lower bound alone
        others = {n for r in records if r.row != ITSELF for n in (*r.ratios, *r.counts, *r.facts)}
        names = {name: None for name in names if name in others}
    columns = [name for name in names if name not in GOALS]
    for goal, of in GOALS.items():
        if goal in names:
            columns.insert(columns.index(of) + 1, goal)
    return columns


def is_noisy(record: Record) -> bool:
    """True if this is the lower bound against itself, and its ratio is unsteady."""
    return record.row == ITSELF and any(ratio.is_noisy for ratio in record.ratios.values())


def format_value(value: Any) -> str:
    """Format a value; "" for None."""
    if value is None:
        return ""
    if isinstance(value, Spread):
        return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"
    if value != int(value) and abs(value) < 100:
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,.0f}"


def remarks(result: Result) -> list[str]:
    """Return sentences to print below the tables: failures, and noise."""
    failed = [f"{', '.join(r.key)}: {r.failed}" for r in result.records if r.failed]
    if any(is_noisy(record) for record in result.records):
        failed.append(f"{NOISY}: the {BOUND} against itself is unsteady; times are rough")
    return failed


def circumstances(environment: Mapping[str, Any]) -> str:
    """Return machine, time and versions of a measurement in one line."""
    packages = ", ".join(f"{k} {v}" for k, v in environment["packages"].items() if v and k in MAIN)
    device = environment["device"]
    machine = environment["processor"] if device == "cpu" else device
    times = sorted(environment["started"].split(", "))  # several, of combined results
    when = times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"
    return (
        f"{when}; {machine}, {environment['threads']} thread(s), load "
        f"{environment['load']:.1f}; {packages}"
    )
