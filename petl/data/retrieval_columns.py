"""Columns of retrieval and reranking: pairs, triples, scored pairs, lists, labels; test sets."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from petl.data.judgements import (
    DOCUMENT,
    Judgements,
    candidate_rows,
    read_judgements,
    test_rows,
    without_queries,
)
from petl.data.task_columns import AnySourceRows, ColumnSettings, TaskColumns, items
from petl.data.tasks import later
from petl.data.validation import Row, label, number, read, require, text
from petl.errors import InputError
from petl.system.files.paths import file_of
from petl.system.files.read import parse_list

if TYPE_CHECKING:
    from petl.data.tasks.base import Task
    from petl.data.tasks.retrieval import Retrieval

logger = logging.getLogger(__name__)
# of an embedder, beside those of its data
FIELDS = (
    *("pooling", "normalize", "dims", "query_prefix", "document_prefix", "mask_duplicates"),
    *("scale", "margin", "symmetric", "distance", "temperature"),
)
TEST_SET = ("corpus", "queries", "qrels")
RENAMED = ("query", "positive", "negatives", "text", "label")  # by settings
NEGATIVES = re.compile(r"negatives?|negative_\d+")  # columns of negatives, as tools write them


class Shape(NamedTuple):
    """Columns that rows may have, and the losses that read them, the default one first."""

    columns: tuple[str, ...]
    losses: tuple[str, ...]


# the most specific first
SHAPES = {
    "graded lists": Shape(("query", "documents", "scores"), ("listwise",)),
    "triples": Shape(("query", "positive", "negatives"), ("in_batch", "triplet")),
    "pairs": Shape(("query", "positive"), ("in_batch",)),
    "scored pairs": Shape(("sentence1", "sentence2", "score"), ("cosent", "cosine")),
    "labelled texts": Shape(("text", "label"), ("supervised",)),
}
RERANKED = {  # of reranking
    "graded lists": Shape(("query", "documents", "scores"), ("mse", "binary")),
    "triples": Shape(("query", "positive", "negatives"), ("binary", "listwise")),
    "scored pairs": Shape(("sentence1", "sentence2", "score"), ("binary", "mse")),
}


class RetrievalColumns(TaskColumns):
    """Rows of one of `shapes`, which their columns tell."""

    shapes: ClassVar[Mapping[str, Shape]] = SHAPES
    own_settings = ("query", "positive", "negatives", "text", "label", "loss", *FIELDS, *TEST_SET)
    to_predict = ("text",)

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.shape = ""
        self.columns: dict[str, str] = {}  # names in the rows, by those of the shape
        self.labels: dict[str, int] = {}  # their numbers
        if settings.streaming:
            raise InputError(
                f"data.streaming=true reads rows one by one, and data.task={settings.task} tells "
                "copies and test queries from others by all of them: set data.streaming=false"
            )
        given = [name for name in TEST_SET if getattr(settings, name) is not None]
        if given and len(given) < len(TEST_SET):
            raise InputError(
                f"data.{given[0]} is given: give all of data.corpus, queries and qrels"
            )

    @property
    def has_test_set(self) -> bool:
        """True if settings name files of queries, documents and grades."""
        return self.settings.corpus is not None

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns of the first shape that is there and that `data.loss` reads."""
        found, settings = list(present), self.settings
        if not self.labeled:
            return require([settings.text], found, origin)
        wanted = []
        for name, shape in self.shapes.items():
            if settings.loss is None or settings.loss in shape.losses:
                columns = {each: self.named(each, found) for each in shape.columns}
                wanted.append(f"{', '.join(columns.values())} ({' or '.join(shape.losses)})")
                if {*columns.values()} <= {*found}:
                    own = self.of_shape(name, columns, origin)
                    more = self.negatives(found) if "negatives" in columns else ()
                    return list(dict.fromkeys([*own, *more]))
        # no shape has this loss
        if not wanted:
            losses = dict.fromkeys(name for shape in self.shapes.values() for name in shape.losses)
            raise InputError(
                f"data.loss={settings.loss} is none of data.task={settings.task}: "
                f"{', '.join(losses)}"
            )
        task = f"data.task={settings.task}"
        reads = task if settings.loss is None else f"data.loss={settings.loss}"
        raise InputError(
            f"{origin} has the columns {', '.join(found)}, and {reads} reads "
            f"{'; '.join(wanted)}{self.hint(found)}"
        )

    def hint(self, present: Sequence[str]) -> str:
        """The end of the message about rows of no shape: how they get one."""
        losses, own = self.shapes["triples"].losses, ("query", "positive")
        are_pairs = all(self.named(each, present) in present for each in own)
        if are_pairs and self.settings.loss in (None, *losses):
            return ".\nPairs have no negatives: petl mine finds some with an embedder"
        names = [f"data.{name}" for name in RENAMED if name in self.own_settings]
        return f".\n{', '.join(names)} name columns that are called otherwise"

    def named(self, column: str, present: Sequence[str]) -> str:
        """The name that a column of a shape has in rows with these columns."""
        if column == "negatives":
            return self.negatives(present)[0]
        given = getattr(self.settings, column, None) if column in RENAMED else None
        if column == "query" and given is None and column not in present:
            return "anchor" if "anchor" in present else column
        return column if given is None else given

    def negatives(self, present: Iterable[str]) -> list[str]:
        """The columns of negatives in rows with these columns, those with a number in its order."""
        if self.settings.negatives is not None:
            return [self.settings.negatives]
        found = [name for name in present if NEGATIVES.fullmatch(name)]
        return sorted(found, key=lambda name: (len(name), name)) or ["negatives"]

    def of_shape(self, name: str, columns: dict[str, str], origin: str) -> list[str]:
        """Take rows to have a shape; return their columns.

        Raises:
            InputError: rows before had another one.
        """
        if self.shape not in ("", name):
            raise InputError(f"{origin} has {name}, and rows before it are {self.shape}")
        self.shape, self.columns = name, columns
        return list(columns.values())

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build the task with the loss of the rows' shape."""
        if self.shape == "labelled texts":
            names = dict.fromkeys(rows.column(self.columns["label"], label))
            self.labels = {name: i for i, name in enumerate(names)}
        return partial(retrieval_task, self.settings, SHAPES[self.shape].losses[0])

    def convert(self, row: Row) -> Row:
        """The columns of the shape; or `text` alone, of rows without labels."""
        if not self.labeled:
            return {"text": read(row, self.settings.text, text)}
        parsers: dict[str, Callable[[object], object]] = {
            "documents": texts,
            "scores": items(number),
            "score": number,
            "label": self.number_of,
        }
        found: Row = {
            name: read(row, own, parsers.get(name, text))
            for name, own in self.columns.items()
            if name != "negatives"
        }
        if "negatives" in self.columns:
            lists = (read(row, name, texts_or_none) for name in self.negatives(row))
            found["negatives"] = [each for several in lists for each in several]
        if "scores" in found and len(found["documents"]) != len(found["scores"]):
            raise ValueError(
                f"documents has {len(found['documents'])} texts, and scores "
                f"{len(found['scores'])} numbers: give as many of each"
            )
        return found

    def number_of(self, value: object) -> int:
        """The number of a label.

        Raises:
            ValueError: no training row has it.
        """
        name = label(value)
        if name not in self.labels:
            raise ValueError(f"is {name!r}, which no training row has")
        return self.labels[name]

    def described(self) -> str:
        """The shape of the rows."""
        return self.shape

    def split(
        self, train: list[Row], test: list[Row], *, are_held_out: bool
    ) -> tuple[list[Row], list[Row]]:
        """Training rows without the queries of the test rows, and the rows to score."""
        if self.shape == "scored pairs":
            if self.has_test_set:
                raise InputError(f"data.corpus={self.settings.corpus} is for rows with queries")
            return train, test
        scored = self.to_score(train, test, are_held_out=are_held_out)
        asked = (row.get("query", row.get("text")) for row in scored if row.get("role") != DOCUMENT)
        train = without_queries(train, asked) if "query" in train[0] else train
        # often a slip of columns
        same = sum(row["query"] == row["positive"] for row in train if "positive" in row)
        if same:
            logger.warning(
                "%d of %d training rows have their query as positive, which shows no answer: check "
                "that %s and %s are the columns that you mean (data.query, data.positive)",
                same,
                len(train),
                self.columns["query"],
                self.columns["positive"],
            )
        return train, scored

    def to_score(
        self, train: Sequence[Row], test: Sequence[Row], *, are_held_out: bool
    ) -> list[Row]:
        """Rows to score, of the test set or of test rows as a task trains on."""
        if self.has_test_set:
            return self.test_set().rows()
        return test_rows(train, test, are_held_out=are_held_out)

    def test_set(self) -> Judgements:
        """Read `data.corpus`, `data.queries` and `data.qrels`."""
        located_rows = resolve_name("petl.data.files:located_rows")  # imports this module
        settings = self.settings

        def texts_of(setting: str) -> Iterator[tuple[str, Row]]:
            names = [str(getattr(settings, setting))]
            rows = located_rows(f"data.{setting}", names, with_id)
            for place, row in rows:
                own = row.get("id", row.get("_id"))
                yield place, {"id": str(own), "text": read(row, "text", text)}

        judgements = qrels(str(settings.qrels))
        return read_judgements(texts_of("corpus"), texts_of("queries"), judgements)


class RerankingColumns(RetrievalColumns):
    """Queries with the documents that are ranked for them; to predict, pairs of both."""

    shapes = RERANKED
    own_settings = ("query", "positive", "negatives", "loss", *TEST_SET)
    to_predict = ("query", "positive")

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns to read; to predict, those of queries and documents."""
        if self.labeled:
            return super().choose(present, origin)
        found, settings = list(present), self.settings
        both = (("query", settings.query), ("document", settings.positive))
        # the settings are of the training rows: other files may have the usual names
        self.columns = {n: own if own is not None and own in found else n for n, own in both}
        return require([*self.columns.values()], found, origin)

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build the task with the loss of the rows' shape."""
        return later(
            "reranking",
            max_length=self.settings.max_length,
            loss=self.settings.loss or self.shapes[self.shape].losses[0],
            scored_pairs=self.shape == "scored pairs",
        )

    def convert(self, row: Row) -> Row:
        """The columns of the shape; or `query` and `document`, of rows without labels."""
        if not self.labeled:
            return {name: read(row, own, text) for name, own in self.columns.items()}
        found = super().convert(row)
        # a row without scores has a positive and negatives: 1 and 0
        name = "scores" if "scores" in found else "score"
        given = found.get(name, 0)
        scores = given if isinstance(given, list) else [given]
        loss = self.settings.loss or self.shapes[self.shape].losses[0]
        if loss == "binary" and not all(0 <= score <= 1 for score in scores):
            raise ValueError(
                f"{name} is {given}, and data.loss=binary needs numbers from 0 to 1: data.loss=mse "
                "learns others"
            )
        return found

    def to_score(
        self, train: Sequence[Row], test: Sequence[Row], *, are_held_out: bool
    ) -> list[Row]:
        """Pairs of the queries and the documents that are judged for them."""
        return candidate_rows(self.test_set() if self.has_test_set else test)


def with_id(present: Iterable[str], origin: str) -> list[str]:
    """Choose the columns `text` and `id`, or `_id`."""
    found = list(present)
    return require(["_id" if "id" not in found and "_id" in found else "id", "text"], found, origin)


def qrels(name: str) -> Iterator[tuple[str, Row]]:
    """Yield place, query, document and grade of the lines of TREC's file of judgements.

    Raises:
        InputError: a line has other than four columns, no number as the grade, or is not UTF-8.
    """
    with file_of("data.qrels", name, [".txt", ".tsv", ".qrels"]).open("rb") as lines:
        for count, line in enumerate(lines, 1):
            place = f"{name}, line {count}"
            try:
                parts = line.decode("utf-8-sig").split()
                if not parts:
                    continue
                query, _, document, grade = parts
                yield place, {"query": query, "document": document, "grade": float(grade)}
            except ValueError as error:
                shown = line.decode(errors="backslashreplace").strip()
                raise InputError(
                    f"{place} is {shown!r}, not TREC's query, iteration, document and grade in "
                    "UTF-8"
                ) from error


def texts(value: object) -> list[str]:
    """Check a text or a list of texts, in a cell of a csv file as JSON or Python writes it."""
    if isinstance(value, str):
        listed = parse_list(value)
        # a text in brackets may be a list of numbers
        if listed is None or not all(isinstance(each, str) for each in listed):
            return [text(value)]
        value = listed
    return [] if value == [] else items(text)(value)


def texts_or_none(value: object) -> list[str]:
    """Check what `texts` checks, or return [] for an empty cell."""
    return [] if value is None or (isinstance(value, str) and not value.strip()) else texts(value)


def retrieval_task(settings: Any, loss: str) -> "Retrieval":
    """Build the task from settings with `FIELDS`; `loss` is that of the rows if they name none."""
    # the bundled set has those of its loss
    fields = {name: getattr(settings, name, None) for name in FIELDS}
    fields["mask_duplicates"] = settings.mask_duplicates is not False
    given = settings.loss or loss
    return later("retrieval", max_length=settings.max_length, loss=given, **fields)()
