"""Streaming: rows that are read as they are needed, in a shuffled order that is reproducible.

A stream is read from its beginning as often as the run needs. Its rows are shuffled in a buffer:
the next row in the order is a random row of the buffer, and the next row of the stream takes its
slot. The order depends on the stream, the buffer's size and the seed alone; so a resumed run reads
the stream again up to the row where it stopped, and sees the same rows as an uninterrupted run.

Each process and each worker reads the complete stream, since dividing files among them would make
the order depend on their number. Where each row gives one encoded row (`Task.one_for_one`), the
buffer holds raw rows, and a process encodes only the rows that it asks for. Other tasks drop,
truncate or join rows, so that the position of an encoded row depends on all rows before it: the
buffer then holds encoded rows, and every process encodes all of them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile
from operator import itemgetter
from random import Random
from typing import Generic

from datasets import Dataset

from petl.data.base import Stream, encode
from petl.data.tasks.base import NON_INPUT_PREFIX, P, Row, Task
from petl.errors import InputError


@dataclass
class StreamedRows(Generic[P]):
    """Encoded rows in the order of training, which a DataLoader reads by position.

    Positions have to ascend, except for the `recent` last ones, which stay in memory; a lower
    position restarts the stream. Positions have no end: at its end the stream starts again, in
    another order.

    Attributes:
        seed: seed of the order.
        recent: number of rows that are kept after they were read.
        held: number of rows, the first of the stream, that are held out.
    """

    stream: Stream
    task: Task[P]
    processor: P
    seed: int
    recent: int
    held: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Go back to the first position."""
        self.rows = self.in_order()
        self.cached: deque[Row] = deque(maxlen=self.recent)
        self.next = 0  # the first position that is not read yet

    def restarted(self) -> "StreamedRows[P]":
        """A copy that starts at the first position, for another reader."""
        return replace(self)

    def __getitem__(self, position: int) -> Row:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Row]:
        return self.as_inputs([self.at(position) for position in positions])

    def at(self, position: int) -> Row:
        """The row at a position, as it was in the shuffle buffer."""
        # no longer in memory
        if position < self.next - len(self.cached):
            self.restart()
        while position >= self.next:
            self.cached.append(next(self.rows))
            self.next += 1
        return self.cached[position - self.next]  # counted from the end, where `next` would be

    def as_inputs(self, rows: list[Row]) -> list[Row]:
        """Rows of the shuffle buffer, encoded and reduced to the columns of model inputs."""
        encoded = encode(self.task, self.processor, rows) if self.task.one_for_one else rows
        return [
            {name: value for name, value in row.items() if not name.startswith(NON_INPUT_PREFIX)}
            for row in encoded
        ]

    def first_rows(self, count: int) -> Dataset:
        """The rows at the first `count` positions."""
        return Dataset.from_list(self.as_inputs(list(islice(self.in_order(), count))))

    def held_out(self) -> Dataset:
        """The encoded rows of the stream that are held out from training."""
        rows = self.stream.encoded(self.task, self.processor)
        marked = mark_held_out(rows, self.held, self.task.group)
        return Dataset.from_list([row for row, _ in takewhile(itemgetter(1), marked)])

    def in_order(self) -> Iterator[Row]:
        """Yield all rows of the shuffle buffer in epochs without end, each in another order.

        Raises:
            InputError: there are no rows, or only rows that are held out.
        """
        # an endless iterator: the run decides the number of steps
        for epoch in count():
            # as `epoch_generator`; Python's generator, since buffers hold Python objects
            rng = Random(self.seed * 1_000_003 + epoch)
            row = None
            for row in shuffled(self.one_pass(), self.stream.buffer, rng):
                yield row
            if row is None:
                raise InputError(
                    f"the stream has no rows to train on, with {self.held} rows held out: give "
                    "more rows, or lower data.held_rows"
                )

    def one_pass(self) -> Iterator[Row]:
        """Yield the training rows in the order of the stream, encoded unless `Task.one_for_one`."""
        if self.task.one_for_one:
            rows, group = self.stream.rows(), None  # each row is a group of its own
        else:
            rows, group = self.stream.encoded(self.task, self.processor), self.task.group
        return (row for row, is_held in mark_held_out(rows, self.held, group) if not is_held)


def mark_held_out(rows: Iterator[Row], count: int, group: str | None) -> Iterator[tuple[Row, bool]]:
    """Yield rows with True if held out: the first `count`, and others of the last one's group."""
    is_held, group_value = count > 0, None
    for position, row in enumerate(rows):
        same_group = group is not None and row[group] == group_value
        is_held = is_held and (position < count or same_group)
        group_value = row[group] if group is not None else None
        yield row, is_held


def shuffled(rows: Iterator[Row], size: int, rng: Random) -> Iterator[Row]:
    """Yield the rows, each drawn at random from a buffer of `size` rows."""
    # if the stream is shorter than the buffer, only the shuffle at the end applies
    buffer = list(islice(rows, size))
    for row in rows:
        slot = rng.randrange(size)
        yield buffer[slot]
        buffer[slot] = row
    rng.shuffle(buffer)
    yield from buffer
