"""Demonstrations of a run: pairs of texts for methods that compute an adapter from them, as ICV.

method.pairs=answers   the last question and answer of a conversation, or text and target
method.pairs=columns   text and target, or text and text_pair, of a row

Both are encoded as plain text, without the chat template: its closing tokens would be the last ones
of every text, whatever the text is. `method.calibration_data` names other data, as for CorDA.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from petl.data.base import RawData, Row, Stream, as_dataset, read_data, read_from
from petl.data.batch_sampler import permutation
from petl.data.refused_rows import encode_usable
from petl.data.tasks.base import Pad, pad_id
from petl.data.tasks.chat import unpacked
from petl.errors import InputError
from petl.training.calibration import (
    GROUP,
    CalibrationBatches,
    CalibrationData,
    read_calibration,
)
from petl.training.dataloader import Batch, Splits, hold_out, numbered
from petl.training.runs.config import RunConfig

HELD = 64  # training rows on which strengths are compared; assumption: enough for a mean loss


class Pairs(Sequence[Row]):
    """The demonstrations in some rows, as token ids `source` and `target`."""

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, pairs: str) -> None:
        self.rows, self.tokenizer, self.pairs = rows, tokenizer, pairs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        texts = texts_of(self.rows[number], self.pairs)
        return {name: self.encode(text, name) for name, text in texts.items()}

    def encode(self, text: str, name: str) -> list[int]:
        """Return the tokens of a text, without special tokens at its end."""
        ids = list(self.tokenizer(text.strip(), verbose=False)["input_ids"])
        closing = set(self.tokenizer.all_special_ids)
        while ids and ids[-1] in closing:
            ids.pop()
        if not ids:
            raise InputError(f"the {name} {text!r} of a demonstration has no token; leave it out")
        return ids

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Pad demonstrations on the right, for `petl.wrap(..., calibration=...)`."""
        pad, batch = Pad(pad_id(self.tokenizer)), {}
        for name in ("source", "target"):
            masks = [{name: [1] * len(row[name])} for row in rows]
            batch[f"{name}_input_ids"] = pad.stack(rows, name, pad.pad_id)
            batch[f"{name}_attention_mask"] = pad.stack(masks, name, 0)
        return batch


def texts_of(row: Row, pairs: str) -> dict[str, str]:
    """Return source and target of a row.

    Raises:
        InputError: the row has none.
    """
    if pairs == "answers" and "messages" in row:
        turns = unpacked(row["messages"]).turns
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        asked = [turn for turn in turns[: answers[-1]] if turn["role"] == "user"] if answers else []
        if not asked:
            roles = [turn["role"] for turn in turns]
            raise InputError(
                f"a conversation of the demonstrations has no question with an answer, but {roles}"
            )
        return {"source": asked[-1]["content"], "target": turns[answers[-1]]["content"]}
    second = next((name for name in ("target", "text_pair") if row.get(name) is not None), None)
    if "text" in row and second is not None and (pairs == "columns" or second == "target"):
        return {"source": row["text"], "target": row[second]}
    needs = "text and target (data.task=seq2seq), or text and text_pair"
    if pairs == "answers":
        needs = "messages: conversations with answers (data.prompt and data.answer, for instance)"
    raise InputError(
        f"method.pairs={pairs} needs rows with {needs}, and the demonstrations have "
        f"{', '.join(row)}: choose other data, or name them in {GROUP}.data"
    )


def demonstrations(config: Any, run: RunConfig, splits: Splits) -> CalibrationBatches:
    """Return this process's batches of the demonstrations of a run.

    Args:
        config: of the method, with `pairs` and `calibration_data`.
        run: for the data, which are read again: encoded rows have lost their texts.
        splits: of the same data.

    Raises:
        InputError: the data have no such pairs, or `strength=auto` has no rows to compare on.
    """
    settings = settings_of(config)
    if settings.data is None:
        rows = training_sources(read_from(run.data), run, splits)
    else:
        rows = as_dataset(read_data(settings.data), settings.num_samples)
    if config.strength == "auto" and held_rows(splits, settings) is None:
        raise InputError(
            f"method.strength=auto compares strengths on training rows that are no demonstrations, "
            f"and the {len(splits.known)} rows are all among the {settings.num_samples} "
            f"demonstrations: lower {GROUP}.num_samples, or set train.eval_steps to hold out rows"
        )
    pairs = Pairs(rows, splits.processor, config.pairs)
    return CalibrationBatches(rows=pairs, collate=pairs.collate, settings=settings)  # ty: ignore[invalid-argument-type]


def settings_of(config: Any) -> CalibrationData:
    """Return the checked settings of the demonstrations."""
    return read_calibration(config.calibration_data or {"num_samples": 32})


def training_sources(data: RawData, run: RunConfig, splits: Splits) -> Dataset:
    """Return the rows that `splits.train` was encoded from, in its order.

    Raises:
        InputError: they are a stream.
    """
    if isinstance(data.train, Stream):
        raise InputError(
            f"data.streaming=true leaves the demonstrations open: name data in {GROUP}.data, or "
            "set data.streaming=false and data.train_rows=N"
        )
    rows, task = numbered(data.train), splits.task
    count = len(splits.known) + len(splits.validation or ())
    if len(rows) != count:  # some were dropped, or several packed into one
        data, (kept,) = encode_usable(
            data, splits.processor, lambda data: [numbered(as_dataset(data, 0))]
        )
        if "_number" not in kept.column_names:
            raise InputError(
                f"rows of data {data.name} are packed, so that none is a demonstration: set "
                f"data.pack=false, or name other data in {GROUP}.data"
            )
        rows = numbered(as_dataset(data, 0)).select(kept["_number"])
    return hold_out(rows, run.train.validation_fraction, task.group)[0]


def held_positions(splits: Splits, settings: CalibrationData) -> list[int]:
    """Return the positions in `splits.train` of rows that are no demonstrations, at most `HELD`."""
    order = permutation(len(splits.known), settings.seed, 0)
    first = settings.num_samples if settings.data is None else 0
    return order[first : first + HELD]


def held_rows(splits: Splits, settings: CalibrationData) -> Dataset | None:
    """Return encoded training rows that are no demonstrations; None if there are none.

    Those held out for validation, if the run validates, else others that are not demonstrations.
    """
    if splits.validation is not None:
        return splits.validation.select(range(min(HELD, len(splits.validation))))
    positions = held_positions(splits, settings)
    return splits.known.select(positions) if positions else None
