"""What a run does for ICV: demonstrations of its rows, and scores by strength on further ones."""

import logging

from petl.core.registry import build_config, needs_calibration
from petl.core.strengths import best_strength, default_strengths, scores_by_strength
from petl.methods.icv.demonstrations import demonstrations, held_rows, settings_of
from petl.training.features import Context, Fields, RunFeature, Setup

logger = logging.getLogger(__name__)


class Strengths(RunFeature):
    """Scores the adapter at several strengths, and sets that of `strength=auto`."""

    key = "strengths"

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Choose the demonstrations as calibration data."""
        config = build_config(**fields)
        if setup.accelerator is not None and needs_calibration(config):
            setup.calibration = demonstrations(config, setup.config, setup.splits)
        return fields

    def before_training(self, context: Context) -> None:
        """Score training rows that are no demonstrations; without such rows there are no scores."""
        run, splits = context.run, context.splits
        config = context.model.active_peft_config
        data = settings_of(config)
        rows = held_rows(splits, data)
        if rows is None:
            logger.info(
                "no scores by strength: all training rows are demonstrations (%d)", data.num_samples
            )
            return
        task, is_auto = splits.task, config.strength == "auto"
        if self.key not in run.scores:

            def score() -> float:
                what = f"scoring {len(rows)} training examples with strength {config.strength:g}"
                return context.evaluate(rows, what)[task.metric]

            usual = default_strengths(config)
            tried = {*usual} if is_auto else {*usual, config.strength}
            found = scores_by_strength(context.model, score, sorted(tried))
            used = config.strength
            if is_auto:
                used = best_strength(found, higher_is_better=task.higher_is_better)
            by_strength = {f"{strength:g}": value for strength, value in found.items()}
            note = {"metric": task.metric, "rows": len(rows), "used": used, "scores": by_strength}
            context.add({self.key: note}, self.key)
        if is_auto:
            config.strength = run.scores[self.key]["used"]
            logger.info("strength %g: the best on %d training rows", config.strength, len(rows))
