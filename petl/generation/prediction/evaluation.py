"""Evaluate a saved adapter: on the test set of its run, or on files with labels."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.adapters.export.saved_adapter import score as score_on_test
from petl.core.types import Settings
from petl.data.base import name_refused
from petl.data.files import READERS, suffix_of
from petl.data.inputs import read_inputs
from petl.data.tasks.base import Row, Task
from petl.data.tasks.causal_lm import CausalLM
from petl.data.validation import RefusedRow
from petl.errors import InputError, printable
from petl.generation.prediction.columns import data_settings
from petl.generation.prediction.predictor import Predictor
from petl.methods import losses
from petl.system.files.disk import as_json, check_writable, write_atomic
from petl.system.files.outputs import check_output
from petl.system.processes import is_first
from petl.system.progress import ProgressItems
from petl.training.dataloader import splits_to_score
from petl.training.evaluate import Evaluator
from petl.training.runs.records import EVALUATED, PREDICTIONS, SCORES

DATA, TEXT = "--data", "data.format=text"
# settings of the columns of conversations
OF_CHATS = ("format", "messages", "prompt", "answer", "system", "generate")
# what an evaluation writes to its place in a run, with the marks of one
OWN = (SCORES, PREDICTIONS, "index.html", "worst.jsonl", "*.csv"), (SCORES, PREDICTIONS)


def folder_of(saved: SavedAdapter, names: Sequence[str]) -> Path | None:
    """The folder of an evaluation inside the run, by the name of its data; None without a run.

    Args:
        names: of files; empty: the test set of the run.
    """
    if saved.run is None:
        return None
    if not names:
        return saved.run / EVALUATED
    # joined names of many files may be too long: file systems take 255 bytes
    name = re.sub(r"[^\w.-]+", "-", "-".join(map(stem_of, names)))[:100]
    folder = saved.run / f"eval-{name}"
    # another test.csv is not the test set of the run
    return saved.run / f"{EVALUATED}-file" if folder.name == EVALUATED else folder


def is_place(saved: SavedAdapter, folder: Path) -> bool:
    """Return True for a folder of the form that `folder_of` returns."""
    place = folder.absolute()
    in_run = saved.run is not None and place.parent.resolve() == saved.run.resolve()
    return in_run and place.name.startswith("eval-")


def stem_of(name: str) -> str:
    """The name of a file without its folder and the suffix of its format."""
    file, suffix = Path(name).name, suffix_of(Path(name))
    return file[: file.lower().rindex(suffix)] if suffix in READERS else file


def evaluate_saved(
    saved: SavedAdapter,
    names: Sequence[str],
    settings: Sequence[str],
    folder: Path | None,
    *,
    rows: Sequence[Row] | None = None,
    **limits: int | None,
) -> dict[str, float]:
    """Return the scores of an adapter; write them and the predictions to a folder, if one is given.

    Args:
        names: files with labels; empty: the test set of the run.
        settings: of their columns, in place of those of the run.
        rows: with labels, in place of files.
        limits: `batch_size` and `max_new_tokens` of `Predictor.of`; None: those of the run.

    Raises:
        InputError: a file, row, label or setting is wrong, or the folder cannot be written.
    """
    given = [name for name, value in limits.items() if value is not None]
    has_data = bool(names) or rows is not None
    if not has_data and given:
        raise InputError(f"{given[0]}={limits[given[0]]} is for files: give them with {DATA} FILE")
    if not has_data and settings:
        raise InputError(f"{settings[0]} names columns of files: give them with {DATA} FILE")
    if folder is not None and is_first():  # one process writes, all of them compute
        check_output(folder, *(OWN if is_place(saved, folder) else ()))
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    kept = None if folder is None else folder / PREDICTIONS
    if has_data:
        task, known = read_as(saved, settings)
        columns = data_settings(known, task, settings)
        inputs = read_inputs(names, task, columns, rows=rows, labels=True, setting=DATA)
        what = f"reading {printable(', '.join(names))}".rstrip()
        # all in memory: metrics over classes need every row
        parsed = [row for _, row in ProgressItems(inputs, what, unit="rows", quiet=True)]
        scores = score_on_rows(saved, task, parsed, inputs.locate, kept, limits)
    else:
        scores = score_on_test(saved, kept)
    if folder is not None and is_first():
        write_atomic(folder / SCORES, as_json(scores, in_order=True))
    return scores


def read_as(saved: SavedAdapter, settings: Sequence[str]) -> tuple[Task, Settings]:
    """Return the task of files, and the settings of their columns that the run has.

    With data.format=text, a model of conversations reads texts without its template.
    """
    task, known = saved.saved_task, saved.columns
    if not (isinstance(task, CausalLM) and task.chat and TEXT in settings):
        return task, known
    # columns of conversations, and answers to generate, are of no text
    plain = {name: value for name, value in known.items() if name not in OF_CHATS}
    return replace(task, chat=False, generate=None), plain


def score_on_rows(
    saved: SavedAdapter,
    task: Task,
    rows: list[Row],
    locate: Callable[[int], str] | None,
    kept: Path | None,
    limits: Mapping[str, int | None],
) -> dict[str, float]:
    """Return the scores of an adapter on rows with labels, as `read_inputs` reads them."""
    predictor = Predictor.of(saved, **limits)
    # the task decides how long answers may be
    if task.writes and limits.get("max_new_tokens"):
        writing = task
        task = replace(writing, generate=limits["max_new_tokens"])
    try:
        splits = splits_to_score(task, predictor.processor, rows, predictor.multiple)
    except RefusedRow:
        name_refused(task, predictor.processor, rows, locate, range(len(rows)))
        raise
    if saved.run is not None:
        losses.attach(predictor.model, saved.run_config.loss)  # for its metrics
    evaluator = Evaluator(predictor.model, splits, predictor.accelerator, predictor.batch_size)
    return evaluator.test(kept=kept)
