"""Predict and evaluate from Python: what `petl predict` and `petl eval` do, on files or on rows."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from petl.adapters.export.saved_adapter import device, find
from petl.data.inputs import read_inputs
from petl.data.tasks.base import Prediction, Row
from petl.errors import InputError, first_line, shown
from petl.generation.prediction.columns import data_settings
from petl.generation.prediction.evaluation import evaluate_saved
from petl.generation.prediction.predictor import Predictor, predicted
from petl.system.progress import Pass
from petl.system.random_states import states_kept
from petl.training.distributed.launch import accelerate_restored

Data = str | Path | Iterable[str | Path] | Iterable[Mapping[str, Any]]


def predict(
    run: str | Path | Predictor,
    data: Data,
    *,
    columns: Mapping[str, str | None] | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
) -> list[Prediction]:
    """Return the predictions of rows, in their order.

        petl.predict("runs/tickets", [{"text": "my order is late"}])
        # [{"prediction": "delivery", "probability": 0.97, "probabilities": {...}}]

    Args:
        run: folder of a run or of an adapter; or a `petl.Predictor`, which has loaded one already.
        data: a file, several files, or rows: mappings from column to value, a `datasets.Dataset`,
            or a pandas.DataFrame. Labels are not needed.
        columns: the columns of the data where they are others than in training, by setting, such
            as {"text": "review"}.
        batch_size: rows of a batch; None: that of the run's evaluation.
        max_new_tokens: maximum length of a generated answer; None: that of the run, or 256.
        trust_remote_code: allow the base model to run code of its own.
        other_base: as of `petl.load`.

    Returns:
        For each row, what `petl predict` adds to it. For data larger than memory, use the command.

    Raises:
        InputError: there is no such run; a file, row or setting is wrong.
    """
    if isinstance(run, Predictor):
        given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        changed = {name: value for name, value in given.items() if value is not None}
        predictor = replace(run, **changed)
    else:
        predictor = Predictor.load(
            run,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            other_base=other_base,
        )
    names, rows = files_or_rows(data)
    settings = data_settings(predictor.columns, predictor.task, words_of(columns), labels=False)
    read = read_inputs(names, predictor.task, settings, rows=rows, setting="data")
    inputs = list(read)
    with Pass("predicting", len(inputs), unit="rows") as progress:
        windows = predicted(predictor, inputs, progress.advance, read.locate)
        return [found for window in windows for _, found in window]


def evaluate(  # noqa: PLR0913
    run: str | Path,
    data: Data | None = None,
    *,
    columns: Mapping[str, str | None] | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
) -> dict[str, float]:
    """Return the scores of a saved adapter on data with labels.

    Args:
        run: folder of a run or of an adapter.
        data: as of `predict`, with labels; None: the test set of the run.
        columns: as of `predict`.
        out: a folder that scores.json and predictions.jsonl are written to; None: none.
        batch_size: as of `predict`, for data that is given.
        max_new_tokens: likewise.
        trust_remote_code: likewise.
        other_base: likewise.

    Raises:
        InputError: there is no such run; a file, row, label or setting is wrong.
    """
    names, rows = ([], None) if data is None else files_or_rows(data)
    # those of the caller: the evaluation seeds them
    with states_kept(device()), accelerate_restored():
        return evaluate_saved(
            find(run, trust_remote_code=trust_remote_code, other_base=other_base),
            names,
            words_of(columns),
            None if out is None else Path(out),
            rows=rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )


def files_or_rows(data: Data) -> tuple[list[str], list[Row] | None]:
    """Return the names of files, or no names and rows."""
    if isinstance(data, str | Path):
        return [str(data)], None
    if isinstance(data, Mapping):
        raise InputError(f"data={shown(data)} is one mapping: give a list of rows, [{{...}}]")
    given: Any = data
    # iterating over a DataFrame gives the names of its columns
    items: list[Any] = records(given) if hasattr(given, "iterrows") else list(given)
    if not items:
        raise InputError("data has no rows")
    if all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items], None
    return [], items


def records(table: object) -> list[Row]:
    """Return the rows of a pandas.DataFrame with Python's own values, None for missing ones."""
    try:
        return pa.Table.from_pandas(table, preserve_index=False).to_pylist()
    except pa.ArrowException as error:  # such as numbers and texts in one column
        raise InputError(
            f"the DataFrame has a column of several types: {first_line(error)}; give its rows, as "
            'data.to_dict("records")'
        ) from error


def words_of(columns: Mapping[str, str | None] | None) -> list[str]:
    """Return settings of columns as words of a command line."""
    # in quotes, else a column named null would be none
    return [
        f"data.{name}=null" if value is None else f'data.{name}="{value}"'
        for name, value in (columns or {}).items()
    ]
