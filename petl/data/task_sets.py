"""Several data sets as the tasks of one model: each is read by its own source.

`data.sets` names data configurations, or tasks, each with a configuration and settings of it:
`[wordnet,rotten]`, `{verbs: wordnet, reviews: {data: files, train: reviews.csv}}`. A run stores the
complete settings of each set in place of the names.
"""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from datasets import Dataset

from petl.data.base import RawData, Source, Stream, data_source
from petl.data.faulty_rows import Origin
from petl.data.named_sets import of_set, usual_of, with_sets
from petl.data.tasks import COLUMN, SEPARATOR
from petl.data.tasks.classification import Classification
from petl.data.tasks.multitask import MultitaskClassification
from petl.data.validation import FaultyRow
from petl.errors import InputError
from petl.system.values import field, one_of, real


@dataclass(kw_only=True)
class SeveralSets(Source, ABC):
    """Settings of several sets, each of which its own source reads."""

    of: ClassVar[str | None] = None  # the task of each set; None: that of all sets

    sets: Any = None
    # with 1, sets are sampled by size; the higher, the more equally
    temperature: float | None = field(None, real(1, 1e6))

    @classmethod
    def completed(cls, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the settings with those of each set, see `with_sets`."""
        return with_sets(settings, usual_of(settings))

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("train_rows", "test_rows"):
            if getattr(self, key) is not None:
                raise InputError(
                    f"data.{key}={getattr(self, key)} is for one data set: set "
                    f"data.sets={{NAME:{{data:CONFIGURATION,{key}:{getattr(self, key)}}},...}}"
                )
        if (self.sampling == "temperature") != (self.temperature is not None):
            raise InputError(
                f"data.sampling={self.sampling} and data.temperature={self.temperature}: give a "
                "temperature from 1 to 1e6 with data.sampling=temperature, and only there"
            )
        self.sets: object = self.completed(vars(self))["sets"]
        _ = self.sources  # created here to check the settings

    @cached_property
    def sources(self) -> dict[str, Source]:
        """The source of each set, checked, by name."""
        found = {}
        for name, settings in self.sets.items():
            with of_set(name):
                found[name] = data_source(settings)
                self.accept(found[name])
                if found[name].new_tokens is not None:
                    raise InputError("new_tokens are those of all sets: set data.new_tokens")
        return found

    def accept(self, source: Source) -> None:
        """Raise InputError if a set has another task, an order of its own, or is a stream."""
        of = self.of or self.task
        if source.task != of:
            raise InputError(
                f"data.task={source.task} is not read with data={self.source}, whose sets have "
                f"data.task={of}"
            )
        if getattr(source, "streaming", False):
            raise InputError(
                f"data.streaming=true is not possible with data={self.source}, which mixes the "
                "rows of all sets: set streaming:false and train_rows:N"
            )
        for key in ("tasks", "order"):
            if getattr(source, key, None):
                raise InputError(
                    f"data.{key}={getattr(source, key)} says which rows belong together, as "
                    f"data={self.source} does: leave it out"
                )

    def check(self) -> None:
        """Raise InputError if files of a set are missing."""
        for name, source in self.sources.items():
            with of_set(name):
                source.check()

    def parts(self) -> dict[str, RawData]:
        """The rows of each set, by name."""
        parts: dict[str, RawData] = {}
        for name, source in self.sources.items():
            with of_set(name):
                parts[name] = source.read()
        return parts

    @staticmethod
    def origins(parts: Mapping[str, RawData]) -> dict[str, list[Origin]]:
        """Where the rows of all sets are from, by split; {} if that of one is unknown."""
        found: dict[str, list[Origin]] = {}
        for data in parts.values():
            if not data.origins:
                return {}
            for split, origins in data.origins.items():
                found.setdefault(split, []).extend(origins)
        return found

    @staticmethod
    def skipped(parts: Mapping[str, RawData]) -> dict[str, list[FaultyRow]]:
        """The rows that all sets have left out, by split."""
        found: dict[str, list[FaultyRow]] = {}
        for data in parts.values():
            for split, rows in data.skipped.items():
                found.setdefault(split, []).extend(rows)
        return found


@dataclass(kw_only=True)
class TaskSets(SeveralSets):
    """Sets of texts with classes, each a task of its own."""

    serves: ClassVar[tuple[str, ...]] = (MultitaskClassification.name,)

    of: ClassVar[str | None] = Classification.name

    task: str = MultitaskClassification.name
    sampling: str | None = field("size", one_of("size", "temperature"))

    def read(self) -> RawData:
        """Read each set; columns `text`, `text_pair` if a set has it, `label` and `task`."""
        parts = self.parts()
        kinds: dict[str, Any] = {name: data.task for name, data in parts.items()}
        for name, kind in kinds.items():
            assert type(kind) is Classification, f"the source of {name} has another task"
        limits = [kind.max_length for kind in kinds.values()]
        named = {
            name: [f"{name}{SEPARATOR}{own}" for own in k.classes] for name, k in kinds.items()
        }
        pairs = [name for name, data in parts.items() if "text_pair" in data.test.column_names]
        classes = [name for own in named.values() for name in own]
        task = MultitaskClassification(classes, max(limits), [*parts], limits, pairs)
        train = together(task, {name: data.train for name, data in parts.items()})
        test = together(task, {name: data.test for name, data in parts.items()})
        return RawData(task, train, test, self.name, skipped=self.skipped(parts))


def together(task: MultitaskClassification, parts: Mapping[str, Dataset | Stream]) -> Dataset:
    """The rows of all sets, with the numbers of their classes among those of all tasks."""
    columns: dict[str, list[object]] = {"text": [], "label": [], COLUMN: []}
    if task.pairs:
        columns["text_pair"] = []
    for start, (name, rows) in zip(task.starts, parts.items(), strict=True):
        assert isinstance(rows, Dataset), "streams are refused"
        columns["text"] += rows["text"]
        columns["label"] += [start + label for label in rows["label"]]
        columns[COLUMN] += [name] * len(rows)
        if task.pairs:
            columns["text_pair"] += rows["text_pair"] if name in task.pairs else [None] * len(rows)
    return Dataset.from_dict(columns)
