"""Preview of rows without torch: texts with classes as MiniLM reads them, others as they are."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pkgutil import resolve_name
from typing import ClassVar, Protocol

from omegaconf import DictConfig

from petl.data.base import Source, TextSource, data_source
from petl.data.bundled import WORDNET_CLASSES, WordNet
from petl.data.files import Files, file_names
from petl.data.learned import PreviewSpan
from petl.data.models.sources import MiniLM, ModelSource, read_source
from petl.data.objectives import with_objective
from petl.data.overlap import Shows, TrainingInputs, input_columns, input_text
from petl.data.task_columns import ClassificationColumns, MultiLabelColumns
from petl.data.validation import Row
from petl.experiments.planning.preview import Example, Preview, SplitPart, quantiles
from petl.system.settings.schema import plain

POSITIONS = 512  # of MiniLM; more are refused where the model is loaded


def preview_early(
    cfg: DictConfig | Mapping[str, object], examples: int = 3, *, names_model: bool = True
) -> Preview | None:
    """Return the preview of a run's data; None if it needs the model's own code.

    Args:
        names_model: a user has named the model; if not, rows are shown as they are.

    Raises:
        InputError: an error in the data or settings that would stop the run.
    """
    settings = plain(cfg)
    method, data = settings.get("method"), with_objective(settings)["data"]
    # a method of several tasks gives settings to the data
    if (isinstance(method, Mapping) and method.get("tasks")) or not isinstance(data, Mapping):
        return None
    source, model = data_source(data), read_source(settings["model"])
    reader = reader_of(source, model, names_model=names_model)
    found = None if reader is None else rows_of(source)
    if reader is None or found is None:
        return None
    inputs = {name: [*inputs_of(rows)] for name, rows in found.parts.items()}
    words = (source.name, getattr(source, "task", ""), found.format, f"as {reader.name}")
    return Preview(
        title=" · ".join(word for word in words if word),
        unit=reader.unit,
        parts=[statistics(name, rows, found, reader) for name, rows in found.parts.items()],
        examples=[example(row, found.classes, reader) for row in found.parts["train"][:examples]],
        overlap=TrainingInputs(inputs["train"], source.near_duplicates).compare(inputs["test"]),
    )


# Rows


@dataclass(frozen=True)
class SplitRows:
    """The rows of both splits.

    Attributes:
        classes: that rows name by number; none: those of no task with classes.
        format: in which the rows are.
        is_regression: their labels are numbers.
    """

    classes: Sequence[str]
    parts: Mapping[str, Sequence[Row]]
    format: str = ""
    is_regression: bool = False


class InputColumns:
    """The columns of any task that are the input of a row."""

    shown: ClassVar[tuple[str, ...]] = (
        *("text", "text_pair", "tokens", "question", "context", "messages"),
        *("query", "document", "sentence1", "sentence2"),
        *("prompt", "completion", "good", "chosen", "rejected"),
    )


def rows_of(source: Source) -> SplitRows | None:
    """Return the rows of a source; None if its own code has to read them."""
    if isinstance(source, WordNet):
        train, test = source.rows()
        return SplitRows(WORDNET_CLASSES, {"train": train, "test": test})
    if not isinstance(source, Files) or source.streaming or source.tasks:
        return None
    columns = source.task_columns
    # images are read with the task; texts that both answers begin with divide rows
    if columns.reads_images or getattr(getattr(columns, "objective", None), "plain", False):
        return None
    _, train, test, _ = source.checked(*source.loaded(file_names("data.train", source.train)))
    task: Shows = InputColumns()
    are_held_out = test is None
    train, test = source.divided(train, test, task)
    rows = [*train.values], [*test.values]
    to_train, to_score = columns.split(*rows, are_held_out=are_held_out)
    classes = getattr(columns, "each", None) or [*getattr(columns, "number", ())]
    return SplitRows(
        classes,
        {"train": to_train, "test": to_score},
        columns.described(),
        source.task == "regression",
    )


def inputs_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the input of each row; of queries and documents to rank, the queries."""
    for row in rows:
        if "role" in row:
            if row["role"] == "query":
                yield row["text"]
        else:
            names = input_columns(InputColumns(), row)
            yield input_text({name: row[name] for name in names})


def texts_in(row: Row) -> list[str]:
    """The texts of a row, without numbers."""
    return [*strings(list(row.values()))]


def strings(value: object) -> Iterator[str]:
    """Yield the texts in nested lists and in the `content` of turns."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings(value.get("content"))
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def labels_in(row: Row, classes: Sequence[str]) -> list[str]:
    """The names of the classes of a row, or of its words."""
    found = row.get("tags", row.get("label")) if classes else None
    numbers = found if isinstance(found, list) else [] if found is None else [found]
    return [classes[number] for number in numbers]


# Readers


class RowReader(Protocol):
    """How rows are read.

    Attributes:
        name: of what reads them.
        unit: of lengths.
    """

    name: str
    unit: str

    @property
    def longest(self) -> int | None:
        """Longer rows are truncated to it; None: none are."""
        ...

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """The length of each row, before it is truncated."""
        ...

    def text(self, row: Row) -> str:
        """A row in readable form."""
        ...


def reader_of(source: Source, model: ModelSource, *, names_model: bool) -> RowReader | None:
    """Return what reads the rows of a source without torch; None if the model has to."""
    has_classes = isinstance(source, WordNet) or (
        isinstance(source, Files)
        and isinstance(source.task_columns, ClassificationColumns | MultiLabelColumns)
    )
    if isinstance(source, TextSource) and has_classes and isinstance(model, MiniLM):
        fits = not source.new_tokens and source.max_length <= POSITIONS
        return MiniLMReader(model, source.max_length) if fits else None
    return PlainReader() if isinstance(model, MiniLM) and not names_model else None


class MiniLMReader:
    """MiniLM's tokenizer, without transformers, which imports torch."""

    unit = "tokens"

    def __init__(self, model: MiniLM, max_length: int) -> None:
        self.name, self.longest = f"{model.name} reads it", max_length
        file = model.local() / "tokenizer.json"
        self.tokenizer = resolve_name("tokenizers:Tokenizer").from_file(str(file))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """The number of tokens of each row, before it is truncated."""
        return [len(each.ids) for each in self.tokenizer.encode_batch([*map(self.given, rows)])]

    def text(self, row: Row) -> str:
        """The tokens of a row as text."""
        self.tokenizer.enable_truncation(self.longest)
        ids = self.tokenizer.encode_batch([self.given(row)])[0].ids
        self.tokenizer.no_truncation()
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def given(self, row: Row) -> str | tuple[str, str]:
        """The text of a row, or both of its texts."""
        return (row["text"], row["text_pair"]) if "text_pair" in row else row["text"]


class PlainReader:
    """Rows as they are, in characters."""

    name, unit, longest = "it is read; model=NAME shows what a model reads", "characters", None

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """The number of characters of all texts of each row."""
        return [sum(map(len, texts_in(row))) for row in rows]

    def text(self, row: Row) -> str:
        """A line for each column or turn with text."""
        return "\n".join(chain.from_iterable(lines(*item) for item in row.items()))


def lines(name: str, value: object) -> Iterator[str]:
    """Yield the texts of a column, turns with their roles."""
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        for turn in value:
            who = turn["role"] if name in ("messages", "prompt") else name
            yield f"{who}: {' '.join(strings(turn))}"
    elif texts := [*strings(value)]:
        yield f"{name}: {' '.join(texts)}"


# The preview


def statistics(name: str, rows: Sequence[Row], found: SplitRows, reader: RowReader) -> SplitPart:
    """Return the statistics of a split."""
    lengths = reader.lengths(rows)
    longest = reader.longest or max(lengths, default=0)
    counts = Counter(chain.from_iterable(labels_in(row, found.classes) for row in rows))
    has_targets = found.is_regression and rows
    return SplitPart(
        name=name,
        rows=len(rows),
        encoded=len(rows),
        dropped=0,
        truncated=sum(n > longest for n in lengths) if reader.longest else None,
        lengths=quantiles([min(n, longest) for n in lengths], integer=True) if rows else None,
        loss_fraction=None,
        counts={name: counts[name] for name in found.classes},
        targets=quantiles([row["label"] for row in rows]) if has_targets else None,
    )


def example(row: Row, classes: Sequence[str], reader: RowReader) -> Example:
    """Return a row in readable form."""
    if classes:
        label = (" " if "tags" in row else ", ").join(labels_in(row, classes)) or "none"
    elif "good" in row:
        label = "good" if row["good"] else "bad"
    else:
        label = f"{row['label']:g}" if isinstance(row.get("label"), float | int) else ""
    return Example([PreviewSpan(reader.text(row), has_loss=False)], label, {})
