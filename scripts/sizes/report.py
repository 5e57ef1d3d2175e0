"""The tables of the study in markdown, and their place in a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petl.experiments.reports.formatting import Table, seeds_text, size
from sizes.cells import CODES, PAIRS, SEPARATE
from sizes.data import TEST_ROWS, TRAIN_ROWS
from sizes.divisors import KINDS
from sizes.records import Record
from sizes.remarks import remarks
from sizes.rows import Row, front, points, rows_of, verdict
from sizes.train import LORA, SETTINGS

ONE_TASK = ("trained", "compress", "prune")
COMMAND = "python scripts/sizes.py runs/sizes --wordnet WORDNET"


def markdown(records: Sequence[Record], missing: int = 0) -> str:
    """Return all tables, what they show and where they were measured.

    Args:
        missing: number of adapters that are not measured yet.
    """
    parts = [f"### {title}\n\n{table.markdown()}" for title, table in tables(records).items()]
    said = "\n".join(f"- {line}" for line in remarks(records))
    where = "\n".join(f"- {key}: {value}" for key, value in circumstances(records).items())
    note = [f"Not complete: {missing} adapters are not measured yet."] if missing else []
    return "\n\n".join([*note, *parts, f"### What the tables show\n\n{said}", where])


def tables(records: Sequence[Record]) -> dict[str, Table]:
    """Return the tables by title; without records of a group, without its table."""
    found = {
        "Highest score for its size": smallest(records),
        "Small by training": trained(records),
        "Compressed after training": compressed(records),
        "Pruned after training": pruned(records),
    }
    for pair in PAIRS:
        found[f"One adapter for two tasks: {' and '.join(pair)}"] = combined(records, pair)
    return {title: table for title, table in found.items() if table.rows}


def lora(records: Sequence[Record]) -> Row | None:
    """Return the row that the others are compared with."""
    return next(iter(rows_of(records, "trained", method=LORA)), None)


def weight(row: Row) -> list[str]:
    """Return the cells of the sizes of a row."""
    return [size(round(row.bytes())), size(round(row.bytes(packed=True)))]


def compared(row: Row, base: Row | None) -> list[str]:
    """Return the cells of the score of a row."""
    gains = [] if base is None or row == base else row.gains(base)
    return [row.text(), points(gains), verdict(gains) if gains else ""]


def smallest(records: Sequence[Record]) -> Table:
    """Return the rows of one task that no smaller file equals."""
    rows = [row for group in ONE_TASK for row in rows_of(records, group)]
    base = lora(records)
    columns = ["adapter", "file", "in gzip", "test accuracy", f"difference from {LORA}", "seeds"]
    return Table(columns, [[row.name, *weight(row), *compared(row, base)] for row in front(rows)])


def trained(records: Sequence[Record]) -> Table:
    """Return the adapters as they were trained, the largest first."""
    rows = sorted(rows_of(records, "trained"), key=lambda row: -row.bytes())
    base = next((row for row in rows if row.settings["method"] == LORA), None)
    columns = ["adapter", "file", "in gzip", "test accuracy", f"difference from {LORA}", "seeds"]
    return Table(columns, [[row.name, *weight(row), *compared(row, base)] for row in rows])


def compressed(records: Sequence[Record]) -> Table:
    """Return the scores of compressions by density (down) and magnitude (across)."""
    rows = rows_of(records, "compress")
    base = lora(records)
    names = [f"alpha {a}" + (", of each tensor" if s == "tensor" else "") for s, a in CODES]
    lines = []
    for density in sorted({row.settings["density"] for row in rows}):
        own = {
            (r.settings["scope"], r.settings["alpha"]): r
            for r in rows
            if r.settings["density"] == density
        }
        first = next(iter(own.values()))
        smaller = "" if base is None else f"{base.bytes() / first.bytes():.1f}"
        scores = [own[code].text() if code in own else "" for code in CODES]
        bits = f"{sum(first.fact('bits')) / len(first.records):.3f}"
        lines.append([f"{density:g}", size(round(first.bytes())), smaller, bits, *scores])
    return Table(["density", "file", "times smaller", "bits per value", *names], lines)


def pruned(records: Sequence[Record]) -> Table:
    """Return the scores of prunings by fraction (down) and divisor (across), with mean divisors."""
    rows = rows_of(records, "prune")
    lines = []
    for drop in sorted({row.settings["drop"] for row in rows}):
        own = {row.settings["q"]: row for row in rows if row.settings["drop"] == drop}
        scores = [own[kind].text() if kind in own else "" for kind in KINDS]
        first = next(iter(own.values()))
        used = [_mean_divisor(own.get(kind)) for kind in KINDS]
        lines.append([f"{drop:g}", *weight(first), *scores, *used])
    columns = ["dropped", "file", "in gzip", *KINDS, *(f"q {kind}" for kind in KINDS)]
    return Table(columns, lines)


def _mean_divisor(row: Row | None) -> str:
    return "" if row is None else f"{sum(row.fact('q')) / len(row.records):.3f}"


def combined(records: Sequence[Record], pair: tuple[str, str]) -> Table:
    """Return the combinations of two tasks, the best mean first, below the separate adapters."""
    rows = rows_of(records, "combine", tasks="+".join(pair))
    base = next((row for row in rows if row.settings["method"] == SEPARATE), None)
    rows.sort(key=lambda row: (row is not base, -row.mean(None)))
    lines = []
    for row in rows:
        gains = [] if base is None or row is base else row.gains(base, None)
        scores = [row.text(task) for task in pair]
        lines.append([row.name, size(round(row.bytes())), *scores, points(gains)])
    return Table(["adapter", "files", *pair, "mean difference"], lines)


def circumstances(records: Sequence[Record]) -> dict[str, Any]:
    """Return command, machine and versions, by label."""
    environments = [record.environment for record in records]
    first = min(environments, key=lambda environment: environment["time"])
    times = sorted(environment["time"] for environment in environments)
    machines = dict.fromkeys(
        f"{e['processor']}, {e['cores']} cores, {e['threads']} thread(s)" for e in environments
    )
    packages = ("torch", "transformers", "peft")
    return {
        "command": f"`{COMMAND}`, then with `--report`",
        "runs": f"minilm, {TRAIN_ROWS:,} train and {TEST_ROWS:,} test rows a task, "
        f"`{' '.join(SETTINGS)}`, " + seeds_text(sorted({record.seed for record in records})),
        "machine": "; ".join(machines),
        "measured": f"{len(records)} adapters, {times[0]} to {times[-1]}",
        "petl": f"{first['packages']['petl']} at "
        + ", ".join(dict.fromkeys(str(e["git"]) for e in environments)),
        "packages": ", ".join(f"{name} {first['packages'][name]}" for name in packages),
    }


def draw(records: Sequence[Record], file: Path) -> None:
    """Draw test accuracy over bytes of one task as an SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # without a salt and a date of its own, the same records give the same file
    with mpl.rc_context({"svg.hashsalt": "sizes", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for group, marker in zip(ONE_TASK, "osx", strict=True):
            rows = rows_of(records, group)
            values = [row.mean() * 100 for row in rows]
            axes.scatter([row.bytes() / 1000 for row in rows], values, marker=marker, label=group)
        best = front([row for group in ONE_TASK for row in rows_of(records, group)])
        axes.step(
            [row.bytes() / 1000 for row in best],
            [row.mean() * 100 for row in best],
            where="post",
            color="0.6",
            zorder=0,
        )
        axes.set(xscale="log", xlabel="file (kB)", ylabel="test accuracy (%), mean over seeds")
        axes.legend()
        figure.savefig(file, format="svg", metadata={"Date": None})
