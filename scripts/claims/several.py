"""Contenders of several tasks that are made of finished runs, each of one of the tasks.

    "lora on=verbs + lora on=reviews | own"            each task has its own adapter
    "... | sum scale=0.5"                              one adapter, each task with its own head
    "... | ties density=0.2 scale=0.3,1"               the same by TIES

A combination is that of the updates of the weights (`petl combine --level update`), times a scale;
of several scales, the one with the best mean score over the tasks' validation rows. Predictions of
a folder are those of all tasks, the rows of the first before those of the second, as those of a run
with `data=tasks`.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import LoraConfig
from torch import Tensor

from claims.edits import MADE_OF, origin, parsed
from claims.measures import scores
from claims.score import Scorer
from petl.adapters.deltas.adapters import copy_others, new_folder
from petl.adapters.deltas.measured import scoring
from petl.adapters.deltas.updates import Update, combined_updates, update_of
from petl.adapters.export.conversion import save_lora
from petl.adapters.export.saved_adapter import find
from petl.core import fingerprint
from petl.core.adapter_folder import Folder
from petl.errors import InputError
from petl.generation.prediction.tables import as_line
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import iterate_json_lines
from petl.training.runs.records import ADAPTER, PREDICTIONS, SCORES

OWN = "own"
METHODS = {"sum": "linear", "ties": "ties"}  # of `petl.adapters.deltas.combine`
RANK = 384  # of a combination that is not a sum: all ranks of MiniLM, so that nothing is cut
KINDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    OWN: {},
    "sum": {"scale": ()},
    "ties": {"density": (), "scale": ()},
}


class Tasks:
    """Scores adapters on the rows of several tasks.

    Attributes:
        names: of the tasks, in the order of their rows.
        rows: test rows of each task.
    """

    def __init__(self, runs: Sequence[Path], names: Sequence[str]) -> None:
        """Take data and base model of each task from one of its runs, whose seed does not matter.

        Raises:
            InputError: the tasks have unequal numbers of test rows: a mean over rows would not be
                that over tasks.
        """
        self.names, self.runs = list(names), list(runs)
        counts = {name: len(predictions(run)) for name, run in zip(names, runs, strict=True)}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {rows:,}" for name, rows in counts.items())
            raise InputError(
                f"the tasks have unequal numbers of test rows ({told}): give each as many"
            )
        (self.rows,) = set(counts.values())

    @cached_property
    def test(self) -> list[Scorer]:
        """Scorers on the test rows of each task."""
        return [Scorer(run) for run in self.runs]


@dataclass(frozen=True)
class Combination:
    """A LoRA without heads that is made of several updates.

    Attributes:
        config: its config.
        factors: its tensors, by name in the file.
        lost: the fraction of the norm that its rank loses.
        parts: the runs and their updates, by task.
    """

    config: LoraConfig
    factors: dict[str, Tensor]
    lost: float
    parts: Sequence[tuple[Path, Update]]

    @classmethod
    def of(cls, runs: Sequence[Path], method: str, density: float) -> "Combination":
        """Return the combination of the adapters of runs, of scale 1.

        Args:
            method: of METHODS.
            density: the fraction of the entries that TIES keeps.
        """
        updates = [update_of(run) for run in runs]
        rank = None if method == "sum" else RANK  # None: all of the sum
        config, tensors, lost = combined_updates(
            updates, METHODS[method], rank=rank, density=density
        )
        factors = {name: t for name, t in tensors.items() if name not in updates[0].heads}
        return cls(config, factors, lost, [*zip(runs, updates, strict=True)])

    def write(self, task: int, scale: float, out: Path) -> None:
        """Write the scaled adapter with the head of a task to a new folder."""
        run, update = self.parts[task]
        scaled = {n: t * scale if ".lora_B." in n else t for n, t in self.factors.items()}
        with new_folder(out) as draft:
            copy_others(find(run).adapter, draft)  # labels, task and tokenizer
            fingerprint.write(draft, find(run).folder.base)  # with other scales
            save_lora(self.config, {**scaled, **update.heads}, draft)


def assemble(words: str, runs: Sequence[Path], tasks: Tasks, out: Path) -> None:
    """Make a contender of the runs of one seed, and write its scores and predictions to a folder.

    Raises:
        InputError: the words are none of `KINDS`.
    """
    kind, settings = parsed(words, KINDS)
    if kind == OWN:
        found = [(scores(run)["after"], predictions(run)) for run in runs]
        facts = [scores(run) for run in runs]
        keys = ("cpu_seconds", "adapter_bytes", "adapter_parameters")
        sums = {key: sum(each[key] for each in facts) for key in keys}
        write(tasks, found, {**sums, MADE_OF: origin(runs)}, out)
        return
    start = time.process_time()
    combined = Combination.of(runs, kind, float(settings.get("density", 1)))
    scales = [float(scale) for scale in settings["scale"].split(",")]
    scale, validated = best_scale(combined, tasks, scales)
    seconds = time.process_time() - start
    found, size = [], 0
    for task, scorer in enumerate(tasks.test):
        with tempfile.TemporaryDirectory() as place:
            adapter, kept = Path(place) / ADAPTER, Path(place) / PREDICTIONS
            combined.write(task, scale, adapter)
            found.append((scorer.scores(adapter, kept=kept), lines(kept)))
            heads = sum(t.nbytes for t in combined.parts[task][1].heads.values())
            # a file with the first task's head, and the heads of the others
            size += heads if task else Folder(adapter).weights.stat().st_size
    facts = {
        "cpu_seconds": seconds,
        "adapter_bytes": size,
        "adapter_parameters": sum(t.numel() for t in combined.factors.values()),
        "edit": {"scale": scale, "validation": validated, "lost": combined.lost},
        MADE_OF: origin(runs),
    }
    write(tasks, found, facts, out)


def best_scale(
    combined: Combination, tasks: Tasks, scales: Sequence[float]
) -> tuple[float, dict[str, float]]:
    """Return the scale with the best mean score over the tasks' validation rows, and all means.

    Of equal means the first scale; a single scale is not scored.
    """
    if len(scales) == 1:
        return scales[0], {}
    means: dict[float, list[float]] = {scale: [] for scale in scales}
    for task, run in enumerate(tasks.runs):
        with scoring(find(run)) as (score, kind):
            for scale in scales:
                with tempfile.TemporaryDirectory() as place:
                    combined.write(task, scale, Path(place) / ADAPTER)
                    means[scale].append(score(Path(place) / ADAPTER)[kind.metric])
    found = {scale: fmean(values) for scale, values in means.items()}
    return max(scales, key=lambda scale: found[scale]), {f"{k:g}": v for k, v in found.items()}


def write(tasks: Tasks, found: Sequence[Any], facts: Mapping[str, Any], out: Path) -> None:
    """Write predictions and scores of all tasks to a folder.

    Args:
        found: scores and predictions of each task.
        facts: further entries of scores.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    joined = [
        as_line({**line, "row": task * tasks.rows + line["row"], "task": tasks.names[task]})
        for task, (_, of_task) in enumerate(found)
        for line in of_task
    ]
    write_atomic(out / PREDICTIONS, "".join(f"{line}\n" for line in joined))
    by_task = {name: s["accuracy"] for name, (s, _) in zip(tasks.names, found, strict=True)}
    after = {
        "accuracy": fmean(by_task.values()),
        **{f"accuracy of {name}": score for name, score in by_task.items()},
    }
    found_in_all = {"after": after, **facts}
    write_atomic(out / SCORES, as_json(found_in_all, in_order=True))  # last: all is done


def predictions(run: Path) -> list[dict[str, Any]]:
    """Return the predictions of a run in the order of the test rows."""
    return lines(run / PREDICTIONS)


def lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of predictions in the order of the rows."""
    return sorted(iterate_json_lines(file), key=lambda line: line["row"])
