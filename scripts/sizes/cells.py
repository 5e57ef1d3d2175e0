"""What the study measures: each cell writes one adapter, which is weighed and scored."""

import functools
import gzip
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity

from petl.adapters.deltas import combine_adapters, compress_adapter
from petl.adapters.deltas.adapters import count_kept, pruned, pruned_names, read, write_pruned
from petl.adapters.export.saved_adapter import find
from petl.core.adapter_folder import weights_file
from petl.core.compressed import compressed_file
from petl.experiments.sweeps.study import Contender
from petl.training.runs.resume import ADAPTER
from sizes.divisors import KINDS, divisors
from sizes.records import Record, environment, path
from sizes.score import Scorer, heads
from sizes.train import BINARY, BITS, LORA, MOS, quantized, run_of

DENSITIES = (0.05, 0.1, 0.2, 0.5)
CODES = (  # scope and alpha
    *(("global", alpha) for alpha in (1, 2, 4, "fit")),
    *(("tensor", alpha) for alpha in (2, "fit")),
)
DROPS = (0.5, 0.9, 0.95, 0.99)
UNDEFINED = (0.5, "analytic")  # Phi of the bound is not defined at drop 0.5
PAIRS = (("verbs", "nouns"), ("verbs", "reviews"))
SEPARATE = "separate"
LEVELS = ("tensors", "update")
# method, density, weight of either adapter
COMBINATIONS = (
    ("linear", 1.0, 1.0),
    ("linear", 1.0, 0.5),
    ("magnitude_prune", 0.2, 1.0),
    ("ties", 0.2, 1.0),
    ("ties", 0.5, 1.0),
    ("dare_linear", 0.5, 1.0),
    ("dare_ties", 0.5, 1.0),
)
RANK = 16  # of a combined update: that of `linear`, so that all files have one size
FACTORS = ("lora_A", "lora_B")  # whose tensors are compared between the tasks

Facts = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One adapter to be measured.

    Attributes:
        group, settings, seed: as of `Record`.
        heads: the trained adapters by task; the head of the first task is in the written file.
        write: writes the adapter to a new folder, and returns what is worth recording.
    """

    group: str
    settings: Mapping[str, Any]
    seed: int
    heads: Mapping[str, Path]
    write: Callable[[Path], Facts]


def cells(folder: Path, seeds: list[int], *, planned: bool = False) -> Iterator[Cell]:
    """Yield the cells whose adapters are trained, or all that are planned."""
    for each in (trained, compressed, prunings, combined):
        for cell in itertools.chain.from_iterable(each(folder, seed) for seed in seeds):
            if planned or all(adapter.is_dir() for adapter in cell.heads.values()):
                yield cell


def adapter_of(folder: Path, task: str, seed: int) -> Path:
    """Return the folder of a task's LoRA."""
    return run_of(folder, task, LORA, seed) / ADAPTER


def copy_of(adapter: Path) -> Callable[[Path], Facts]:
    """Return a function that copies an adapter."""

    def write(out: Path) -> Facts:
        shutil.copytree(adapter, out)
        return {}

    return write


def trained(folder: Path, seed: int) -> Iterator[Cell]:
    """Yield the adapters of verbs as they were trained."""
    words = [("verbs", name) for name in (LORA, MOS, BINARY)]
    for study, method in [*words, *(("bits", quantized(bits)) for bits in BITS)]:
        adapter = run_of(folder, study, method, seed) / ADAPTER
        settings = {"method": Contender(method).name}
        yield Cell("trained", settings, seed, {"verbs": adapter}, copy_of(adapter))


def compressed(folder: Path, seed: int) -> Iterator[Cell]:
    """Yield compressions of the LoRA of verbs."""
    adapter = adapter_of(folder, "verbs", seed)
    for density, (scope, alpha) in itertools.product(DENSITIES, CODES):
        settings = {"density": density, "scope": scope, "alpha": alpha}
        write = functools.partial(_compress, adapter, settings)
        yield Cell("compress", settings, seed, {"verbs": adapter}, write)


def _compress(adapter: Path, settings: Mapping[str, Any], out: Path) -> Facts:
    found = compress_adapter(adapter, out, **settings)
    emptied = sum(not count for count in found.kept.values())
    return {"bits": found.bits, "emptied": emptied, "tensors": len(found.kept)}


def prunings(folder: Path, seed: int) -> Iterator[Cell]:
    """Yield prunings of the LoRA of verbs; the masks of all divisors are the same."""
    run = run_of(folder, "verbs", LORA, seed)
    for drop, kind in itertools.product(DROPS, KINDS):
        if (drop, kind) != UNDEFINED:
            write = functools.partial(_prune, run, drop, kind, seed)
            settings = {"drop": drop, "q": kind}
            yield Cell("prune", settings, seed, {"verbs": run / ADAPTER}, write)


def _prune(run: Path, drop: float, kind: str, seed: int, out: Path) -> Facts:
    material = read(run / ADAPTER)
    q, facts = divisors(find(run), material, drop, kind, seed)
    state = pruned(material, drop, q=q, seed=seed)
    write_pruned(material, state, out, drop=drop, q=q, seed=seed)
    return facts | {"kept": count_kept(material, state, pruned_names(material))}


def combined(folder: Path, seed: int) -> Iterator[Cell]:
    """Yield combinations of two tasks, and either adapter alone with the heads of both."""
    for pair in PAIRS:
        adapters = {task: adapter_of(folder, task, seed) for task in pair}
        one, two = adapters.values()
        name = {"tasks": "+".join(pair)}
        yield Cell(
            "combine",
            name | {"method": SEPARATE},
            seed,
            adapters,
            functools.partial(_copy_and_compare, one, two),
        )
        for task, adapter in adapters.items():
            settings = name | {"method": f"{task} alone"}
            own_first = {task: adapter, **adapters}
            yield Cell("combine", settings, seed, own_first, copy_of(adapter))
        for level, (method, density, weight) in itertools.product(LEVELS, COMBINATIONS):
            settings = {"level": level, "method": method, "density": density, "weight": weight}
            # the folders of runs: the level update loads their base model
            runs = [run_of(folder, task, LORA, seed) for task in pair]
            write = functools.partial(_combine, runs, settings, seed)
            yield Cell("combine", name | settings, seed, adapters, write)


def _copy_and_compare(one: Path, two: Path, out: Path) -> Facts:
    shutil.copytree(one, out)
    first, second = read(one).state, read(two).state
    facts = {}
    for factor in FACTORS:
        names = [name for name in first if factor in name]
        values = [cosine_similarity(first[n].flatten(), second[n].flatten(), 0) for n in names]
        facts[f"cosine of {factor}"] = float(sum(values)) / len(values)
    return facts


def _combine(runs: list[Path], settings: Mapping[str, Any], seed: int, out: Path) -> Facts:
    update = settings["level"] == "update"
    lost = combine_adapters(
        runs if update else [run / ADAPTER for run in runs],
        out,
        settings["method"],
        level=settings["level"],
        rank=RANK if update else None,
        weights=[settings["weight"]] * len(runs),
        density=settings["density"],
        seed=seed,
    )
    return {"lost": lost}


# Measuring


def measure(cell: Cell, scorers: Mapping[str, Scorer]) -> Record:
    """Write the adapter of a cell, weigh and score it."""
    with tempfile.TemporaryDirectory() as place:
        out, start = Path(place) / ADAPTER, time.perf_counter()
        facts = cell.write(out)
        facts["seconds"] = round(time.perf_counter() - start, 2)
        if cell.settings.get("method") == SEPARATE:
            scores = {task: scorers[task].score(own) for task, own in cell.heads.items()}
            files = [weights_file(own) for own in cell.heads.values()]
        else:
            first, *others = cell.heads
            scores = {first: scorers[first].score(out)}
            files = [compressed_file(out) or weights_file(out)]
            for task in others:  # the head of another task is stored beside the adapter
                scores[task] = scorers[task].score_with_head(out, cell.heads[task])
                files.append(_head_file(cell.heads[task], Path(place) / f"{task}.head"))
        contents = [file.read_bytes() for file in files]
    return Record(
        cell.group,
        cell.settings,
        cell.seed,
        sum(map(len, contents)),
        sum(len(gzip.compress(content, 9, mtime=0)) for content in contents),
        scores,
        {task: scorers[task].rows for task in cell.heads},
        facts,
        environment(),
    )


def _head_file(adapter: Path, file: Path) -> Path:
    """Write the trained head of an adapter to a file of its own: a second task needs it too."""
    save_file(heads(read(adapter)), file)
    return file


def is_measured(folder: Path, cell: Cell) -> bool:
    """Return True if the record of a cell is there."""
    return path(folder, cell.group, cell.settings, cell.seed).exists()
