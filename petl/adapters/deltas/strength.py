"""The strength of a finished adapter as a dial: what it learned and lost at each, and the choice.

The score is that on the run's validation rows or on other files, which training has not seen; test
rows decide nothing. What is lost is measured on retained texts, see `petl.training.retain`.
"""

import logging
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
from petl.data.inputs import read_inputs
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.training.dataloader import Splits, splits_to_score
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.retain.compare import retained
from petl.training.runs.records import SCORES, read_scores

KEY = "strengths"
logger = logging.getLogger(__name__)
DATA = "--data"
BATCH_SIZE = 8


@dataclass(frozen=True)
class Trade:
    """What an adapter has learned and lost, by strength.

    Attributes:
        metric: name of the scores.
        rows: validation rows that they are of, or rows of files.
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
    files: Sequence[str] = (),
    batch_size: int | None = None,
) -> Trade:
    """Score a saved adapter of a run at several strengths, and measure what it lost.

    Args:
        texts: retained ones.
        strengths: None: those of the method.
        files: with labels, whose rows are scored in place of validation rows.

    Raises:
        InputError: there is no run, or it held out no validation rows and there are no files; or
            these are test rows, or wrong.
        UnsupportedError: the adapter has no strength.
    """
    # before data and model are loaded
    config = saved.config
    require_strength(config)
    refuse_changed_base(saved.adapter, config)
    run = saved.run_config
    accelerator = start(run.train.seed, run.precision)
    splits = rows_of(saved, files) if files else splits_of(saved, accelerator)
    if splits.validation is None:
        raise InputError(
            f"{saved.adapter} was trained on all of its training rows (train.eval_steps=null), and "
            "on test rows nothing may be chosen: give others with --data FILE, or train with "
            "train.eval_steps=N"
        )
    if splits.inputs is not None:
        known = [text for text in texts if text in splits.inputs]
        texts = [text for text in texts if text not in splits.inputs]
        if not texts:
            raise InputError(f"all {len(known)} retained texts are training rows: give others")
        if known:
            logger.info("%d retained texts are training rows, and are left out", len(known))
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


def rows_of(saved: SavedAdapter, files: Sequence[str]) -> Splits:
    """Return the rows of files with labels, to score.

    Raises:
        InputError: a file is the test set of the run, or a row is wrong.
    """
    tested = saved.settings["data"].get("test")
    tests = {
        Path(name).resolve() for name in (tested if isinstance(tested, list) else [tested or ""])
    }
    test = next((name for name in files if Path(name).resolve() in tests), None)
    if test is not None:
        raise InputError(
            f"{DATA} {test} is data.test of the run, and on test rows nothing may be chosen: give "
            "other rows"
        )
    task = saved.saved_task
    inputs = read_inputs(files, task, saved.columns, labels=True, setting=DATA)
    return splits_to_score(task, saved.processor, (row for _, row in inputs))


def note_trade(saved: SavedAdapter, trade: Trade) -> None:
    """Add the trade to scores.json of the run."""
    if saved.run is not None and (saved.run / SCORES).is_file():
        scores = {**read_scores(saved.run), KEY: trade.entry()}
        write_atomic(saved.run / SCORES, as_json(scores, in_order=True))


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
