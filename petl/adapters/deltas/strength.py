"""The strength of a finished adapter as a dial: what it learned and lost at each, and the choice.

The score is that on the run's validation rows, which training has not seen; test rows decide
nothing. What is lost is measured on retained texts, see `petl.training.retain`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from petl.adapters.deltas.adapters import Material, write_state
from petl.adapters.deltas.measured import splits_of
from petl.adapters.export.checked_folder import refuse_changed_base
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core.adapter_folder import CONFIG as ADAPTER_CONFIG
from petl.core.strengths import (
    at_strength_in_file,
    best_strength,
    default_strengths,
    require_strength,
    scores_by_strength,
    strength_of,
)
from petl.core.types import Record
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.retain.compare import retained
from petl.training.runs.records import SCORES, read_scores

KEY = "strengths"
BATCH_SIZE = 8


@dataclass(frozen=True)
class Trade:
    """What an adapter has learned and lost, by strength.

    Attributes:
        metric: name of the scores.
        rows: validation rows that they are of.
        used: strength of the adapter as it is.
        scores: by strength.
        lost: on retained texts, by strength: nats per token, or drift.
        higher_is_better: of the scores.
    """

    metric: str
    rows: int
    used: float
    scores: dict[float, float]
    lost: dict[float, float]
    higher_is_better: bool

    def entry(self) -> Record:
        """Return the entry `strengths` of scores.json."""
        return {
            "metric": self.metric,
            "rows": self.rows,
            "used": self.used,
            "scores": {f"{strength:g}": score for strength, score in self.scores.items()},
            "lost": {f"{strength:g}": lost for strength, lost in self.lost.items()},
        }

    def within(self, limit: float) -> float:
        """Return the strength of the best score that loses at most `limit`.

        Raises:
            InputError: each of them loses more.
        """
        scores = {each: self.scores[each] for each, lost in self.lost.items() if lost <= limit}
        if not scores:
            least = min(self.lost.values())
            raise InputError(
                f"limit={limit:g}: each strength loses more, at least {least:.4f}; give a larger "
                "limit, or smaller --strengths"
            )
        return best_strength(scores, higher_is_better=self.higher_is_better)


def trade_of(
    saved: SavedAdapter,
    texts: Sequence[str],
    strengths: Sequence[float] | None = None,
    *,
    batch_size: int | None = None,
) -> Trade:
    """Score a saved adapter of a run at several strengths, and measure what it lost.

    Args:
        texts: retained ones.
        strengths: None: those of the method.

    Raises:
        InputError: there is no run, or it held out no validation rows.
        UnsupportedError: the adapter has no strength.
    """
    # before data and model are loaded
    config = saved.config
    require_strength(config)
    refuse_changed_base(saved.adapter, config)
    run = saved.run_config
    accelerator = start(run.train.seed, run.precision)
    splits = splits_of(saved, accelerator)
    if splits.validation is None:
        raise InputError(
            f"{saved.adapter} was trained without validation rows, and on test rows nothing may be "
            "chosen: train with train.eval_steps=N, or choose by petl eval yourself"
        )
    model, task, rows = saved.model(), splits.task, splits.validation
    evaluator = Evaluator(model, splits, accelerator, run.train.eval_batch_size)
    size = batch_size or BATCH_SIZE
    # of ICV, its own
    tried = list(default_strengths(config) if strengths is None else strengths)

    def lost() -> float:
        with accelerator.autocast():
            return retained(model, texts, saved.processor, batch_size=size).change

    by = partial(scores_by_strength, model, strengths=tried)
    return Trade(
        metric=task.metric,
        rows=len(rows),
        used=strength_of(config),
        scores=by(score=lambda: evaluator.rows(rows)[task.metric]),
        lost=by(score=lost),
        higher_is_better=task.higher_is_better,
    )


def note_trade(saved: SavedAdapter, trade: Trade) -> None:
    """Add the trade to scores.json of the run."""
    if saved.run is not None and (saved.run / SCORES).is_file():
        scores = {**read_scores(saved.run), KEY: trade.entry()}
        write_atomic(saved.run / SCORES, as_json(scores))


def write_strength(saved: SavedAdapter, strength: float, out: Path) -> None:
    """Write a saved adapter with a strength in its weights to a new folder.

    Raises:
        InputError: the folder is taken.
        UnsupportedError: the adapter has no strength.
    """
    refuse_changed_base(saved.adapter, saved.config)
    tensors, fields = at_strength_in_file(saved.config, saved.folder.tensors, strength)
    material = Material(saved.adapter, saved.config, saved.folder.tensors, ())
    write_state(material, tensors, out, {"petl_strength": f"{strength:g}"})
    if fields:
        config = {**read_json(out / ADAPTER_CONFIG), **fields}
        write_atomic(out / ADAPTER_CONFIG, as_json(config))
