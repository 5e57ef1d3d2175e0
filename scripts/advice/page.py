"""The part of the page "Which method should I take?": methods compared on the table of the grid."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from advice.grid import METHOD_RANKS, TABLE, read_table
from advice.replay import Known, read, shown
from advice.tasks import TASKS
from petl.experiments.advice.candidates import SIMPLEST
from petl.experiments.reports.formatting import Table
from petl.training.retain.measure import interval_of

FEWEST = 10  # tasks with all methods and seeds, before which there is no comparison
OTHERS = [method for method in METHOD_RANKS if method != SIMPLEST]


def page() -> str:
    """Return the comparison, or how much of it is there."""
    tasks = read(read_table())[0] if TABLE.exists() else []
    if len(tasks) < FEWEST:
        return (
            f"The comparison is being made: {len(tasks)} of {len(TASKS)} tasks were trained with "
            f"all methods, and its table comes with {FEWEST}."
        )
    kinds = {task.name: task.kind for task in TASKS}
    return compared(tasks, kinds).markdown()


def compared(tasks: Sequence[Known], kinds: Mapping[str, str]) -> Table:
    """Return each method's difference to LoRA, by kind of task.

    Of each method the setting that is best by its mean validation score counts.

    Args:
        kinds: by the name of a task.
    """
    alike: dict[str, list[Known]] = defaultdict(list)
    for known in tasks:
        alike[kinds[known.task]].append(known)
    rows = []
    for kind, found in alike.items():
        unit = found[0].unit
        gains = {method: gain(found, method) for method in OTHERS}
        better = [method for method in OTHERS if gains[method][1] > 0]
        best = max(better, key=lambda method: gains[method][0], default=SIMPLEST)
        rates = sorted(known.best(method=SIMPLEST).rate for known in found)
        between = f"{rates[0]:g}" if rates[0] == rates[-1] else f"{rates[0]:g} to {rates[-1]:g}"
        cells = [gained(unit, gains[method]) for method in OTHERS]
        rows.append([f"{kind} ({len(found)}; {unit})", *cells, between, best])
    columns = ["tasks", *(f"{method} less LoRA" for method in OTHERS), "LoRA's best rates", "take"]
    return Table(columns, rows)


def gain(tasks: Sequence[Known], method: str) -> tuple[float, float, float]:
    """Return by how much a method is better than LoRA on test rows, and the 95 % interval.

    Over tasks; of a single one, over seeds.
    """
    pairs = [
        (known.tests[known.best(method=method)], known.tests[known.best(method=SIMPLEST)])
        for known in tasks
    ]
    differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
    values = differences[0] if len(tasks) == 1 else [statistics.fmean(d) for d in differences]
    center = statistics.fmean(values)
    limits = interval_of([(1, value) for value in values], center, fewest=2)
    return center, *(limits or (-math.inf, math.inf))


def gained(unit: str, gain: tuple[float, float, float]) -> str:
    """Return a difference with its interval as a cell."""
    center, low, high = (f"{'+' * (value > 0)}{shown(unit, value)}" for value in gain)
    return f"{center} ({low} to {high})"
