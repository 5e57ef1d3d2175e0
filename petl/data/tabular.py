"""What local files and the hub share: which columns are read, and how rows are divided."""

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import islice
from typing import ClassVar

from datasets import Dataset

from petl.data.base import (
    RawData,
    TextSource,
    check_least,
    check_share,
    cut,
    hold_out,
    shuffled,
)
from petl.data.forms import (
    CausalForm,
    ClassificationForm,
    Form,
    Labels,
    PairForm,
    RegressionForm,
    TokenForm,
)
from petl.data.questions import QuestionForm
from petl.data.rows import Row, Rows
from petl.data.streaming import Stream
from petl.errors import InputError
from petl.tasks import (
    CausalLM,
    Classification,
    QuestionAnswering,
    Regression,
    Seq2Seq,
    TokenClassification,
)

Placed = tuple[str, Row]  # where a row stands, and the row
FORMS: dict[str, type[Form]] = {
    Classification.name: ClassificationForm,
    Regression.name: RegressionForm,
    TokenClassification.name: TokenForm,
    QuestionAnswering.name: QuestionForm,
    CausalLM.name: CausalForm,
    Seq2Seq.name: PairForm,
}


@dataclass(kw_only=True)
class Tabular(TextSource, ABC):
    """Rows in columns whose names the settings give; which are read depends on the task."""

    serves: ClassVar[tuple[str, ...]] = tuple(FORMS)

    text: str = "text"
    text_pair: str | None = None  # a second text, that is read with the first
    label: str = "label"
    tokens: str = "tokens"
    tags: str = "tags"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    answer_start: str | None = None
    stride: int = 128  # tokens that windows of a long context share
    max_answer_length: int = 30  # tokens
    target: str = "target"
    prefix: str = ""  # before each text of a seq2seq
    max_target_length: int = 128  # tokens
    messages: str | None = None  # conversations, in place of text
    prompt: str | None = None  # conversations of one turn each
    answer: str | None = None
    pack: bool = False  # texts end to end, cut into blocks of max_length; each sees itself only
    generate: int | None = None  # most tokens of answers that are generated to score the test rows
    streaming: bool = False  # whether train rows are read as they are needed
    shuffle_buffer: int = 10_000  # encoded rows of a stream that the next one is drawn from
    held_rows: int = 1000  # encoded rows of a stream, its first, that train.eval_steps holds out
    test_share: float = 0.1  # of the training rows, held out when there are no test rows

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.test_share)
        if self.streaming and issubclass(FORMS[self.task], Labels | QuestionForm):
            raise InputError(
                f"data.streaming=true is not for data.task={self.task}: its classes, or whether "
                "questions may have no answer, are known only when all rows have been read"
            )
        keys = ("max_answer_length", "max_target_length", "generate", "shuffle_buffer", "held_rows")
        for key in keys:
            check_least(key, getattr(self, key), 1)
        check_least("stride", self.stride, 0)
        self.refuse_unread()
        _ = self.form  # and what it finds wrong with the settings

    def refuse_unread(self) -> None:
        """Raise InputError if a setting is given that the task does not read."""
        for field in fields(self):
            by = [task for task, form in FORMS.items() if field.name in form.reads]
            value = getattr(self, field.name)
            if by and self.task not in by and value != field.default:
                given = str(value).lower() if isinstance(value, bool) else value
                raise InputError(
                    f"data.{field.name}={given} is for data.task={' or '.join(by)}, and "
                    f"data.task is {self.task}"
                )

    @cached_property
    def form(self) -> Form:
        """How rows of this task are read."""
        return FORMS[self.task](self)

    def columns(self) -> list[str]:
        """The columns that are read."""
        return self.form.columns()

    def assemble(self, train: Rows, test: Rows | None) -> RawData:
        """Checked, shuffled and cut rows; without `test` a share of `train` is held out."""
        whole = train
        if test is None:
            train, test = self.hold_out(train)
        task = self.form.task(whole)
        train = train.take(cut(shuffled(len(train), self.seed), self.train_rows, "train_rows"))
        test = test.take(cut(shuffled(len(test), self.seed), self.test_rows, "test_rows"))
        return RawData(task, self.split(train), self.split(test), name=self.name)

    def stream(self, rows: Callable[[], Iterator[Placed]], test: Rows | None) -> RawData:
        """Train rows that are checked as they are read, and test rows as always."""
        if test is None:
            raise InputError(
                "data.streaming=true cannot hold out test rows of rows that are not read first: "
                "give data.test or data.test_split"
            )
        test = test.take(cut(shuffled(len(test), self.seed), self.test_rows, "test_rows"))
        converted = partial(self.converted, rows)
        next(converted())  # what is wrong from the beginning is told at the beginning
        stream = Stream(converted, self.shuffle_buffer, self.held_rows)
        return RawData(self.form.task(test), stream, self.split(test), name=self.name)

    def converted(self, rows: Callable[[], Iterator[Placed]]) -> Iterator[Row]:
        """Rows as the task encodes them, up to `train_rows`."""
        for place, row in islice(rows(), self.train_rows):
            try:
                yield self.form.convert(row)
            except ValueError as error:
                raise InputError(f"{place}: {error}") from error

    def hold_out(self, rows: Rows) -> tuple[Rows, Rows]:
        """What to train on and what to test on, drawn by the seed."""
        kept, held = hold_out(len(rows), self.test_share, self.seed, rows.origin)
        return rows.take(kept), rows.take(held)

    def split(self, rows: Rows) -> Dataset:
        """Rows as the task encodes them, with their number."""
        found = rows.through(self.form.convert, self.columns())
        made = Dataset.from_list(found)
        if self.task == "question_answering":  # whose windows are many rows of one question
            made = made.add_column("number", list(range(len(made))))
        return made
