"""Preview of texts with classes as MiniLM reads them: what `preview` says, without torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name

from omegaconf import DictConfig

from petl.data.base import Source, TextSource, data_source
from petl.data.bundled import WORDNET_CLASSES, WordNet
from petl.data.files import Files, file_names
from petl.data.learned import PreviewSpan
from petl.data.models.sources import MiniLM, read_source
from petl.data.overlap import TrainingInputs, input_columns, input_text
from petl.data.task_columns import ClassificationColumns, ClassLabelColumns, MultiLabelColumns
from petl.data.validation import Row
from petl.experiments.planning.preview import Example, Preview, SplitPart, quantiles
from petl.system.settings.schema import plain

POSITIONS = 512  # of MiniLM; more are refused where the model is loaded


def preview_texts(cfg: DictConfig | Mapping[str, object], examples: int = 3) -> Preview | None:
    """Return the preview of a run's data; None if it needs the model's own code.

    Raises:
        InputError: an error in the data or settings that would stop the run.
    """
    settings = plain(cfg)
    method, data = settings.get("method"), settings.get("data")
    model = read_source(settings["model"])
    # a method of several tasks gives settings to the data
    of_tasks = isinstance(method, Mapping) and method.get("tasks")
    if of_tasks or settings.get("task") or not isinstance(data, Mapping):
        return None
    source = data_source(data)
    if not isinstance(model, MiniLM) or not isinstance(source, TextSource):
        return None
    found = None if source.new_tokens or source.max_length > POSITIONS else rows_of(source)
    if found is None:
        return None
    classes, parts = found
    reader = Reader(model, source.max_length)
    columns = input_columns(ClassLabelColumns, parts["train"][0])
    inputs = {
        name: [input_text({column: row[column] for column in columns}) for row in rows]
        for name, rows in parts.items()
    }
    return Preview(
        title=f"{source.name} · {source.task} · as {model.name} reads it",
        unit="tokens",
        parts=[statistics(name, rows, classes, reader) for name, rows in parts.items()],
        examples=[example(row, classes, reader) for row in parts["train"][:examples]],
        overlap=TrainingInputs(inputs["train"], source.near_duplicates).compare(inputs["test"]),
    )


def rows_of(source: Source) -> tuple[list[str], dict[str, list[Row]]] | None:
    """Return the classes and the rows of both splits; None unless they are texts with classes."""
    if isinstance(source, WordNet):
        train, test = source.rows()
        return WORDNET_CLASSES, {"train": train, "test": test}
    if not isinstance(source, Files) or source.streaming or source.tasks:
        return None
    columns = source.task_columns
    if not isinstance(columns, ClassificationColumns | MultiLabelColumns):
        return None
    _, train, test, _ = source.checked(*source.loaded(file_names("data.train", source.train)))
    train, test = source.divided(train, test, columns)
    classes = getattr(columns, "each", None) or [*columns.number]
    return classes, {"train": [*train.values], "test": [*test.values]}


class Reader:
    """MiniLM's tokenizer, without transformers, which imports torch."""

    def __init__(self, model: MiniLM, max_length: int) -> None:
        file = model.local() / "tokenizer.json"
        self.longest = max_length
        self.tokenizer = resolve_name("tokenizers:Tokenizer").from_file(str(file))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """The number of tokens of each row, before it is truncated."""
        return [len(each.ids) for each in self.tokenizer.encode_batch([*map(texts_in, rows)])]

    def text(self, row: Row) -> str:
        """The tokens of a row as text."""
        self.tokenizer.enable_truncation(self.longest)
        ids = self.tokenizer.encode_batch([texts_in(row)])[0].ids
        self.tokenizer.no_truncation()
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def texts_in(row: Row) -> str | tuple[str, str]:
    """The text of a row, or both of its texts."""
    return (row["text"], row["text_pair"]) if "text_pair" in row else row["text"]


def labels_in(row: Row) -> list[int]:
    """The numbers of the classes of a row."""
    return row["label"] if isinstance(row["label"], list) else [row["label"]]


def statistics(name: str, rows: Sequence[Row], classes: Sequence[str], reader: Reader) -> SplitPart:
    """Return the statistics of a split."""
    lengths = reader.lengths(rows)
    counts = Counter(number for row in rows for number in labels_in(row))
    return SplitPart(
        name=name,
        rows=len(rows),
        encoded=len(rows),
        dropped=0,
        truncated=sum(length > reader.longest for length in lengths),
        lengths=quantiles([min(n, reader.longest) for n in lengths], integer=True),
        loss_fraction=None,
        counts={name: counts[number] for number, name in enumerate(classes)},
        targets=None,
    )


def example(row: Row, classes: Sequence[str], reader: Reader) -> Example:
    """Return a row in readable form."""
    names = ", ".join(classes[number] for number in labels_in(row)) or "none"
    return Example([PreviewSpan(reader.text(row), has_loss=False)], names, {})
