"""One run of the benchmark: the chosen sections on the chosen shapes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench import (
    cached,
    clients,
    compiled,
    copied,
    drafting,
    files,
    frozen,
    generate,
    growth,
    isolated,
    long_rows,
    many,
    merging,
    mixture,
    peers,
    ranking,
    scale,
    serve,
    shrunk,
    start_up,
    together,
    unet,
    watched,
)
from bench.contenders import contenders
from bench.jobs.definitions import Settings as JobSettings
from bench.records import Record, Result
from bench.report import TITLES
from bench.shapes import Shape, hydra_shape, on_device, suite
from bench.step import Steps
from petl.errors import InputError
from petl.training.runs.environment import (
    device_name,
    git_revision,
    package_versions,
    processor_name,
)

SECTIONS = tuple(TITLES)
LONG = "job"  # hours: not in `--sections all`
USUAL = ("step", "file", "peak", "generate", "start-up")  # the default of `--sections`


@dataclass(frozen=True)
class Settings:
    """The measurements of a run.

    Attributes:
        suite: "quick" (six layers) or "full" (thirty).
        models: further shapes: names in configs/model, with random weights.
        rows: names of rows or methods; empty: all.
        rounds: timed rounds of a step.
        threads: of the processor; times are comparable with one thread only.
        peers: the python of an environment with the `adapters` package; "": skip it.
        drafts: what section `drafting` measures.
        jobs: of section `job`.
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
    drafts: drafting.Plan = field(default_factory=drafting.Plan)
    jobs: JobSettings = field(default_factory=JobSettings)


def run(
    settings: Settings,
    *,
    progress: Callable[[str], Any],
    save: Callable[[Result], Any] = lambda result: None,
) -> Result:
    """Measure the chosen sections.

    Args:
        progress: called with a line before each section.
        save: called with the result so far after each section.

    Raises:
        InputError: an unknown section, shape, row or device.
    """
    unknown = [section for section in settings.sections if section not in SECTIONS]
    if unknown:
        raise InputError(f"no section {unknown[0]!r}; sections: {', '.join(SECTIONS)}")
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device {settings.device!r}: torch finds no GPU on this machine; use cpu")
    shapes = suite(settings.suite, list(settings.shapes), settings.device)
    shapes += [on_device(hydra_shape(name), settings.device) for name in settings.models]
    measures = _measures(settings, progress)
    torch.set_num_threads(settings.threads)
    environment = describe(settings)
    records: list[Record] = []
    for section in settings.sections:
        for shape in shapes if section in EACH else shapes[:1]:
            progress(f"{section}: {shape.name}")
            records += measures[section](shape)
            save(Result(environment, records))
    return Result(environment, records)


# sections that measure all shapes, not the first one only
EACH = (
    "step",
    "small",
    "bf16",
    "file",
    "peak",
    "generate",
    "cache",
    "frozen",
    "together",
    "peers",
    "shrink",
)


def _measures(
    settings: Settings, progress: Callable[[str], Any]
) -> dict[str, Callable[[Shape], list[Record]]]:
    rows = [row for row in contenders(settings.rows) if not row.elsewhere]
    rounds = settings.rounds
    fewer = max(3, rounds // 2)
    steps = Steps(rows, rounds)
    return {
        "step": steps.step,
        "small": steps.small,
        "bf16": Steps(rows, fewer, steps.verdicts).bf16,
        "file": lambda shape: files.measure(rows, shape),
        "peak": lambda shape: isolated.peaks(rows, shape),
        "generate": lambda shape: generate.measure(rows, shape, rounds),
        "cache": lambda shape: cached.measure(shape, rounds),
        "dist": lambda shape: isolated.throughput(rows, scale.short(shape), fewer),
        "serve": lambda shape: serve.measure(rows, shape, fewer),
        "clients": lambda shape: clients.measure(fewer),
        "many": lambda shape: many.adapters(rows, shape, fewer) + many.modules(rows, shape),
        "scale": lambda shape: scale.measure(rows, shape, fewer),
        "growth": lambda shape: growth.measure(),
        "compile": lambda shape: compiled.measure(rows, shape, rounds),
        "merge": lambda shape: merging.measure(rounds),
        "unet": lambda shape: unet.measure(rounds),
        "experts": lambda shape: mixture.measure(rounds),
        "tokens": lambda shape: long_rows.measure(fewer) + long_rows.losses(),
        "frozen": lambda shape: (
            # once, beside the first shape
            (frozen.measure_images(rounds) if shape.name == settings.shapes[0] else [])
            + frozen.measure(shape, rounds)
        ),
        "start-up": lambda shape: start_up.measure(),
        "job": lambda shape: _whole_jobs(settings.jobs, progress),
        "peers": lambda shape: peers.measure(shape, rounds, settings.peers),
        "drafting": lambda shape: drafting.measure(settings.drafts, progress),
        "copied": lambda shape: copied.measure(),
        "together": lambda shape: together.measure(rows, shape, rounds),
        "shrink": lambda shape: shrunk.measure(shape, fewer),
        "watch": lambda shape: watched.measure(shape, rounds),
        "search": lambda shape: ranking.measure(rounds),
    }


def _whole_jobs(settings: JobSettings, progress: Callable[[str], Any]) -> list[Record]:
    # other sections do not wait for what it imports
    from bench.jobs.section import measure

    return measure(settings, progress)


def describe(settings: Settings) -> dict[str, Any]:
    """Return versions, machine, load and settings of a run."""
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
