"""Section `scale`: how the cost of a step grows with layers, tokens, rank and experts.

The exponent p of a cost is the slope of its logarithm: twice as much of the one costs 2^p times the
other. A time whose exponent is above that of the FLOPs grows faster than the arithmetic.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.clocks import Spread, in_turn
from bench.contenders import Contender
from bench.records import Record
from bench.shapes import Bench, Shape
from bench.step import floor_of, runner
from petl.errors import InputError


@dataclass(frozen=True)
class Axis:
    """What is made larger, and to which values.

    Attributes:
        fields: those of a config that say so, with what makes a value of each; a method that has
            none of them is not measured along this axis. Empty: it is of the model or the batch.
    """

    name: str
    values: tuple[int, ...]
    fields: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)

    def has(self, row: Contender) -> bool:
        """Whether a row can be made larger so."""
        return not self.fields or any(name in row.fields for name in self.fields)


RANKS = {"r": int, "init_r": lambda r: r - 1, "target_r": int}  # IncreLoRA grows by one to it
AXES = (
    Axis("layers", (2, 4, 8)),
    Axis("tokens", (16, 128, 512, 2048)),
    Axis("rank", (8, 16, 32, 64), RANKS),
    Axis("experts", (2, 4, 8, 16), {"num_experts": int}),
    Axis("per mille", (2, 10, 20, 50), {"density": lambda share: share / 1000}),
)


def measure(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """A record for each axis and each row of petl's own that it suits, and for PEFT's LoRA."""
    rows = [row for row in rows if (row.is_own or row.theirs) and not row.draws]
    return [_record(axis, row, shape, rounds) for axis in AXES for row in rows if axis.has(row)]


def _record(axis: Axis, row: Contender, shape: Shape, rounds: int) -> Record:
    ratios: dict[str, Spread] = {}
    times, flops, kernels = [], [], []
    for value in axis.values:
        bench = Bench(sized(shape, axis.name, value))
        floor, _ = floor_of(bench)
        found = runner(enlarged(row, axis, value, bench.shape), bench)
        taken = in_turn(
            floor, {row.name: found.step}, rounds=rounds, warm_up=1, device=shape.device
        )
        ratios[f"at {axis.values.index(value) + 1}"] = taken.over_floor(row.name)
        times.append(taken.median(row.name))
        flops.append(found.counts.flops)
        kernels.append(found.counts.kernels)
    return Record(
        "scale",
        shape.name,
        f"{row.name}, {axis.name} {', '.join(map(str, axis.values))}",
        is_own=row.is_own,
        ratios=ratios,
        counts={
            "FLOPs exponent": exponent(axis.values, flops),
            "kernels exponent": exponent(axis.values, kernels),
        },
        facts={"time exponent": exponent(axis.values, times)},
    )


def sized(shape: Shape, axis: str, value: int) -> Shape:
    """The shape with that many layers or tokens; two layers otherwise. The head keeps its share."""
    if shape.source is not None:
        raise InputError(f"section scale changes the sizes of a shape; {shape.name} has its own")
    layers = value if axis == "layers" else 2
    vocabulary = max(512, shape.vocabulary * layers // shape.layers)
    length = max(1, value // shape.rows) if axis == "tokens" else shape.length
    return replace(shape, layers=layers, vocabulary=vocabulary, length=length)


def short(shape: Shape) -> Shape:
    """The shape with two layers, if it has no layers of its own."""
    return shape if shape.source is not None else sized(shape, "layers", 2)


def enlarged(row: Contender, axis: Axis, value: int, shape: Shape) -> Contender:
    """The row with that value of an axis; MoS with the budget that few layers need."""
    more = {name: of(value) for name, of in axis.fields.items() if name in row.fields}
    return replace(row, fields={**row.fields, **more}).fitting(shape.layers)


def exponent(values: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of log(cost) over log(value), by least squares."""
    slope, _ = statistics.linear_regression(
        [math.log(value) for value in values], [math.log(cost) for cost in costs]
    )
    return slope
