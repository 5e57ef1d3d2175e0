"""Scores of adapter folders on the test rows of a task."""

from pathlib import Path

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
    """Scores adapters of one base model on the test rows of a run."""

    def __init__(self, run: Path) -> None:
        saved = find(run)
        settings = saved.run_config.train
        self.accelerator = start(settings.seed, saved.run_config.precision)
        self.batch_size, self.fuse_lora = settings.eval_batch_size, settings.fuse_lora
        self.splits = splits_of(saved, self.accelerator)
        self.base = saved.base()  # used for all adapters: `restore` removes them again

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
