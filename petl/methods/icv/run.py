"""Scores of an adapter by its strength, on training rows that it was not computed from."""

import logging
from typing import Any

from accelerate import Accelerator
from peft import PeftModel

from petl.methods.icv.demonstrations import held_rows, settings_of
from petl.methods.icv.strengths import STRENGTHS, best_strength, scores_by_strength
from petl.training.dataloader import Splits
from petl.training.evaluate import evaluate
from petl.training.runs.run_folder import Run
from petl.training.runs.settings import TrainConfig

NOTE = "strengths"  # in scores.json
logger = logging.getLogger(__name__)


def set_strength(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator, run: Run
) -> None:
    """Score held-out training rows at several strengths, and set that of `strength=auto`.

    The scores are in scores.json, from which a resumed run reads them. Without such rows there are
    none.
    """
    config: Any = model.active_peft_config
    data = settings_of(config)
    rows = held_rows(splits, data)
    if rows is None:
        logger.info(
            "no scores by strength: all training rows are demonstrations (%d)", data.num_samples
        )
        return
    task, is_auto = splits.task, config.strength == "auto"
    if NOTE not in run.scores:
        run.timer.start()

        def score() -> float:
            what = f"scoring {len(rows)} training examples with strength {config.strength:g}"
            size = settings.eval_batch_size
            scores = evaluate(model, splits, rows, accelerator, size, what=what)
            return scores[task.metric]

        tried = {*STRENGTHS} if is_auto else {*STRENGTHS, config.strength}
        found = scores_by_strength(model, score, sorted(tried))
        used = config.strength
        if is_auto:
            used = best_strength(found, higher_is_better=task.higher_is_better)
        by_strength = {f"{strength:g}": value for strength, value in found.items()}
        note = {"metric": task.metric, "rows": len(rows), "used": used, "scores": by_strength}
        run.scores.add({NOTE: note})
        run.timer.mark("strengths")
    if is_auto:
        config.strength = run.scores[NOTE]["used"]
        logger.info("strength %g: the best on %d training rows", config.strength, len(rows))
