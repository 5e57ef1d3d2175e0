"""Base class of local files and the Hub: reads the columns of a task and splits the rows."""

import logging
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar

from petl.data.answer_columns import CausalLMColumns, Seq2SeqColumns
from petl.data.base import (
    RawData,
    Stream,
    held_rows,
    hold_out,
)
from petl.data.faulty_rows import SKIP, Origin, leave_out, refusal
from petl.data.image_columns import ImageTextColumns
from petl.data.label_column import doubts
from petl.data.overlap import Shows, beginnings, question_text
from petl.data.preference_columns import PairColumns, PromptColumns, RatedColumns, RewardColumns
from petl.data.question_columns import QuestionAnsweringColumns
from petl.data.retrieval_columns import RerankingColumns, RetrievalColumns
from petl.data.task_columns import (
    ClassificationColumns,
    ClassLabelColumns,
    ColumnSettings,
    MultiLabelColumns,
    RegressionColumns,
    TaskColumns,
    TokenClassificationColumns,
    with_row_tasks,
)
from petl.data.templates import check_braces, check_template
from petl.data.validation import FaultyRow, LazySourceRows, Row, SourceRows
from petl.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from petl.data.tasks.base import Task

logger = logging.getLogger(__name__)
TASK_COLUMNS: dict[str, type[TaskColumns]] = {
    "classification": ClassificationColumns,
    "multi_label": MultiLabelColumns,
    "regression": RegressionColumns,
    "token_classification": TokenClassificationColumns,
    "question_answering": QuestionAnsweringColumns,
    "causal_lm": CausalLMColumns,
    "seq2seq": Seq2SeqColumns,
    "image_text": ImageTextColumns,
    "dpo": PairColumns,
    "orpo": PairColumns,
    "kto": RatedColumns,
    "reward": RewardColumns,
    "grpo": PromptColumns,
    "retrieval": RetrievalColumns,
    "reranking": RerankingColumns,
}


def columns_of(settings: ColumnSettings, *, labeled: bool = True) -> TaskColumns:
    """Return the columns of the settings' kind of task, with that of row tasks if they have any."""
    kind: type[object] = TASK_COLUMNS[settings.task]
    return (with_row_tasks(kind) if settings.tasks else kind)(settings, labeled=labeled)


@dataclass(kw_only=True)
class Tabular(ColumnSettings, ABC):
    """Rows in columns that are named by settings; the task determines which columns are read."""

    serves: ClassVar[tuple[str, ...]] = tuple(TASK_COLUMNS)

    def __post_init__(self) -> None:
        # as text in rows, which is compared without spaces around it
        self.labels = None if self.labels is None else [name.strip() for name in self.labels]
        self.tasks = None if self.tasks is None else [name.strip() for name in self.tasks]
        super().__post_init__()
        for key in ("text", "text_pair", "target", "prompt", "answer"):
            check_template(f"data.{key}", getattr(self, key))
        if self.system is not None:  # a text, which need not have a column
            check_braces("data.system", self.system)
        self.refuse_unused_settings()
        if self.bad_rows == SKIP and self.streaming:
            raise InputError(
                f"data.bad_rows={SKIP} counts the rows that it leaves out, which data.streaming="
                "true reads during training: set data.streaming=false"
            )
        if self.tasks is None and self.task_column != "task":
            raise InputError(
                f"data.task_column={self.task_column} is for data.tasks: name the tasks"
            )
        _ = self.task_columns  # created here to check the settings

    def refuse_unused_settings(self) -> None:
        """Raise InputError if a setting is given that the task does not use."""
        for field in fields(self):
            # tasks that use this setting; none for settings of all tasks
            users = [
                task for task, columns in TASK_COLUMNS.items() if field.name in columns.own_settings
            ]
            value = getattr(self, field.name)
            if users and self.task not in users and value != field.default:
                as_typed = str(value).lower() if isinstance(value, bool) else value
                raise InputError(
                    f"data.{field.name}={as_typed} is for data.task={' or '.join(users)}, but "
                    f"data.task is {self.task}"
                )

    @cached_property
    def task_columns(self) -> TaskColumns:
        """The columns of this task, which convert rows."""
        return columns_of(self)

    def assemble(self, train: SourceRows, test: SourceRows | None) -> RawData:
        """Check, shuffle and limit the rows; without `test` hold out `test_share` of `train`."""
        build, train, test, skipped = self.checked(train, test)
        task, are_held_out = build(), test is None
        train, test = self.divided(train, test, task)
        rows = list(train.values), list(test.values)
        to_train, to_score = self.task_columns.split(*rows, are_held_out=are_held_out)
        data = self.raw(task, self.split(to_train), self.split(to_score), skipped)
        return replace(data, origins=self.origins(train, test))

    def divided(
        self, train: SourceRows, test: SourceRows | None, task: Shows
    ) -> tuple[SourceRows, SourceRows]:
        """Checked rows to train on and to test on, the latter held out if there are none."""
        if test is None:
            train, test = self.hold_out(train, task)
            train = train.select(self.sample("train", len(train)))
            test = test.select(self.sample("test", len(test)))
        columns = self.task_columns
        if isinstance(columns, ClassLabelColumns):
            parts, listed = [list(train.values), list(test.values)], self.labels or train.classes
            for doubt in doubts([*columns.number], *parts, are_listed=bool(listed)):
                logger.warning(doubt)
        return train, test

    def checked(
        self, train: SourceRows, test: SourceRows | None
    ) -> tuple[Callable[[], "Task"], SourceRows, SourceRows | None, dict[str, list[FaultyRow]]]:
        """Check the rows, without torch.

        Returns:
            The function that builds the task; the usable rows to train on, and to test on, None if
            they are held out; rows that are left out, by split.

        Raises:
            InputError: as `usable`, or the rows do not suit the task.
        """
        columns, skipped = self.task_columns, dict[str, list[FaultyRow]]()
        try:
            if test is None and not columns.has_test_set:  # too few have no classes
                held_rows(len(train), self.test_share, train.origin)
            # classes of all rows, so that a rare one in the test part is known
            build = columns.task(train)
        except InputError as error:
            if train.unread:  # without which too few rows are left
                skips = self.bad_rows == SKIP
                raise refusal(train.unread, train, skips=skips) from error
            raise
        if test is not None or columns.has_test_set:
            train = train.select(self.sample("train", len(train)))
        train, skipped["training"] = self.usable(train)
        if columns.has_test_set:
            test = train.select([])
        elif test is not None:
            test, skipped["test"] = self.usable(test.select(self.sample("test", len(test))))
        return build, train, test, skipped

    def usable(self, rows: SourceRows) -> tuple[SourceRows, list[FaultyRow]]:
        """The rows with the columns that `Task.encode_rows` reads, and those that have a fault.

        Raises:
            InputError: rows have a fault, and `data.bad_rows` is not skip; or all of them do.
        """
        found, faulty = rows.usable(self.task_columns.convert)
        if faulty:
            leave_out(faulty, rows, skips=self.bad_rows == SKIP, left=len(found))
        return found, faulty

    def origins(self, *splits: SourceRows) -> dict[str, list[Origin]]:
        """Where usable rows to train on and to test on are from."""
        skips = self.bad_rows == SKIP
        named = zip(("training", "test"), splits, strict=True)
        return {name: [Origin(replace(rows, values=[]), skips)] for name, rows in named}

    def stream(self, rows: LazySourceRows, test: SourceRows | None) -> RawData:
        """Train rows that are checked while they are read, and test rows that are checked now.

        What the task needs of all rows, such as the names of the classes, is read once in advance.

        Raises:
            InputError: there are no test rows, or the first row is not valid.
        """
        if test is None:
            raise InputError(
                f"data.streaming=true cannot hold out data.test_share={self.test_share} of rows "
                "that are not read in advance: give data.test or data.test_split"
            )
        # may read the whole stream once, for the classes
        task = self.task_columns.task(rows)()
        next(self.converted(rows))  # so that an error in the first row is raised before training
        stream = Stream(
            partial(self.converted, rows), self.shuffle_buffer, self.held_rows, rows.locate
        )
        test, _ = self.usable(test.select(self.sample("test", len(test))))
        data = self.raw(task, stream, self.split(list(test.values)), {})
        return replace(data, origins=self.origins(test, test))

    def raw(
        self,
        task: "Task",
        train: "Dataset | Stream",
        test: "Dataset",
        skipped: Mapping[str, Sequence[FaultyRow]],
    ) -> RawData:
        """The rows of this source."""
        described = self.task_columns.described()
        return RawData(task, train, test, self.name, format=described, skipped=skipped)

    def converted(self, rows: LazySourceRows) -> Iterator[Row]:
        """Yield rows with the columns that `Task.encode_rows` reads."""
        converted = rows.map(self.task_columns.convert, self.task_columns.choose)
        return (self.numbered(number, row) for number, row in enumerate(converted))

    def numbered(self, number: int, row: Row) -> Row:
        """Add the column `number` of questions, by which a question's windows are found again."""
        return {**row, "number": number} if self.task == "question_answering" else row

    def hold_out(self, rows: SourceRows, task: Shows) -> tuple[SourceRows, SourceRows]:
        """Split usable rows at random: to train on, to test on; those of one input on one side."""
        keys = [question_text(task, row) or str(i) for i, row in enumerate(rows.values)]
        if getattr(task, "plain", False):  # a prompt that both answers begin with has words of them
            keys = beginnings(keys)
        train, test = hold_out(len(rows), self.test_share, self.seed, rows.origin, keys)
        return rows.select(train), rows.select(test)

    def split(self, rows: Sequence[Row]) -> "Dataset":
        """A data set of usable rows."""
        numbered = [self.numbered(number, row) for number, row in enumerate(rows)]
        return resolve_name("datasets:Dataset").from_list(numbered)  # takes a second
