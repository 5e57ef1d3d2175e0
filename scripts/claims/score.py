"""Scores of adapter folders on the test rows of a task."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from petl.adapters.deltas.adapters import Material, read, write_state
from petl.adapters.deltas.measured import restore, splits_of
from petl.adapters.export.saved_adapter import SavedAdapter, device, find
from petl.core.loading import load
from petl.data.batch_sampler import chunks
from petl.data.tasks.base import Task
from petl.efficiency.fused_lora.switching import fuse_lora
from petl.training.dataloader import Batch, longest_first, to_device
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator


def first_batches(saved: SavedAdapter, rows: int) -> tuple[Task, list[Batch]]:
    """Return the task of a finished run, and batches of its first test rows, the longest first."""
    settings = saved.run_config.train
    splits = splits_of(saved, start(settings.seed, saved.run_config.precision))
    test = splits.test.select(range(min(rows, len(splits.test))))
    parts = chunks(longest_first(splits.task.lengths(test)), settings.eval_batch_size)
    batches = [splits.collate(list(test.select(part))) for part in parts]
    return splits.task, [to_device(batch, device()) for batch in batches]


class Scorer:
    """Scores adapters of one base model on the test rows of a run.

    Attributes:
        rows: their number.
    """

    def __init__(self, run: Path) -> None:
        saved = find(run)
        settings = saved.run_config.train
        self.accelerator = start(settings.seed, saved.run_config.precision)
        self.batch_size, self.fuse_lora = settings.eval_batch_size, settings.fuse_lora
        self.splits = splits_of(saved, self.accelerator)
        self.metric = self.splits.task.metric
        self.base = saved.base()  # used for all adapters: `restore` removes them again
        self.rows = len(self.splits.test)

    def score(self, adapter: Path) -> float:
        """Return the metric of the task with the adapter in a folder."""
        return self.scores(adapter)[self.metric]

    def scores(self, adapter: Path, kept: Path | None = None) -> dict[str, float]:
        """Return all scores of the task with the adapter in a folder.

        Args:
            kept: the file that the predictions are written to; None: they are not kept.
        """
        model = load(self.base, adapter).eval()
        if self.fuse_lora:  # the kernels of training: else scores differ by rounding
            fuse_lora(model)
        found = Evaluator(model, self.splits, self.accelerator, self.batch_size).test(kept=kept)
        restore(model)
        return found

    def score_with_head(self, adapter: Path, other: Path) -> float:
        """Return the metric of the task with an adapter and the trained head of another one."""
        with tempfile.TemporaryDirectory() as folder:
            material = read(adapter)
            state = {**without_heads(material), **heads(read(other))}
            write_state(material, state, Path(folder) / "adapter", {})
            return self.score(Path(folder) / "adapter")


def heads(material: Material) -> dict[str, Tensor]:
    """Return the trained heads of an adapter, by name in the file."""
    return {name: tensor for name, tensor in material.state.items() if _is_head(material, name)}


def without_heads(material: Material) -> Mapping[str, Tensor]:
    """Return the tensors of an adapter but its trained heads."""
    return {name: tensor for name, tensor in material.state.items() if not _is_head(material, name)}


def _is_head(material: Material, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in material.exclude)
