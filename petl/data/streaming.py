"""Rows that are read as they are needed, in an order that can be had again.

A stream is read from its beginning as often as the run is long. Its rows are drawn from a buffer:
the next place in the order is for a random row of the buffer, and the next row of the stream takes
the place that falls free. The order depends on the stream, the buffer's size and the seed alone; so
a run that goes on reads the stream again up to the row where it stopped, and goes on exactly.

Each process and each worker reads the whole stream, since files shared out among them would make an
order that depends on their number. Where each row gives one encoded row (`Task.one_for_one`), the
buffer holds rows as they were read, and only those that a process asks for are encoded, by it.
Other tasks drop, cut or join rows, and where a row's place is turns out only when those before it
are encoded: the buffer then holds encoded rows, and every process encodes all.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile
from operator import itemgetter
from random import Random
from typing import Any

from datasets import Dataset

from petl.errors import InputError
from petl.tasks.base import Task
from petl.tasks.rows import ASIDE

Row = dict[str, Any]
AT_ONCE = 100  # rows that are encoded together


@dataclass(frozen=True)
class Stream:
    """Rows before they are encoded.

    Attributes:
        rows: reads them from the beginning, each time the same.
        buffer: rows that the next one is drawn from.
        held: encoded rows, the first, that are kept from training where evaluation steers it, with
            the rest of those that the task does not divide.
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
            yield from encode(task, processor, some)


def refuse_stream(rows: Any, reader: str) -> None:
    """Raise InputError if `rows` are a stream, whose lengths `reader` would have to know."""
    if isinstance(rows, Stream):
        raise InputError(
            f"{reader} looks at the lengths of all rows, which data.streaming=true leaves unread: "
            "say data.streaming=false with some data.train_rows"
        )


def encode(task: Task, processor: Any, rows: Sequence[Row]) -> list[Row]:
    """Rows as `task` encodes them together."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    made = task.encode_rows(processor, columns)
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


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
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Row]:
        return self.finished([self.at(place) for place in places])

    def at(self, place: int) -> Row:
        """The row of a place, as the buffer held it."""
        if place < self.next - len(self.kept):
            self.begin()
        while place >= self.next:
            self.kept.append(next(self.rows))
            self.next += 1
        return self.kept[place - self.next]

    def finished(self, rows: list[Row]) -> list[Row]:
        """Rows of the buffer as batches are made of them."""
        made = encode(self.task, self.processor, rows) if self.task.one_for_one else rows
        return [{k: v for k, v in row.items() if not k.startswith(ASIDE)} for row in made]

    def first(self, most: int) -> Dataset:
        """The rows of the first places."""
        return Dataset.from_list(self.finished(list(islice(self.in_order(), most))))

    def held_out(self) -> Dataset:
        """The rows of the stream that are not among these."""
        rows = self.stream.encoded(self.task, self.processor)
        parted = are_held(rows, self.held, self.task.group)
        return Dataset.from_list([row for row, _ in takewhile(itemgetter(1), parted)])

    def in_order(self) -> Iterator[Row]:
        """All rows again and again, each time in another order, as the buffer holds them.

        Raises:
            InputError: there are none, or none but those held out.
        """
        for epoch in count():
            draw = Random(self.seed * 1_000_003 + epoch)
            last = None
            for last in shuffled(self.one_pass(), self.stream.buffer, draw):
                yield last
            if last is None:
                besides = f" besides the {self.held} held out" if self.held else ""
                raise InputError(f"the stream has no row to learn from{besides}")

    def one_pass(self) -> Iterator[Row]:
        """The rows as the stream has them, for the buffer."""
        if self.task.one_for_one:
            rows, group = self.stream.rows(), None
        else:
            rows, group = self.stream.encoded(self.task, self.processor), self.task.group
        return (row for row, is_held in are_held(rows, self.held, group) if not is_held)


def are_held(rows: Iterator[Row], most: int, group: str | None) -> Iterator[tuple[Row, bool]]:
    """Rows, and whether each is held out: the first `most`, and those of the last one's group."""
    is_held, last = most > 0, None
    for place, row in enumerate(rows):
        is_held = is_held and (place < most or (group is not None and row[group] == last))
        last = row[group] if group is not None else None
        yield row, is_held


def shuffled(rows: Iterator[Row], size: int, draw: Random) -> Iterator[Row]:
    """The rows, each drawn from a buffer of `size`."""
    buffer = list(islice(rows, size))
    for row in rows:
        place = draw.randrange(size)
        yield buffer[place]
        buffer[place] = row
    draw.shuffle(buffer)
    yield from buffer
