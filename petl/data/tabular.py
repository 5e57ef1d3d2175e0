"""What local files and the hub share: which columns are read, and how rows are divided."""

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import ClassVar

from datasets import Dataset

from petl.data.base import RawData, check_least, check_share, cut, hold_out, shuffled
from petl.data.question_columns import QuestionForm
from petl.data.streaming import Stream
from petl.data.task_columns import (
    CausalForm,
    ClassificationForm,
    ColumnSettings,
    Form,
    PairForm,
    RegressionForm,
    TokenForm,
)
from petl.data.validation import PassingRows, Row, Rows
from petl.errors import InputError
from petl.tasks.causal_lm import CausalLM
from petl.tasks.classification import Classification
from petl.tasks.question_answering import QuestionAnswering
from petl.tasks.regression import Regression
from petl.tasks.seq2seq import Seq2Seq
from petl.tasks.token_classification import TokenClassification

FORMS: dict[str, type[Form]] = {
    Classification.name: ClassificationForm,
    Regression.name: RegressionForm,
    TokenClassification.name: TokenForm,
    QuestionAnswering.name: QuestionForm,
    CausalLM.name: CausalForm,
    Seq2Seq.name: PairForm,
}


@dataclass(kw_only=True)
class Tabular(ColumnSettings, ABC):
    """Rows in columns whose names the settings give; which are read depends on the task."""

    serves: ClassVar[tuple[str, ...]] = tuple(FORMS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.test_share)
        if self.labels is not None:
            self.labels = [str(name).strip() for name in self.labels]
            if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
                raise InputError(f"data.labels={self.labels} are not two or more different classes")
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

    def stream(self, rows: PassingRows, test: Rows | None) -> RawData:
        """Train rows that are checked as they are read, and test rows as always.

        What the task has to know of all rows, such as their classes, is read once beforehand.
        """
        if test is None:
            raise InputError(
                "data.streaming=true cannot hold out test rows of rows that are not read first: "
                "give data.test or data.test_split"
            )
        test = test.take(cut(shuffled(len(test), self.seed), self.test_rows, "test_rows"))
        task = self.form.task(rows)
        next(self.converted(rows))  # what is wrong from the beginning is told at the beginning
        stream = Stream(partial(self.converted, rows), self.shuffle_buffer, self.held_rows)
        return RawData(task, stream, self.split(test), name=self.name)

    def converted(self, rows: PassingRows) -> Iterator[Row]:
        """Rows as the task encodes them, with their number."""
        found = rows.through(self.form.convert, self.columns())
        return (self.numbered(number, row) for number, row in enumerate(found))

    def numbered(self, number: int, row: Row) -> Row:
        """A row as the task encodes it: windows of one question are many rows."""
        return {**row, "number": number} if self.task == QuestionAnswering.name else row

    def hold_out(self, rows: Rows) -> tuple[Rows, Rows]:
        """What to train on and what to test on, drawn by the seed."""
        kept, held = hold_out(len(rows), self.test_share, self.seed, rows.origin)
        return rows.take(kept), rows.take(held)

    def split(self, rows: Rows) -> Dataset:
        """Rows as the task encodes them."""
        found = rows.through(self.form.convert, self.columns())
        return Dataset.from_list([self.numbered(number, row) for number, row in enumerate(found)])
