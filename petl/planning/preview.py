"""What a run would learn from, before it does: rows as the model sees them. No weight is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset
from omegaconf import DictConfig
from rich.text import Text

from petl.data import as_dataset, read_data
from petl.data.streaming import Stream
from petl.models.loading import load_processor
from petl.tasks.base import Task
from petl.tasks.encoding_cache import encode_once

STREAM_ROWS = 1000  # of a stream that are looked at
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)  # of lengths, and of numbers
BRACKETS = "⟦", "⟧"  # around what is learned, where there is no colour


@dataclass(frozen=True)
class Piece:
    """Text of neighbouring tokens, and whether the loss is about them."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Example:
    """An encoded row. Images and sounds have no pieces but the shapes of their arrays."""

    pieces: list[Piece]
    truth: str
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """The rows of one split.

    Attributes:
        rows: as they were read; encoded: as the model gets them (windows, blocks).
        dropped: rows that nothing is learned from; cut: rows that lost their end; None: not so.
        lengths: quantiles of encoded rows, in the task's unit; None of images and sounds.
        learned: share of the tokens that the loss is about; None where it is not about tokens.
        counts: of classes and the like; numbers: quantiles of what a regression is to tell.
    """

    name: str
    rows: int
    encoded: int
    dropped: int | None
    cut: int | None
    lengths: list[int] | None
    learned: float | None
    counts: dict[str, int]
    numbers: list[float] | None


@dataclass(frozen=True)
class Preview:
    """All of it; `examples` are train rows."""

    title: str
    unit: str
    parts: list[Part]
    examples: list[Example]


def preview(cfg: DictConfig, examples: int = 3) -> Preview:
    """Read and encode a run's rows as the run would.

    Raises:
        InputError: whatever would stop that run at its data.
    """
    data = read_data(cfg.data)
    task, processor = data.task, load_processor(cfg.model, data.task)
    splits = {"train": as_dataset(data, STREAM_ROWS), "test": data.test}
    encoded = {name: task.encode(processor, rows) for name, rows in splits.items()}
    some = f", the first {STREAM_ROWS} rows of a stream" if isinstance(data.train, Stream) else ""
    train = encoded["train"].select(range(min(examples, len(encoded["train"]))))
    return Preview(
        title=f"{data.name} · {task.name} · as {cfg.model.name} reads it{some}",
        unit=task.unit,
        parts=[part(name, task, processor, splits[name], encoded[name]) for name in splits],
        examples=[example(task, processor, row) for row in train],
    )


def part(name: str, task: Task, processor: Any, raw: Dataset, encoded: Dataset) -> Part:
    """The figures of a split."""
    whole, one_to_one = task.untruncated(), task.group is None and not task.packs
    cut = None
    if whole is not None:
        rows = encode_once(whole, processor, raw)
        cut = sum(task.is_truncated(row) for row in rows)
    lengths = learned = None
    if task.reads_text:
        lengths = quantiles(task.lengths(encoded), whole=True)
        marks = [task.labeled_tokens(row)[1] for row in encoded]
        learned = sum(map(sum, marks)) / sum(map(len, marks)) or None
    is_number = getattr(encoded.features.get("labels"), "dtype", "") == "float64"
    return Part(
        name=name,
        rows=len(raw),
        encoded=len(encoded),
        dropped=len(raw) - len(encoded) if one_to_one else None,
        cut=cut,
        lengths=lengths,
        learned=learned,
        counts=task.label_counts(encoded),
        numbers=quantiles(encoded["labels"]) if is_number else None,
    )


def quantiles(values: Any, *, whole: bool = False) -> list[Any]:
    """The values at `QUANTILES` of the sorted ones."""
    found = np.quantile(np.asarray(values), QUANTILES, method="higher").tolist()
    return [int(value) for value in found] if whole else found


def example(task: Task, processor: Any, row: dict[str, Any]) -> Example:
    """An encoded row as a reader sees it."""
    if not task.reads_text:
        shapes = {name: np.shape(value) for name, value in row.items() if name != "labels"}
        return Example([], task.label_text(row), shapes)
    return Example(list(pieces(processor, *task.labeled_tokens(row))), task.label_text(row), {})


def pieces(tokenizer: Any, ids: list[int], marks: list[bool]) -> Iterator[Piece]:
    """Neighbouring tokens with the same mark, decoded with special tokens."""
    for learned, run in groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1]):
        yield Piece(tokenizer.decode([token for token, _ in run]), learned)


# As tables and text

Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # columns and rows


def sizes(found: Preview) -> Table:
    """How many rows there are of each split, and how long they are."""
    columns = ["rows", ">read", ">encoded", ">dropped", ">cut"]
    names = [f">{name}" for name in ("shortest", "median", "90 %", "99 %", "longest")]
    rows: list[tuple[object, ...]] = []
    for p in found.parts:
        counts = [known(p.dropped), known(p.cut)]
        rows.append((p.name, p.rows, p.encoded, *counts, *(p.lengths or ())))
        if p.learned is not None:
            rows[-1] += (f"{100 * p.learned:.1f} %",)
    if found.parts[0].lengths is not None:
        columns += [f"{names[0]}, {found.unit}", *names[1:]]
    if found.parts[0].learned is not None:
        columns.append(">with loss")
    return columns, rows


def known(count: int | None) -> object:
    return "-" if count is None else count


def truths(found: Preview) -> Iterator[Table]:
    """How often each label occurs, or between what numbers lie."""
    first = found.parts[0]
    names = [p.name for p in found.parts]
    if first.counts:
        rows = [(kind, *(p.counts[kind] for p in found.parts)) for kind in first.counts]
        yield ("label", *(f">{name}" for name in names)), rows
    if first.numbers is not None:
        rows = [(p.name, *(f"{number:g}" for number in p.numbers or ())) for p in found.parts]
        yield ("numbers", ">least", ">median", ">90 %", ">99 %", ">most"), rows


def legend(found: Preview, *, colour: bool) -> str:
    """What the examples show."""
    if not any(example.pieces for example in found.examples):
        return f"the first {len(found.examples)} train rows"
    how = "green" if colour else " ".join(BRACKETS)
    return f"the first {len(found.examples)} train rows; {how}: what the loss is about"


def shown(found: Preview, *, colour: bool) -> Iterator[Text]:
    """The examples, one text each."""
    for number, row in enumerate(found.examples, start=1):
        text = Text(f"{number}  ")
        for piece in row.pieces:
            if colour:
                text.append(piece.text, style="bold green" if piece.learned else "")
            else:
                text.append(BRACKETS[0] + piece.text + BRACKETS[1] if piece.learned else piece.text)
        for name, shape in row.shapes.items():
            text.append(f"{name} {' x '.join(map(str, shape))}  ")
        if row.truth:
            text.append(f"  → {row.truth}", style="bold" if colour else "")
        yield text
