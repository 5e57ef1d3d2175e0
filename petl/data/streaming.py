"""Rows that are read as they are needed, in an order that can be had again.

A stream is read from its beginning as often as the run is long. Its rows are encoded a few at a
time and drawn from a buffer of encoded rows: the next place in the order is for a random row of the
buffer, and the next row of the stream takes the place that falls free. The order depends on the
stream, the buffer's size and the seed alone; so a run that goes on reads the stream again up to the
row where it stopped, and goes on exactly. Memory holds the buffer and what is encoded at a time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from random import Random
from typing import Any

from datasets import Dataset

from petl.errors import InputError
from petl.tasks import ASIDE, Task

Row = dict[str, Any]
AT_ONCE = 100  # rows that are encoded together


@dataclass(frozen=True)
class Stream:
    """Rows before they are encoded.

    Attributes:
        rows: reads them from the beginning, each time the same.
        buffer: encoded rows that the next one is drawn from.
        held: encoded rows, the first, that are kept from training where evaluation steers it.
    """

    rows: Callable[[], Iterator[Row]]
    buffer: int
    held: int

    def head(self, most: int) -> Dataset:
        """The first rows."""
        return Dataset.from_list(list(islice(self.rows(), most)))

    def encoded(self, task: Task, processor: Any) -> Iterator[Row]:
        """The rows as `task` encodes them."""
        rows = self.rows()
        while some := list(islice(rows, AT_ONCE)):
            columns = {key: [row[key] for row in some] for key in some[0]}
            made = task.encode_rows(processor, columns)
            for values in zip(*made.values(), strict=True):
                yield dict(zip(made, values, strict=True))


@dataclass
class StreamedRows:
    """Encoded rows in the order of training, for a DataLoader that asks for them by place.

    Places have to rise, but for the last `recent` ones; a lower one begins the stream anew. There
    is no last place: the stream begins again, in another order.

    Attributes:
        held: how many rows of the stream, its first, are not among them.
    """

    stream: Stream
    task: Task
    processor: Any
    seed: int
    recent: int
    held: int = 0

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Go back to the first place."""
        self.rows = self.in_order()
        self.kept: deque[Row] = deque(maxlen=self.recent)
        self.next = 0  # the place after those read

    def again(self) -> "StreamedRows":
        """The same rows from the first place, for another reader."""
        return replace(self)

    def __getitem__(self, place: int) -> Row:
        if place < self.next - len(self.kept):
            self.begin()
        while place >= self.next:
            self.kept.append(next(self.rows))
            self.next += 1
        return self.kept[place - self.next]

    def __getitems__(self, places: Sequence[int]) -> list[Row]:
        return [self[place] for place in places]

    def first(self, most: int) -> Dataset:
        """The rows of the first places."""
        return Dataset.from_list(list(islice(self.in_order(), most)))

    def held_out(self) -> Dataset:
        """The rows of the stream that are not among these."""
        rows = self.stream.encoded(self.task, self.processor)
        return Dataset.from_list(list(islice(rows, self.held)))

    def in_order(self) -> Iterator[Row]:
        """All rows again and again, each time in another order.

        Raises:
            InputError: there are none, or none but those held out.
        """
        for epoch in count():
            draw = Random(self.seed * 1_000_003 + epoch)
            last = None
            for last in shuffled(self.encoded(), self.stream.buffer, draw):
                yield last
            if last is None:
                besides = f" besides the {self.held} held out" if self.held else ""
                raise InputError(f"the stream has no row to learn from{besides}")

    def encoded(self) -> Iterator[Row]:
        """The rows as the stream has them, without what no batch has."""
        rows = self.stream.encoded(self.task, self.processor)
        for row in islice(rows, self.held, None):
            yield {name: value for name, value in row.items() if not name.startswith(ASIDE)}


def shuffled(rows: Iterator[Row], size: int, draw: Random) -> Iterator[Row]:
    """The rows, each drawn from a buffer of `size`."""
    buffer = list(islice(rows, size))
    for row in rows:
        place = draw.randrange(size)
        yield buffer[place]
        buffer[place] = row
    draw.shuffle(buffer)
    yield from buffer
