"""Preview the training data of a run as the model reads it: examples, lengths, labels, losses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig
from rich.text import Text

from petl.data.base import Stream, as_dataset, read_data
from petl.data.learned import BRACKETS, PreviewSpan, pieces
from petl.data.objectives import with_objective
from petl.data.overlap import Overlap, TrainingInputs
from petl.data.refused_rows import encode_usable
from petl.errors import printable
from petl.system.settings.schema import plain

if TYPE_CHECKING:
    from datasets import Dataset

    from petl.data.tasks.base import Row, Task

STREAM_ROWS = 1000  # rows of a stream that are read
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)  # of lengths, and of regression targets


@dataclass(frozen=True)
class Example:
    """An encoded example; images and audio have the shapes of their arrays instead of pieces."""

    pieces: list[PreviewSpan]
    label: str
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SplitPart:
    """The statistics of one split.

    Attributes:
        rows: number of examples in the data set.
        encoded: number of examples that the model gets, after windows or packing into blocks.
        dropped: number of examples without loss; None where they are not encoded one by one.
        truncated: number of truncated examples; None where nothing is truncated.
        lengths: quantiles of the lengths, in the task's unit; None for images and audio.
        loss_fraction: fraction of the tokens with loss; None where the loss is not per token.
        counts: number of examples by label.
        targets: quantiles of the regression targets; None for other tasks.
    """

    name: str
    rows: int
    encoded: int
    dropped: int | None
    truncated: int | None
    lengths: list[int] | None
    loss_fraction: float | None
    counts: dict[str, int]
    targets: list[float] | None


@dataclass(frozen=True)
class Preview:
    """The preview of a run's data; `examples` are training examples."""

    title: str
    unit: str
    parts: list[SplitPart]
    examples: list[Example]
    overlap: Overlap | None = None


def preview(cfg: DictConfig, examples: int = 3) -> Preview:
    """Read and encode the data of a run as the run would.

    Raises:
        InputError: an error in the data or settings that would stop the run.
    """
    # imports torch, which rows for MiniLM do not need
    from petl.data.models.loading import load_processor

    data = read_data(with_objective(plain(cfg))["data"])
    task, processor = data.task, load_processor(cfg.model, data.task)
    data, (train, test) = encode_usable(
        data, processor, lambda data: (as_dataset(data, STREAM_ROWS), data.test)
    )
    splits = {"train": as_dataset(data, STREAM_ROWS), "test": data.test}
    encoded = {"train": train, "test": test}
    # the statistics of a stream are those of its beginning
    limited = (
        f", the first {STREAM_ROWS} rows of the stream" if isinstance(data.train, Stream) else ""
    )
    inputs = TrainingInputs.of(task, splits["train"], data.near_duplicates)
    train = encoded["train"].select(range(min(examples, len(encoded["train"]))))
    return Preview(
        title=" · ".join(
            part
            for part in (
                data.name,
                task.name,
                data.format,
                f"as {cfg.model.name} reads it{limited}",
            )
            if part
        ),
        unit=task.unit,
        parts=[statistics(name, task, processor, splits[name], encoded[name]) for name in splits],
        examples=[decode(task, processor, row) for row in train],
        overlap=inputs.overlap(data.test) if inputs else None,
    )


def statistics(
    name: str, task: "Task", processor: object, raw: "Dataset", encoded: "Dataset"
) -> SplitPart:
    """Return the statistics of a split."""
    from petl.data.tasks.encoding_cache import encode_once  # imports torch

    untruncated, one_to_one = task.untruncated(), task.group is None and not task.packs
    truncated = None
    if untruncated is not None:  # the same task without truncation, to compare with
        rows = encode_once(untruncated, processor, raw)
        truncated = sum(task.is_truncated(row) for row in rows)
    lengths = loss_fraction = None
    # an empty split has neither lengths nor tokens
    if task.reads_text and len(encoded):
        lengths = quantiles(task.lengths(encoded), integer=True)
        marks = [marks for row in encoded for _, marks in task.labeled_texts(row).values()]
        # None instead of 0: the loss of this task is per example, not per token
        loss_fraction = sum(map(sum, marks)) / sum(map(len, marks)) or None
    # classification labels are integers
    is_regression = getattr(encoded.features.get("labels"), "dtype", "") == "float64"
    return SplitPart(
        name=name,
        rows=len(raw),
        encoded=len(encoded),
        # windows and packing change the number of rows, so a difference means nothing
        dropped=len(raw) - len(encoded) if one_to_one else None,
        truncated=truncated,
        lengths=lengths,
        loss_fraction=loss_fraction,
        counts=task.label_counts(encoded),
        targets=quantiles(encoded["labels"]) if is_regression and len(encoded) else None,
    )


def quantiles(values: object, *, integer: bool = False) -> list[Any]:
    """Return the `QUANTILES` of values, each one of the values itself."""
    # "higher": lengths that occur, not interpolated ones
    result = np.quantile(np.asarray(values), QUANTILES, method="higher").tolist()
    return [int(value) for value in result] if integer else result


def decode(task: "Task", processor: object, row: "Row") -> Example:
    """Return an encoded row in readable form."""
    if not task.reads_text:
        shapes = {name: np.shape(value) for name, value in row.items() if name != "labels"}
        return Example([], task.label_text(row), shapes)
    spans = []
    for name, text in task.labeled_texts(row).items():
        spans += [PreviewSpan(f"\n{name}: ", has_loss=False)] if name else []
        spans += pieces(processor, *text)
    return Example(spans, task.label_text(row), {})


# As tables and text

Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # columns and rows


def size_table(result: Preview) -> Table:
    """Return the table of the number of examples in each split, and their lengths."""
    columns = ["examples", ">read", ">encoded", ">dropped", ">truncated"]
    # labels of `QUANTILES`, in their order
    names = [f">{name}" for name in ("shortest", "median", "90 %", "99 %", "longest")]
    rows: list[list[object]] = []
    has_lengths = any(p.lengths is not None for p in result.parts)
    has_loss = any(p.loss_fraction is not None for p in result.parts)
    for p in result.parts:
        row: list[object] = [p.name, p.rows, p.encoded, p.dropped, p.truncated]
        # an empty split has no lengths, where others have
        row += (p.lengths or [None] * len(names)) if has_lengths else []
        fraction = p.loss_fraction
        row += [None if fraction is None else f"{100 * fraction:.1f} %"] if has_loss else []
        rows.append(["-" if value is None else value for value in row])
    if has_lengths:
        columns += [f"{names[0]} ({result.unit})", *names[1:]]
    if has_loss:
        columns.append(">tokens with loss")
    return columns, rows


def label_tables(result: Preview) -> Iterator[Table]:
    """Yield a table of the label counts, or of the quantiles of regression targets."""
    first = result.parts[0]
    names = [p.name for p in result.parts]
    if first.counts:
        # every split has the labels of the first, if only with a count of 0
        rows = [(label, *(p.counts[label] for p in result.parts)) for label in first.counts]
        yield ("label", *(f">{name}" for name in names)), rows
    targets = [(p.name, p.targets) for p in result.parts if p.targets is not None]
    if targets:
        rows = [(name, *(f"{value:g}" for value in values)) for name, values in targets]
        yield ("targets", ">smallest", ">median", ">90 %", ">99 %", ">largest"), rows


def legend(result: Preview, *, color: bool) -> str:
    """Return the heading of the examples."""
    count = len(result.examples)
    heading = "the first training example" if count == 1 else f"the first {count} training examples"
    if not any(piece.has_loss for example in result.examples for piece in example.pieces):
        return heading
    return f"{heading}; {'green' if color else ' '.join(BRACKETS)}: tokens with loss"


def example_texts(result: Preview, *, color: bool) -> Iterator[Text]:
    """Yield each example as text."""
    for number, row in enumerate(result.examples, start=1):
        text = Text(f"{number}  ")
        for piece in row.pieces:
            shown = printable(piece.text)
            if color:
                text.append(shown, style="bold green" if piece.has_loss else "")
            else:
                text.append(BRACKETS[0] + shown + BRACKETS[1] if piece.has_loss else shown)
        for name, shape in row.shapes.items():
            text.append(f"{name} {' x '.join(map(str, shape))}  ")
        if row.label:
            text.append(f"  → {printable(row.label)}", style="bold" if color else "")
        yield text
