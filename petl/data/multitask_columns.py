"""The columns of files with rows of several text classification tasks."""

from collections.abc import Iterable

from petl.data.task_columns import ClassificationColumns, ColumnSettings, RowTaskColumns
from petl.data.tasks import COLUMN, SEPARATOR
from petl.data.tasks.multitask import MultitaskClassification
from petl.data.templates import columns_of, read_text
from petl.data.validation import Row, label, read, text

PAIR = "text_pair"  # column of second texts, unless `data.text_pair` names another


class MultitaskColumns(RowTaskColumns, ClassificationColumns):
    """Texts, or pairs of texts, with their task and a class of that task.

    The second text is read of rows whose task has one, and the column may be absent if none does.
    """

    def __init__(
        self, settings: ColumnSettings, task: MultitaskClassification, *, labeled: bool = True
    ) -> None:
        super().__init__(settings, labeled=labeled)
        self.of = task
        self.inputs = columns_of(settings.text)

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns of text, label and task, and of the second text if it is there."""
        names = list(present)
        chosen = super().choose(names, origin)
        pair = columns_of(self.settings.text_pair or PAIR) if self.of.pairs else []
        return list(dict.fromkeys([*chosen, *(name for name in pair if name in names)]))

    def convert(self, row: Row) -> Row:
        """Columns `text`, `text_pair` if a task has it, `task`, and `label` of labeled rows."""
        name = read(row, self.settings.task_column, self.name_of)
        converted = {"text": read_text(row, self.settings.text, text), COLUMN: name}
        if self.of.pairs:
            converted["text_pair"] = self.second_text(row) if name in self.of.pairs else None
        if not self.labeled:
            return converted
        own = read(
            row, self.column, lambda value: self.class_of(f"{name}{SEPARATOR}{label(value)}")
        )
        return {**converted, "label": own}

    def second_text(self, row: Row) -> str:
        """The second text of a row whose task has one."""
        column = self.settings.text_pair or PAIR
        missing = [name for name in columns_of(column) if name not in row]
        if missing:
            raise ValueError(f"{missing[0]} is missing, the second text of its task")
        return read_text(row, column, text)
