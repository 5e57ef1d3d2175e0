"""What a run looks at before it trains: test rows that it trains on, an adapter below, scores."""

import logging
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from torch import nn

from petl.core.registry import is_computed, keeps_base
from petl.core.types import Fields, Record, base_of
from petl.data.overlap import Overlap
from petl.errors import InputError
from petl.training.features import Context, RunFeature, Setup
from petl.training.features.section import Section
from petl.training.runs.config import RunConfig
from petl.training.runs.records import BEFORE

if TYPE_CHECKING:
    from petl.training.feature_cache import FeatureCache

logger = logging.getLogger(__name__)


class TrainingRowsInTest(RunFeature):
    """Says how many test rows a model may know by heart."""

    key = "test_rows_in_training"

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Refuse a test set that is mostly training rows, unless `data.allow_overlap`.

        Raises:
            InputError: the message has their number.
        """
        overlap = setup.splits.overlap
        refused = setup.config.train.test and not self.groups["data"].get("allow_overlap")
        if refused and overlap is not None and overlap.is_most:
            raise InputError(
                f"{overlap}: scores on them say nothing of new rows; give another data.test, or "
                "data.allow_overlap=true"
            )
        return fields

    def before_training(self, context: Context) -> None:
        """Add the counts to the scores."""
        overlap = context.splits.overlap
        if overlap is not None and self.key not in context.run.scores:
            context.run.scores.add({self.key: overlap.entry()})

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the counts, if there are any such rows."""
        found = scores.get(cls.key) or {}
        # of a run before they were counted
        overlap = Overlap(**found) if found else None
        if overlap is None or not overlap.found:
            return None
        line = f"{overlap.found} of {overlap.rows} test rows occur in training"
        near = f", {overlap.near} nearly" if overlap.near else ""
        return Section(
            "Test rows that are training rows",
            f"{line}: {overlap.exact} exactly, {overlap.alike} but for case, space and "
            f"punctuation{near}. The model may know them by heart; their scores say nothing of new "
            "rows.",
            line=line,
        )


# A finished adapter below the one that a run trains (model.adapter), merged as the base loads


class AdapterBelow(RunFeature):
    """Checks the finished adapter before anything is loaded."""

    def check(self, config: RunConfig) -> None:
        """Raise InputError for an adapter that is missing or cannot be merged."""
        resolve_name("petl.data.models.finished_adapter:checked_config")(self.settings)


# The scores on the test rows before training (`train.score_before`)


class ScoreBefore(RunFeature):
    """Scores the model that training starts from."""

    key = "before"

    def before_training(self, context: Context) -> None:
        """Score it, unless a stopped run has done so."""
        run, model = context.run, context.model
        if self.key in run.scores:
            return
        # answers from before are kept too, to show what training has changed
        task = context.splits.task
        kept = run.path / BEFORE if task.generate or task.keeps_before else None
        # without an adapter that calibration has made
        with model.disable_adapter() if is_computed(model.active_peft_config) else nullcontext():
            store = self._store(context)
            scores = context.test("before training", kept, known=context.known, store=store)
        if store is not None:
            store.write()
        context.add({self.key: scores}, "evaluation")

    @torch.no_grad()
    def _store(self, context: Context) -> "FeatureCache | None":
        """Return what runs on the same base and rows have in common; None: this one has not."""
        splits, model, accelerator = context.splits, context.model, context.accelerator
        # a new head is another one with each seed; answers are generated
        if splits.task.new_head or splits.task.generate or accelerator.num_processes > 1:
            return None
        # an adapter that was trained or computed before may change few rows
        config = model.active_peft_config
        begun = context.settings.init_from is not None or is_computed(config)
        if begun or not (context.settings.test and keeps_base(config)):
            return None
        from petl.data.tasks.encoding_cache import content_hash  # where they are of use
        from petl.training.evaluate import ScoredPart
        from petl.training.feature_cache import FeatureCache, computation

        evaluator = context.evaluator
        # any other that has a part in the outputs changes those of all
        first = ScoredPart(splits.test.select([0]), [0])
        start = evaluator.one_pass(first, None, None)
        with model.disable_adapter():
            if not torch.equal(start, evaluator.one_pass(first, None, None)):
                return None
        name, task = computation(base_of(model), nn.Module()), splits.task
        about = (content_hash(splits.test), repr(task), evaluator.batch_size)
        return FeatureCache(name, str(accelerator.mixed_precision), *about)
