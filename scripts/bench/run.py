"""One run of the bench: the sections that are asked for, over the shapes that are asked for."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench import apart, compiled, files, generate, many, peers, scale, serve, start_up
from bench.contenders import contenders
from bench.records import Record, Result
from bench.shapes import Shape, hydra_shape, on_device, suite
from bench.step import Steps
from petl.errors import InputError
from petl.runs.environment import (
    device_name,
    git_revision,
    package_versions,
    processor_name,
)

SECTIONS = (
    "step", "small", "bf16", "file", "peak", "generate", "dist", "serve", "many", "scale",
    "compile", "start-up", "peers",
)  # fmt: skip
USUAL = ("step", "file", "peak", "generate", "start-up")  # what a run without words measures


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        suite: "quick" (six layers) or "full" (thirty).
        models: further shapes: models of configs/model by name, with random weights.
        rows: names of rows or methods; empty: all.
        rounds: timed rounds of a step.
        threads: of the processor; times are comparable at one only.
        peers: the python of an environment with the `adapters` package; "": leave it out.
    """

    suite: str = "quick"
    sections: Sequence[str] = USUAL
    shapes: Sequence[str] = ("llama", "minilm")
    models: Sequence[str] = ()
    rows: Sequence[str] = ()
    rounds: int = 5
    device: str = "cpu"
    threads: int = 1
    peers: str = ""


def run(
    settings: Settings,
    *,
    told: Callable[[str], Any],
    found: Callable[[Result], Any] = lambda result: None,
) -> Result:
    """Measure, and call `told` with a line before each section, `found` with what is there after.

    Raises:
        InputError: an unknown section, shape, row or device.
    """
    strange = [section for section in settings.sections if section not in SECTIONS]
    if strange:
        raise InputError(f"no section {strange[0]!r}; there are {', '.join(SECTIONS)}")
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device {settings.device!r}: torch finds no GPU here; take cpu")
    shapes = suite(settings.suite, list(settings.shapes), settings.device)
    shapes += [on_device(hydra_shape(name), settings.device) for name in settings.models]
    measures = _measures(settings)
    torch.set_num_threads(settings.threads)
    environment = describe(settings)
    records: list[Record] = []
    for section in settings.sections:
        for shape in shapes[:1] if section in ONCE else shapes:
            told(f"{section}: {shape.name}")
            records += measures[section](shape)
            found(Result(environment, records))
    return Result(environment, records)


ONCE = ("dist", "serve", "many", "scale", "compile", "start-up")  # on the first shape only


def _measures(settings: Settings) -> dict[str, Callable[[Shape], list[Record]]]:
    rows, rounds = contenders(settings.rows), settings.rounds
    fewer = max(3, rounds // 2)
    steps = Steps(rows, rounds)
    return {
        "step": steps.step,
        "small": steps.small,
        "bf16": Steps(rows, fewer, steps.verdicts).bf16,
        "file": lambda shape: files.measure(rows, shape),
        "peak": lambda shape: apart.peaks(rows, shape),
        "generate": lambda shape: generate.measure(rows, shape, rounds),
        "dist": lambda shape: apart.throughput(rows, scale.short(shape), fewer),
        "serve": lambda shape: serve.measure(rows, shape, fewer),
        "many": lambda shape: many.adapters(rows, shape, fewer) + many.modules(rows, shape),
        "scale": lambda shape: scale.measure(rows, shape, fewer),
        "compile": lambda shape: compiled.measure(rows, shape, rounds),
        "start-up": lambda shape: start_up.measure(),
        "peers": lambda shape: peers.measure(shape, rounds, settings.peers),
    }


def describe(settings: Settings) -> dict[str, Any]:
    """Versions, machine, load, and what was asked for."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(torch.device(settings.device)),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "load": os.getloadavg()[0],
        "suite": settings.suite,
        "rounds": settings.rounds,
        "packages": package_versions(),
        "git": git_revision(Path(__file__).parent),
    }
