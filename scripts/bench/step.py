"""Sections `step`, `small` and `bf16`: the cost of a training step with each method."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel

from bench.clocks import Step, Times, in_turn, milliseconds
from bench.contenders import LORA, Contender
from bench.counters import Counts, count
from bench.records import Record
from bench.reference import NoReferenceError, check
from bench.report import ITSELF
from bench.shapes import Bench, Shape, embeddings_of, gradient_to_embeddings
from petl.core.compat import BaseTunerLayer
from petl.errors import UnsupportedError, first_line
from petl.training.optimizer import make_optimizer
from petl.training.runs.settings import TrainConfig

GOALS = {"step": "{}", "bf16": "{} bf16"}  # keys of a row's goals by section, with the shape
# errors of other people's methods, which fail their row only
UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
T = TypeVar("T")
NO_REFERENCE = "no dense reference"  # note of a row whose steps were not checked


@dataclass(frozen=True)
class Runner:
    """A row that is ready to be timed: wrapped and counted."""

    contender: Contender
    model: PeftModel
    step: Step
    counts: Counts


class Steps:
    """Measures steps. Results of the checks are cached: they do not depend on section or precision.

    Args:
        rounds: timed rounds.
        verdicts: cache of the checks, to share it with another instance.
    """

    def __init__(
        self,
        rows: list[Contender],
        rounds: int,
        verdicts: dict[tuple[Shape, str], str] | None = None,
    ) -> None:
        self.rows, self.rounds = rows, rounds
        self.verdicts = {} if verdicts is None else verdicts

    def step(self, shape: Shape) -> list[Record]:
        """Section `step`: the shape as it is."""
        return self._measure("step", shape)

    def small(self, shape: Shape) -> list[Record]:
        """Section `small`: one example of 16 tokens, where launches cost more than products."""
        return self._measure("small", replace(shape, rows=1, length=16))

    def bf16(self, shape: Shape) -> list[Record]:
        """Section `bf16`: a base model in bfloat16 with adapters in float32."""
        return self._measure("bf16", replace(shape, dtype=torch.bfloat16))

    def _measure(self, section: str, shape: Shape) -> list[Record]:
        bench = Bench(shape)
        floor, counts = floor_of(bench)
        ready: dict[str, Runner] = {}
        failed: list[Record] = []
        for row in self.rows:
            found = or_why(row, partial(self._runner, row, bench))
            if isinstance(found, str):
                failed.append(row.record(section, shape, failed=found))
            else:
                ready[row.name] = found
        steps = {ITSELF: floor, **{name: prepared.step for name, prepared in ready.items()}}
        warm_up = 1 if shape.device == "cpu" else 10  # counting has warmed up the processor
        times = in_turn(floor, steps, rounds=self.rounds, warm_up=warm_up, device=shape.device)
        itself = Record(
            section,
            str(shape),
            ITSELF,
            ratios={"time / floor": times.over_floor(ITSELF)},
            counts={"FLOPs / floor": 1.0, "peak / floor": 1.0},
            facts={
                "first layer saves": shape.first_layer_saving,
                "GFLOP": counts.flops / 1e9,
                "kept MB": counts.kept / 1e6,
                **absolute(times, ITSELF, shape),
            },
        )
        lora = ready[LORA].counts if LORA in ready else None
        measured = [
            prepared.contender.record(
                section,
                shape,
                note=self._verdict(prepared.contender, shape),
                **values_of(prepared, counts, lora, times, shape, section),
            )
            for prepared in ready.values()
        ]
        return [itself, *measured, *failed]

    def _runner(self, row: Contender, bench: Bench) -> Runner | str:
        """Return the row, ready to be timed, or how its step differs from its reference."""
        wrong = self._verdict(row, bench.shape)
        return runner(row, bench) if wrong in ("", NO_REFERENCE) else wrong

    def _verdict(self, row: Contender, shape: Shape) -> str:
        """Check a row in float32 against its dense reference; return the error, or "".

        `NO_REFERENCE` for a method without one. PEFT's own methods are not checked.
        """
        if not row.is_checked:
            return ""
        rows = max(1, shape.rows // 4)  # the reference is slow, and errors show on any batch
        shape = replace(shape, dtype=torch.float32, rows=rows)
        if (shape, row.name) not in self.verdicts:
            bench = Bench(shape)
            try:
                verdict = check(bench, row.wrap(bench), row.tolerance)
            except NoReferenceError:
                verdict = NO_REFERENCE
            self.verdicts[shape, row.name] = verdict
        return self.verdicts[shape, row.name]


def or_why(row: Contender | None, call: Callable[[], T]) -> T | str:
    """Return what `call` returns, or why the row cannot be measured.

    Errors of petl's methods are raised, unless they do not support it; so are those of the lower
    bound, which has no row.
    """
    try:
        return call()
    except UNFIT as error:
        if row is None or (row.is_own and not isinstance(error, UnsupportedError)):
            raise
        return f"{type(error).__name__}: {first_line(error)}"


def floor_of(bench: Bench) -> tuple[Step, Counts]:
    """Return the step of the lower bound, and its counts."""
    model = bench.twin()
    step = bench.step(model)
    with gradient_to_embeddings(model):
        counts = count(step, model, bench.batch.values())
    # permanently, unlike `gradient_to_embeddings`, and without keeping the output alive
    embeddings_of(model).register_forward_hook(lambda module, args, out: out.requires_grad_())
    return step, counts


def runner(row: Contender, bench: Bench) -> Runner:
    """Wrap a row and count its step, with a gradient to the embeddings as in the lower bound."""
    model = row.wrap(bench)
    step = bench.step(model)
    with gradient_to_embeddings(model):
        counts = count(step, model, bench.batch.values())
    return Runner(row, model, step, counts)


def values_of(
    prepared: Runner,
    floor: Counts,
    lora: Counts | None,
    times: Times,
    shape: Shape,
    section: str,
) -> dict[str, Any]:
    """Return the ratios, counts and facts of a row."""
    row, counts, model = prepared.contender, prepared.counts, prepared.model
    adapted = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    trained = [p for p in model.parameters() if p.requires_grad]
    ratios = {"time / floor": times.over_floor(row.name)}
    if LORA in times.candidate and row.name != LORA:
        ratios["time / LoRA"] = times.over(row.name, LORA)
    goal = GOALS.get(section, "").format(shape.name)
    beside = section == "step" and lora is not None
    optimizer = make_optimizer(model, TrainConfig())
    for parameter in trained:  # after `make_optimizer`, which casts some to float32
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # allocates its state
    return {
        "ratios": ratios,
        "counts": {
            "FLOPs / floor": counts.flops / floor.flops,
            "peak / floor": counts.peak / floor.peak,
            "kept B / token, layer": (counts.kept - floor.kept) / shape.tokens / shape.layers,
            **({} if lora is None else {"kept / LoRA": counts.kept / lora.kept}),
            "kernels / layer": (counts.kernels - floor.kernels) / adapted,
            "waits": counts.waits - floor.waits,
            "parameters": sum(p.numel() for p in trained),
        },
        "facts": {
            "optimizer ms": milliseconds(optimizer.step, shape.device),
            **({"goal": row.goal[goal]} if goal in row.goal else {}),
            **({f"goal {n}": goal for n, goal in row.beside_lora.items()} if beside else {}),
            **({} if row.kernels is None else {"goal kernels": row.kernels}),
            **absolute(times, row.name, shape),
        },
    }


def absolute(times: Times, name: str, shape: Shape) -> dict[str, float]:
    """Return absolute times of an accelerator; none of a CPU, which other processes use as well."""
    if shape.device == "cpu":
        return {}
    return {"ms": 1000 * times.median(name), "tokens / s": shape.tokens / times.median(name)}
