"""Replay: retained texts among the training rows, in each batch (`retain.mix`).

A step of B rows has m = max(1, round(mix B)) texts and B - m rows of the task. An epoch visits each
row of the task once, in an order that depends on the seed and the epoch alone; texts come in turn,
in random orders of all of them, one after the other. The loss of a text is that of a language model
over its tokens, weighted as every other token of the batch. Texts get a forward pass of their own,
or short rows would be padded to their length.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

import numpy as np
from datasets import Dataset, concatenate_datasets

from petl.data.base import Stream, stream_refused
from petl.data.batch_sampler import Ints, epoch_generator, random_permutation
from petl.data.tasks import IDS
from petl.data.tasks.base import Task
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.seq2seq import Seq2Seq
from petl.errors import InputError, UnsupportedError
from petl.training.dataloader import TrainingRows
from petl.training.retain.rows import RetainedRow

TEXT_SEED = 7  # added to the epoch, so that texts and rows are in orders of their own


class ReplayOrder:
    """The steps of an epoch over rows of the task, then texts, in one set of rows.

    Args:
        rows: of the task; they come first.
        texts: after them.
        batch_size: rows of a step.
        replayed: texts of a step, at least one and fewer than all rows of it.
    """

    repeats, is_stream = 1, False

    @property
    def apart(self) -> int:
        """The texts of a step, whose lengths are not those of the task's rows."""
        return self.replayed

    def __init__(self, rows: int, texts: int, batch_size: int, replayed: int) -> None:
        self.rows, self.texts, self.replayed = rows, texts, replayed
        # a batch keeps its size: replay takes the place of rows of the task
        self.own = batch_size - replayed
        # the last step has the remaining rows, and as many texts as the others
        of_task = np.full(math.ceil(rows / self.own), self.own)
        of_task[-1] = rows - self.own * (len(of_task) - 1)
        self.sizes: Ints = of_task + replayed

    def step_order(self, seed: int, epoch: int) -> Ints:
        """The steps in their order: rows are permuted, not steps."""
        return np.arange(len(self.sizes))

    def batches(self, seed: int, epoch: int) -> Iterator[Ints]:
        """Yield the rows of each step of an epoch: those of the task, then texts."""
        # the order of a run without replay
        order = random_permutation(self.rows, epoch_generator(seed, epoch))
        needed = len(self.sizes) * self.replayed
        turns = islice(self._texts(seed, epoch), needed)
        texts = np.fromiter(turns, dtype=np.int64, count=needed)
        for step in range(len(self.sizes)):
            own = order[step * self.own : (step + 1) * self.own]
            replayed = texts[step * self.replayed : (step + 1) * self.replayed]
            yield np.concatenate([own, self.rows + replayed])

    def _texts(self, seed: int, epoch: int) -> Iterator[int]:
        """Yield texts without end; an epoch goes on where the one before it stopped."""
        # all epochs have as many texts
        done = epoch * len(self.sizes) * self.replayed
        first, skipped = divmod(done, self.texts)
        rounds = (
            random_permutation(self.texts, epoch_generator(seed + TEXT_SEED, -1 - number))
            for number in count(first)
        )
        return islice(chain.from_iterable(rounds), skipped, None)


def replayed_rows(batch_size: int, mix: float) -> int:
    """Return how many rows of a batch are texts.

    Raises:
        InputError: none would be left to the task.
    """
    replayed = max(1, round(mix * batch_size))
    if replayed >= batch_size:
        raise InputError(
            f"retain.mix={mix:g} leaves none of the {batch_size} rows of a batch to the task: set "
            "a larger train.batch_size, or lower it"
        )
    return replayed


def require_text_task(task: Task, mix: float) -> None:
    """Raise UnsupportedError unless the rows of a task are texts with a loss on their tokens."""
    if isinstance(task, CausalLM | Seq2Seq) and not task.tasks:
        return
    kind = "data of several tasks have" if task.tasks else f"data.task={task.name} has"
    raise UnsupportedError(
        f"retain.mix={mix:g} replays texts, and {kind} no loss of a language model on them; set "
        "retain.mix=0"
    )


def with_texts(rows: TrainingRows, texts: Sequence[RetainedRow], mix: float) -> TrainingRows:
    """Return training rows with texts among them.

    Raises:
        InputError: the rows are a stream, or none would be left of a batch, or of the texts.
        UnsupportedError: the task has no loss of a language model.
    """
    require_text_task(rows.task, mix)
    if isinstance(rows.train, Stream):
        raise stream_refused(f"retain.mix={mix:g}")
    # before the texts are tokenized
    size = rows.settings.batch_size
    order = ReplayOrder(len(rows.train), len(texts), size, replayed_rows(size, mix))
    assert IDS not in rows.train.column_names, "checked above"
    has_encoder, names = isinstance(rows.task, Seq2Seq), rows.train.column_names
    encoded = [_encoded(text.ids, names, has_encoder=has_encoder) for text in texts]
    # of the same types, or the two could not be one
    added = Dataset.from_list(encoded, features=rows.train.features)
    return rows._replace(train=concatenate_datasets([rows.train, added]), order=order)


def _encoded(ids: list[int], names: Sequence[str], *, has_encoder: bool) -> dict[str, object]:
    """Return a text in the columns of encoded rows."""
    half = max(1, len(ids) // 2) if has_encoder else len(ids)
    known: dict[str, object] = {
        "input_ids": ids[:half],
        "attention_mask": [1] * half,
        # an encoder reads the first half, its decoder's labels are the rest
        "labels": ids[half:] if has_encoder else ids,
        "position_ids": list(range(half)),
        "token_type_ids": [0] * half,
    }
    # of generated answers, which training does not read: none
    return {name: known.get(name) for name in names}
