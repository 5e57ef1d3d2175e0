"""Predict rows with an adapted model: labels with probabilities, numbers, spans or answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel

from petl.adapters.export.saved_adapter import SavedAdapter, find
from petl.core.types import Settings
from petl.data.base import encode, name_refused
from petl.data.batch_sampler import chunks
from petl.data.tasks import COLUMN
from petl.data.tasks.base import Columns, Prediction, Row, Task
from petl.data.validation import RefusedRow
from petl.efficiency.rewrite import apply_rewrites, rewrites_of
from petl.errors import InputError
from petl.system.collectives import shared_out
from petl.system.progress import ProgressItems
from petl.training.dataloader import longest_first, to_device
from petl.training.distributed.launch import Launch, accelerate_restored, make_accelerator
from petl.training.generation import written

WINDOW = 32  # batches of texts among which rows are sorted by length; assumption: little padding
NEW_TOKENS = 256  # of an answer, where neither run nor command limits them; assumption


@dataclass(frozen=True)
class Predictor:
    """A model that predicts rows, in batches of similar length.

    Attributes:
        batch_size: rows of a batch.
        max_new_tokens: maximum length of a generated answer.
        columns: the run's settings under `data`.
        precision: "no" or "bf16", for autocast.

    Raises:
        InputError: a number is below 1.
    """

    model: PeftModel
    task: Task
    processor: Any
    accelerator: Accelerator
    batch_size: int
    max_new_tokens: int
    columns: Settings
    precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is not 1 or more")

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        trust_remote_code: bool = False,
        other_base: bool = False,
    ) -> "Predictor":
        """Load the model of a run or adapter once, for several calls of `petl.predict`.

        Args:
            run: its folder; this and the others as of `petl.predict`.
        """
        saved = find(run, trust_remote_code=trust_remote_code, other_base=other_base)
        # loading draws initial values, which the saved ones replace
        with accelerate_restored(), torch.random.fork_rng(devices=[]):
            return cls.of(saved, batch_size, max_new_tokens)

    @classmethod
    def of(
        cls, saved: SavedAdapter, batch_size: int | None = None, max_new_tokens: int | None = None
    ) -> "Predictor":
        """Load the model of a saved adapter; limits that are None are those of its run."""
        task, train = saved.saved_task, saved.run_config.train if saved.run else None
        accelerator = make_accelerator(Launch(), saved.precision)
        model = saved.model()
        if train is not None:  # the same kernels as in training
            apply_rewrites(model, rewrites_of(train, trains=False))
        default = 64 if train is None else train.eval_batch_size
        # not by `or`: 0 is refused and no default
        most = task.generate or NEW_TOKENS if max_new_tokens is None else max_new_tokens
        size = default if batch_size is None else batch_size
        limits = (size, most, saved.columns, saved.precision)
        return cls(model, task, saved.processor, accelerator, *limits)

    def autocast(self) -> torch.autocast:
        """The precision of the run; that of Accelerate is the one of its last Accelerator."""
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def window(self) -> int:
        """Number of rows that a process has in memory at a time."""
        # decoded images and sounds take much more memory than texts, and all have one length
        return self.batch_size * (WINDOW if self.task.reads_text else 1)

    @torch.no_grad()
    def predict(self, rows: Sequence[Row]) -> list[Prediction]:
        """Return the prediction of each row, which has the columns that `encode_rows` reads."""
        self.model.eval()
        # tasks find a row again by its number
        numbered = [{**row, "number": i} for i, row in enumerate(rows)]
        if not numbered:
            return []
        predictions = self.answers(numbered) if self.task.writes else self.outputs(numbered)
        # a row of which the model has read nothing has no prediction
        names = dict.fromkeys(name for found in predictions.values() for name in found)
        missing = dict.fromkeys(names or ("prediction",))
        return [predictions.get(i, missing) for i in range(len(rows))]

    def outputs(self, rows: Sequence[Row]) -> dict[int, Prediction]:
        """The predictions of rows by number, from one pass of the model over them."""
        encoded, values = self.values(rows)
        described = ({"_number": i, **row} for i, row in enumerate(encoded))
        return dict(self.task.described(values, described))

    @torch.no_grad()
    def values(self, rows: Sequence[Row]) -> tuple[list[Row], list[np.ndarray]]:
        """Rows as they are encoded, and what `Task.predict` returns for each."""
        self.model.eval()
        encoded = encode(self.task, self.processor, rows)
        collate = self.task.collate(self.processor, self.multiple)
        lengths = [len(row["input_ids"]) if "input_ids" in row else 1 for row in encoded]
        values: dict[int, np.ndarray] = {}
        for part in shown(chunks(longest_first(lengths), self.batch_size), rows):
            batch = to_device(collate([encoded[i] for i in part]), self.accelerator.device)
            with self.autocast():
                outputs = self.model(**batch)
            found = self.task.predict(outputs, batch).cpu().numpy()
            values |= dict(zip(part, found, strict=True))
        return encoded, [values[i] for i in range(len(encoded))]

    def answers(self, rows: Sequence[Row]) -> dict[int, Prediction]:
        """The generated answers to rows by number."""
        columns: Columns = {key: [row[key] for row in rows] for key in rows[0]}
        prompts = self.task.prompts(self.processor, columns)
        order = [i for i in longest_first([len(prompt) for prompt in prompts]) if prompts[i]]
        found: dict[int, Prediction] = {}
        for part in shown(chunks(order, self.batch_size), rows):
            with self.autocast():
                asked = [prompts[i] for i in part]
                names = self.task.tasks
                ids = [names.index(rows[i][COLUMN]) for i in part] if names else None
                texts = written(
                    self.model, self.processor, asked, self.max_new_tokens, ids,
                    is_chat=getattr(self.task, "chat", False), prefix=self.task.prefix,
                )  # fmt: skip
            found |= {i: {"prediction": text} for i, text in zip(part, texts, strict=True)}
        return found

    @property
    def multiple(self) -> int:
        """What the length of a batch is a multiple of."""
        return 1 if self.accelerator.device.type == "cpu" else 8  # as in training


def shown(batches: list[list[int]], rows: Sequence[Row]) -> ProgressItems[list[int]]:
    """The batches of a window, which may take long, as a pass that is shown."""
    return ProgressItems(batches, f"predicting the next {len(rows):,} rows", quiet=True)


def predicted(
    predictor: Predictor,
    rows: Iterable[tuple[Row, Row]],
    note: Callable[[int], None],
    locate: Callable[[int], str] | None = None,
) -> Iterator[list[tuple[Row, Prediction]]]:
    """Yield the rows of a stream window by window, in order, each with its prediction.

    All processes read the same rows, divide each window, and get the predictions of all of them.

    Args:
        rows: as `read_inputs` yields them.
        note: called with the number of rows that were predicted.
        locate: gives the place of a row by its number, for messages.
    """
    processes, stream = predictor.accelerator.num_processes, iter(rows)
    begun = 0  # rows before the window

    def predict(rows: Sequence[Row], numbers: Sequence[int]) -> list[Prediction]:
        try:
            return predictor.predict(rows)
        except RefusedRow:
            name_refused(predictor.task, predictor.processor, rows, locate, numbers)
            raise

    while window := list(islice(stream, predictor.window * processes)):
        inputs = [row for _, row in window]
        numbers = range(begun, begun + len(inputs))
        parts = [
            partial(predict, inputs[i::processes], numbers[i::processes]) for i in range(processes)
        ]
        results = shared_out(parts)
        found = [results[i % processes][i // processes] for i in range(len(inputs))]
        note(len(window))
        begun += len(window)
        yield list(zip((raw for raw, _ in window), found, strict=True))
        del window, inputs, parts, results, found  # before the next one is read
