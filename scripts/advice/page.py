"""The part of the page "Which method should I take?": methods compared on the table of the grid."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from scipy.special import stdtrit

from advice.grid import TABLE, read_table
from advice.replay import Known, read, shown
from advice.tasks import TASKS
from petl.experiments.advice.candidates import OTHERS, RANK, SIMPLEST
from petl.experiments.reports.formatting import Table

FEWEST = 10  # tasks with all methods and seeds, before which there is no comparison
PLAIN = SIMPLEST, RANK


def page() -> str:
    """Return the comparison, or how much of it is there."""
    tasks = read(read_table())[0] if TABLE.exists() else []
    if len(tasks) < FEWEST:
        return (
            f"The comparison is being made: {len(tasks)} of {len(TASKS)} tasks were trained with "
            f"all methods, and its table comes with {FEWEST}."
        )
    kinds = {task.name: task.kind for task in TASKS}
    count = "" if len(tasks) == len(TASKS) else f"\n\n{len(tasks)} of {len(TASKS)} tasks so far."
    return compared(tasks, kinds).markdown() + count


def compared(tasks: Sequence[Known], kinds: Mapping[str, str]) -> Table:
    """Return each method's difference to LoRA, by kind of task.

    Each has one rank, and of its learning rates the one counts that is best by its mean validation
    score.

    Args:
        kinds: by the name of a task.
    """
    alike: dict[str, list[Known]] = defaultdict(list)
    for known in tasks:
        alike[kinds[known.task]].append(known)
    rows = []
    for kind, found in alike.items():
        unit = found[0].unit
        # a model may refuse a method, as a ViT of width 96 does mos of rank 16
        had = {m: [known for known in found if known.has(m, OTHERS[m])] for m in OTHERS}
        gains = {method: gain(had[method], method) for method in OTHERS if had[method]}
        better = [method for method in gains if gains[method][1] > 0]
        best = max(better, key=lambda method: gains[method][0], default=SIMPLEST)
        rates = sorted(known.best(alike=PLAIN).rate for known in found)
        between = f"{rates[0]:g}" if rates[0] == rates[-1] else f"{rates[0]:g} to {rates[-1]:g}"
        cells = [gained(unit, gains[m]) if had[m] else "refused" for m in OTHERS]
        rows.append([f"{kind} ({len(found)}; {unit})", *cells, between, best])
    names = [f"{method}, r {rank}" for method, rank in OTHERS.items()]
    columns = ["difference to LoRA, r 8 (tasks; unit)", *names, "LoRA's best rates", "take"]
    return Table(columns, rows)


def gain(tasks: Sequence[Known], method: str) -> tuple[float, float, float]:
    """Return by how much a method is better than LoRA on test rows, and its interval.

    Over tasks; of a single one, over seeds. At 95 % for all methods together (Bonferroni).
    """
    pairs = [
        (
            known.tests[known.best(alike=(method, OTHERS[method]))],
            known.tests[known.best(alike=PLAIN)],
        )
        for known in tasks
    ]
    differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
    values = differences[0] if len(tasks) == 1 else [statistics.fmean(d) for d in differences]
    center = statistics.fmean(values)
    if len(values) < 2:
        return center, -math.inf, math.inf
    quantile = float(stdtrit(len(values) - 1, 1 - 0.025 / len(OTHERS)))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return center, center - half, center + half


def gained(unit: str, gain: tuple[float, float, float]) -> str:
    """Return a difference with its interval as a cell."""
    center, low, high = (f"{'+' * (value > 0)}{shown(unit, value)}" for value in gain)
    return f"{center} ({low} to {high})"
