"""The scores on the test rows before training (`train.score_before`)."""

from contextlib import nullcontext

from petl.core.registry import is_computed
from petl.training.features import Context, RunFeature
from petl.training.runs.records import BEFORE


class ScoreBefore(RunFeature):
    """Scores the model that training starts from."""

    key = "before"

    def before_training(self, context: Context) -> None:
        """Score it, unless a stopped run has done so."""
        run, model = context.run, context.model
        if self.key in run.scores:
            return
        # answers from before are kept too, to show what training has changed
        kept = run.path / BEFORE if context.splits.task.generate else None
        # without an adapter that calibration has made
        with model.disable_adapter() if is_computed(model.active_peft_config) else nullcontext():
            scores = context.test("before training", kept, known=context.known)
        context.add({self.key: scores}, "evaluation")
