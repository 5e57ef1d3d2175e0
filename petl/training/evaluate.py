"""Evaluation: the scores of a model over rows, and the predictions that they are of; its mode.

Predictions are kept during the pass that scores them, and written as JSON lines in the order of the
data: the number of the row (`row`), the columns that the task shows, label and prediction.
Generated answers are scored by exact match and ROUGE.
"""

import json
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from petl.core.lifecycle import lifecycle
from petl.core.model.modes import without_cache
from petl.core.types import base_of
from petl.data.batch_sampler import chunks
from petl.data.tasks import IDS, SET
from petl.data.tasks.base import NON_INPUT_PREFIX, Prediction, Row, Task, not_finite, rounded
from petl.data.tasks.scores import named
from petl.errors import RunStopped
from petl.system.collectives import gathered, is_sharded
from petl.system.files.disk import atomic_file, stop_when_full
from petl.system.progress import Pass, ProgressItems
from petl.training.dataloader import Batch, Splits, load, longest_first
from petl.training.runs.settings import TrainConfig

if TYPE_CHECKING:
    from petl.training.feature_cache import FeatureCache

SCORES = ("exact_match", "rouge1", "rouge2", "rougeL")
logger = logging.getLogger(__name__)
KnownScores = Callable[[PreTrainedModel | PeftModel, Task, Accelerator], dict[str, float] | None]
REPORT_ROWS = 256  # assumption: enough test rows for metrics of extra losses, which are slow


class Predictions:
    """Collects the predictions of a process; they stay on the device until they are gathered.

    Attributes:
        answers: generated answers with their scores, by the position of the encoded row.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[list[int], Tensor]] = []
        self.answers: dict[int, Prediction] = {}

    def add(self, positions: list[int], values: Tensor) -> None:
        """Keep the result of `Task.predict` for the rows at these positions."""
        self.parts.append((positions, values))

    def gathered(self) -> tuple[dict[int, np.ndarray], dict[int, Prediction]]:
        """The values and the answers of all processes, by position; all of them must call it."""
        own = {
            position: value
            for positions, values in self.parts
            for position, value in zip(positions, values.cpu().numpy(), strict=True)
        }
        # processes may have computed a row twice, to stay in step
        values, answers = {}, {}
        for one, other in gathered((own, self.answers)):
            values |= one
            answers |= other
        return values, answers

    def write(
        self, file: Path, task: Task, rows: Dataset, sources: Dataset, accelerator: Accelerator
    ) -> None:
        """Write the predictions of all processes to a file (main process only); all must call it.

        Args:
            rows: the encoded rows.
            sources: the rows that they were made of.
        """
        values, answers = self.gathered()
        # after the gather, in which all processes take part
        if not accelerator.is_main_process:
            return
        described = describe(task, values, rows)
        for position, answer in answers.items():
            number = numbers_of(rows, [position])[0]
            # a generated answer comes on top of what the forward pass predicts
            described[number] = described.get(number, {}) | answer
        shown = sources.select_columns([name for name in task.shown if name in sources.features])
        with stop_when_full(file.parent), atomic_file(file) as opened:
            for number, found in sorted(described.items()):
                # a data set without columns has no rows to index
                source = shown[number] if shown.column_names else {}
                line = json.dumps({"row": number, **source, **found}, ensure_ascii=False)
                opened.write(f"{line}\n".encode())


def describe(task: Task, values: dict[int, np.ndarray], rows: Dataset) -> dict[int, Prediction]:
    """The prediction of each source row, by number, from the values of encoded rows by position."""
    if task.packs or not values:
        return {}  # a packed row has parts of several
    positions = sorted(values)
    return dict(
        task.described((values[i] for i in positions), described_rows(rows.select(positions)))
    )


def described_rows(rows: Dataset) -> Iterator[Row]:
    """Yield the columns of encoded rows that `Task.described` reads, and always `_number`."""
    names = [n for n in rows.column_names if n.startswith(NON_INPUT_PREFIX) or n == "labels"]
    kept = rows.select_columns(names) if names else ({} for _ in range(len(rows)))
    for number, row in enumerate(kept):
        yield {"_number": number, **row}


def numbers_of(rows: Dataset, positions: Iterable[int]) -> list[int]:
    """The numbers of the source rows of encoded rows; their positions if none was dropped."""
    if "_number" not in rows.column_names:
        return list(positions)
    return [rows[position]["_number"] for position in positions]


class ScoredPart(NamedTuple):
    """Those of the encoded rows that a pass computes, in the order in which it does."""

    rows: Dataset
    order: list[int]

    def summarized(self, task: Task, found: Tensor, *, tunes: bool) -> dict[str, float]:
        """Return the scores, from what `Evaluator.one_pass` returned.

        Args:
            tunes: as in `Evaluator.rows`.
        """
        if not task.by_row:
            return (task.tuned(found) if tunes else task).summarize(found)
        if len(self.order) == len(self.rows):
            return task.summarize_rows(in_place(found, self.order), self.rows)
        return task.summarize_rows(found, self.rows.select(self.order))


@dataclass(frozen=True)
class Evaluator:
    """Scores a model over encoded rows; each row counts once, on any number of processes.

    Attributes:
        splits: the rows, with their task.
        batch_size: rows of a forward pass of a process.
    """

    model: PreTrainedModel | PeftModel
    splits: Splits
    accelerator: Accelerator
    batch_size: int

    def test(
        self,
        *,
        when: str = "",
        kept: Path | None = None,
        known: KnownScores | None = None,
        store: "FeatureCache | None" = None,
    ) -> dict[str, float]:
        """Return the scores over the test rows, and those of generated answers if there are any.

        Metrics of extra losses over the first rows are added, except for a sharded model.

        Args:
            when: of the run this is, such as "before training", for the display of the progress.
            kept: the file that the predictions are written to, of each row; None: they are not
                kept.
            known: returns the task's scores if another pass has computed them; None: it has not.
            store: what an earlier run has computed of these rows, and takes what this one does.

        Raises:
            RunStopped: the outputs are not finite; the message names the first such tensor.
        """
        splits, accelerator = self.splits, self.accelerator
        what = f"scoring {len(splits.test):,} test examples {when}".rstrip()
        predictions = Predictions()
        collected = predictions if kept else None
        scores = known(self.model, splits.task, accelerator) if known and kept is None else None
        if scores is None:
            scores = self.rows(splits.test, collected, what, store=store)
        self._refuse_not_finite(scores)
        if splits.task.generate is not None:
            scores |= self.answers(predictions, when=when)
        if kept is not None and splits.sources is not None:
            predictions.write(kept, splits.task, splits.test, splits.sources, accelerator)
        return scores | self._extra_metrics()

    def _extra_metrics(self) -> dict[str, float]:
        """Return the metrics of the extra losses of the model over the first test rows."""
        if not isinstance(self.model, PeftModel):  # without an adapter it has no such losses
            return {}
        splits, accelerator, life = self.splits, self.accelerator, lifecycle(self.model)
        # those metrics call single layers, which are not gathered in a sharded model
        if not life.losses or is_sharded(self.model):
            return {}
        rows = splits.test.select(range(min(REPORT_ROWS, len(splits.test))))
        # batches are divided, not their rows: padding, which some metrics count, does not depend on
        # the number of processes
        every = chunks(longest_first(splits.task.lengths(rows)), self.batch_size)
        mine = every[accelerator.process_index :: accelerator.num_processes]
        with (
            accelerator.autocast(),
            Pass("computing the metrics of extra losses", None),
        ):
            more = life.report(load(rows, splits.collate, mine, accelerator.device))
        if more and len(rows) < len(splits.test):
            logger.info(
                "%s: of the first %d of %d test examples",
                ", ".join(more),
                len(rows),
                len(splits.test),
            )
        return more

    def _refuse_not_finite(self, scores: dict[str, float]) -> None:
        """Raise RunStopped if a score on the test rows is NaN or infinite."""
        name = not_finite(scores)
        if name is None:
            return
        splits, accelerator = self.splits, self.accelerator
        # of several processes, each has other rows: a search in some would leave the others waiting
        is_alone = accelerator.num_processes == 1
        order = longest_first(splits.task.lengths(splits.test)) if is_alone else []
        labels, batches = splits.task.label_columns, chunks(order, self.batch_size)
        inputs = (
            {name: tensor for name, tensor in batch.items() if name not in labels}
            for batch in load(splits.test, splits.collate, batches, accelerator.device)
        )
        with accelerator.autocast():
            where = resolve_name("petl.training.non_finite:first_not_finite")(
                self.model.eval(), inputs
            )
        raise RunStopped(
            f"the outputs on the test examples are not finite ({name} is {scores[name]:g}): "
            f"{where}; nothing is known about this model's scores"
        )

    @torch.no_grad()
    def rows(
        self,
        rows: Dataset,
        predictions: Predictions | None = None,
        what: str | None = None,
        *,
        tunes: bool = False,
        store: "FeatureCache | None" = None,
    ) -> dict[str, float]:
        """Return the task's scores over some rows; also of each task or set, if there are several.

        Args:
            predictions: gets those of this process.
            what: the pass does, for the display of its progress; None: the validation of a
                training, whose passes are frequent.
            tunes: True for validation rows: what predictions depend on is chosen for them.
            store: as of `test`.
        """
        task = self.splits.task
        names, column = (task.tasks, IDS) if task.tasks else (self.splits.sets, SET)
        order = longest_first(task.lengths(rows))
        if not names or task.scores_by_task:
            part = ScoredPart(rows, order)
            found = self.one_pass(part, predictions, what, store)
            return part.summarized(task, found, tunes=tunes)
        ids = list(rows[column])
        parts, orders, by_task = [], [], {}
        for number, name in enumerate(names):
            own = [row for row in order if ids[row] == number]
            if not own:
                logger.warning("no examples of %s are among those that are scored", name)
                continue
            shown = what and f"{what}: the {len(own):,} of {name}"
            part = ScoredPart(rows, own)
            found = self.one_pass(part, predictions, shown, store)
            by_task |= named(name, part.summarized(task, found, tunes=tunes), task.metric)
            parts.append(found)
            orders += own
        total = torch.cat(parts) if task.by_row else torch.stack(parts).sum(0)
        return ScoredPart(rows, orders).summarized(task, total, tunes=tunes) | by_task

    def one_pass(
        self,
        part: ScoredPart,
        predictions: Predictions | None,
        what: str | None,
        store: "FeatureCache | None" = None,
    ) -> Tensor:
        """Return the sum of `Task.score` over the rows, or the values of each, in their order."""
        model, splits, accelerator, size = (
            self.model,
            self.splits,
            self.accelerator,
            self.batch_size,
        )
        task, (rows, order) = splits.task, part
        mine = order[accelerator.process_index :: accelerator.num_processes]
        # every process runs as many passes as the first: a sharded model needs all of them in each
        each = math.ceil(len(order) / accelerator.num_processes)
        if task.by_row:  # gather needs equally many rows from each process
            own = batches = chunks(mine + order[: each - len(mine)], size)
        else:
            own = chunks(mine, size)
            # surplus batches keep the processes in step; their scores are cut off below
            batches = own + [order[:1]] * (math.ceil(each / size) - len(own))
        was_training = model.training  # evaluation within training switches dropout off
        model.eval()
        parts = []
        loaded = load(rows, splits.collate, batches, accelerator.device)
        shown = ProgressItems(loaded, what or "validation", len(batches), quiet=what is None)
        for positions, batch in zip(batches, shown, strict=True):
            predicts = predictions is not None
            known = store.found(batch, 1 + predicts) if store else []
            found = [each.to(accelerator.device) for each in known]
            if not found:
                found = self._scored(batch, predicts=predicts)
                if store:
                    store.keep(batch, found)
            parts.append(found[0])
            if predictions is not None:
                predictions.add(positions, found[1])
        model.train(was_training)
        if task.by_row:
            values = accelerator.gather(torch.cat(parts))
            return interleaved(values, accelerator.num_processes)[: len(order)]
        total = torch.stack(parts)[: len(own)].sum(0)
        return accelerator.reduce(total, reduction="sum")

    def _scored(self, batch: Batch, *, predicts: bool) -> list[Tensor]:
        """Return the score of a batch, and its predictions if they are asked for."""
        task = self.splits.task
        with self.accelerator.autocast():
            outputs = task.outputs(self.model, batch)  # without labels: `score` computes the loss
        if not predicts:
            return [task.score(outputs, batch)]
        values = task.predict(outputs, batch)
        return [values.sum(0) if task.sums_predictions else task.score(outputs, batch), values]

    @torch.no_grad()
    def answers(
        self, predictions: Predictions | None = None, *, when: str = ""
    ) -> dict[str, float]:
        """Return exact match (white space aside), ROUGE and the number of answers to the test rows.

        Answers are decoded greedily, up to `task.generate` tokens or the end token.

        Args:
            predictions: gets those of this process.
            when: as of `test`.
        """
        model, splits, accelerator = self.model, self.splits, self.accelerator
        task, processor = splits.task, splits.processor
        generation = import_module("petl.training.generation")  # for a task with answers
        rouge = resolve_name("petl.data.tasks.metrics:rouge")
        ids = list(splits.test[IDS]) if task.tasks else None
        rows = splits.test.select_columns([*task.prompt_columns, "_answer"])
        lengths = [len(prompt) for prompt in rows[task.prompt_columns[0]]]
        # longest prompts first: an out-of-memory error comes early, and padding is small
        order = longest_first(lengths)
        # every process generates as many batches as the first, each as long as the longest of any:
        # a sharded model needs all processes in each forward pass
        processes = accelerator.num_processes
        own = chunks(order[accelerator.process_index :: processes], self.batch_size)
        surplus = math.ceil(math.ceil(len(order) / processes) / self.batch_size) - len(own)
        was_training = model.training
        model.eval()
        total = torch.zeros(1 + len(SCORES), dtype=torch.float32, device=accelerator.device)
        what = f"generating answers to {len(rows):,} test examples {when}".rstrip()
        for number, part in enumerate(ProgressItems(own + [order[:1]] * surplus, what)):
            batch = rows.select(part)
            with accelerator.autocast():
                prompts = [task.prompt(processor, row) for row in batch]
                of_part = ids and [ids[row] for row in part]
                asked = model, processor, prompts, task.generate or 1, of_part
                is_chat = getattr(task, "chat", False)
                texts = generation.written(*asked, is_chat=is_chat, prefix=task.prefix)
            if number >= len(own):  # a surplus batch, computed for the other processes
                continue
            for position, text, answer in zip(part, texts, batch["_answer"], strict=True):
                exact = float(text.split() == answer.split())
                scores = {"exact_match": exact, **rouge(text, answer)}
                total += torch.tensor(
                    [1.0, *(scores[name] for name in SCORES)], device=accelerator.device
                )
                if predictions is not None:
                    described = {name: rounded(scores[name]) for name in SCORES}
                    predictions.answers[position] = {
                        "label": answer,
                        "prediction": text,
                        **described,
                    }
        model.train(was_training)
        # sums and count in one reduction
        count, *sums = accelerator.reduce(total, reduction="sum").tolist()
        return {**{k: v / count for k, v in zip(SCORES, sums, strict=True)}, "answers": count}


def in_order(gathered: Tensor, order: list[int], processes: int) -> Tensor:
    """Return gathered rows in the order of the data set.

    Process p of P has sent those at p, p + P, ... of `order`.
    """
    return in_place(interleaved(gathered, processes)[: len(order)], order)


def interleaved(gathered: Tensor, processes: int) -> Tensor:
    """Return gathered rows in the order in which the processes took turns."""
    return gathered.unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)


def in_place(values: Tensor, order: list[int]) -> Tensor:
    """Return values by row: position i of `values` is row order[i]."""
    # invert the permutation
    placed = torch.empty_like(values)
    placed[torch.tensor(order, device=values.device)] = values
    return placed


@contextmanager
def for_training(model: PeftModel, settings: TrainConfig) -> Generator[None]:
    """Inside the block: training mode, no KV cache, gradient checkpointing as configured."""
    base = base_of(model)
    kind = settings.gradient_checkpointing
    if kind:
        if kind == "reentrant":  # it needs an input that requires a gradient
            base.enable_input_require_grads()
        options = {"use_reentrant": kind == "reentrant"}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
    try:
        with without_cache(base):
            yield
    finally:
        model.eval()
        if kind:
            base.gradient_checkpointing_disable()
        # undo both: evaluation and saving expect the model as it was
        if kind == "reentrant":
            base.disable_input_require_grads()
