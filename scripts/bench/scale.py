"""Section `scale`: growth of a step with layers, width, tokens, rank, experts and density.

The exponent p of a cost is its slope in a log-log plot: doubling the size multiplies the cost by
2^p. A time with a larger exponent than the FLOPs grows faster than the arithmetic.
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
    """A size that is varied, and its values.

    Attributes:
        fields: config fields that set it, each with a function from the size to its value; a method
            without any of them is not measured on this axis. Empty: a size of the model or batch.
    """

    name: str
    values: tuple[int, ...]
    fields: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)

    def has(self, row: Contender) -> bool:
        """Return True if this size of a row can be varied."""
        return not self.fields or any(name in row.fields for name in self.fields)


RANKS = {"r": int, "init_r": lambda r: r - 1, "target_r": int}  # IncreLoRA grows by one rank to it
AXES = (
    Axis("layers", (2, 4, 8)),
    Axis("width", (192, 384, 768)),
    Axis("tokens", (16, 128, 512, 2048)),
    Axis("rank", (8, 16, 32, 64), RANKS),
    Axis("experts", (2, 4, 8, 16), {"num_experts": int}),
    Axis("per mille", (2, 10, 20, 50), {"density": lambda share: share / 1000}),
)


def measure(rows: Sequence[Contender], shape: Shape, rounds: int) -> list[Record]:
    """Return a record for each axis and each own method that has it, and for PEFT's LoRA."""
    rows = [row for row in rows if (row.is_own or row.theirs) and not row.draws]
    return [_record(axis, row, shape, rounds) for axis in AXES for row in rows if axis.has(row)]


def _record(axis: Axis, row: Contender, shape: Shape, rounds: int) -> Record:
    ratios: dict[str, Spread] = {}
    times, flops, kernels = [], [], []
    for value in axis.values:
        bench = Bench(sized(shape, axis.name, value))
        floor, _ = floor_of(bench)
        prepared = runner(enlarged(row, axis, value, bench.shape), bench)
        seconds = in_turn(
            floor, {row.name: prepared.step}, rounds=rounds, warm_up=1, device=shape.device
        )
        ratios[f"at {axis.values.index(value) + 1}"] = seconds.over_floor(row.name)
        times.append(seconds.median(row.name))
        flops.append(prepared.counts.flops)
        kernels.append(prepared.counts.kernels)
    return row.record(
        "scale",
        shape.name,
        f", {axis.name} {', '.join(map(str, axis.values))}",
        ratios=ratios,
        counts={
            "FLOPs exponent": exponent(axis.values, flops),
            "kernels exponent": exponent(axis.values, kernels),
        },
        facts={"time exponent": exponent(axis.values, times)},
    )


def sized(shape: Shape, axis: str, value: int) -> Shape:
    """Return the shape with that many layers or tokens, or that width; two layers for other axes.

    The vocabulary is scaled with the layers, so that the head keeps its fraction of the FLOPs, and
    the heads with the width, so that each is as wide.
    """
    if shape.source is not None:
        raise InputError(
            f"section scale changes the sizes of a shape, which is not possible for {shape.name}: "
            "use --shape llama or --shape minilm"
        )
    layers = value if axis == "layers" else 2
    vocabulary = max(512, shape.vocabulary * layers // shape.layers)
    length = max(1, value // shape.rows) if axis == "tokens" else shape.length
    sizes = {"layers": layers, "vocabulary": vocabulary, "length": length}
    if axis == "width":
        names = ("hidden", "heads", "kv_heads", "ff")
        sizes |= {name: getattr(shape, name) * value // shape.hidden for name in names}
    return replace(shape, **sizes)


def short(shape: Shape) -> Shape:
    """Return the shape with two layers; unchanged if it is a model of configs/model."""
    return shape if shape.source is not None else sized(shape, "layers", 2)


def enlarged(row: Contender, axis: Axis, value: int, shape: Shape) -> Contender:
    """Return the row with this value of an axis, adjusted to the number of layers."""
    more = {name: of(value) for name, of in axis.fields.items() if name in row.fields}
    return replace(row, fields={**row.fields, **more}).fitting(shape.layers)


def exponent(values: Sequence[int], costs: Sequence[float]) -> float:
    """Return the slope of log(cost) over log(value), by least squares."""
    slope, _ = statistics.linear_regression(
        [math.log(value) for value in values], [math.log(cost) for cost in costs]
    )
    return slope
