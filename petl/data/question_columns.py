"""Columns of extractive question answering, with the formats in which answers are given."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from petl.data.task_columns import AnySourceRows, ColumnSettings, NamedColumns
from petl.data.tasks import later
from petl.data.validation import Row, read, text
from petl.errors import shown
from petl.system.files.read import parse_json

if TYPE_CHECKING:
    from petl.data.tasks.base import Task

JSON_PREFIXES = ('{"', "[{", '["', "[]")  # of answers in a csv file


class QuestionAnsweringColumns(NamedColumns):
    """Questions about a context that contains the answer."""

    own_settings = ("question", "context", "answers", "answer_start", "stride", "max_answer_length")

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.inputs, self.targets = [settings.question, settings.context], [settings.answers]
        if settings.answer_start:
            self.targets.append(settings.answer_start)

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build the task; it is `unanswerable` if a question has no answers."""
        has_unanswerable = not all(rows.column(self.settings.answers, self.answers_of))
        return later(
            "question_answering",
            max_length=self.settings.max_length,
            stride=self.settings.stride,
            max_answer_length=self.settings.max_answer_length,
            unanswerable=has_unanswerable,
        )

    def convert(self, row: Row) -> Row:
        """Columns `question`, `context`, and `answers` and `starts` of labeled rows."""
        settings = self.settings
        question = read(row, settings.question, text)
        context = read(row, settings.context, text)
        if not self.labeled:
            return {"question": question, "context": context}
        start = row[settings.answer_start] if settings.answer_start else None

        def located(value: object) -> list[tuple[str, int]]:
            return [self.locate(context, *answer) for answer in self.answers_of(value, start)]

        answers = read(row, settings.answers, located)
        return {
            "question": question,
            "context": context,
            "answers": [answer for answer, _ in answers],
            "starts": [start for _, start in answers],
        }

    def answers_of(self, value: object, start: object = None) -> list[tuple[object, object]]:
        """Answers with their first character, or None where it is not given.

        Accepts a string, a list of strings, SQuAD's lists `text` and `answer_start`, a list of
        objects with these keys, or any of them as JSON text (in a csv file).

        Raises:
            ValueError: the value has none of these formats.
        """
        # a csv file has no lists; a plain answer may begin with a bracket, but not like this
        if isinstance(value, str) and value.lstrip().startswith(JSON_PREFIXES):
            value = parse_json(value)
        if value is None or value == "":
            return []
        if isinstance(value, str):
            return [(value, start)]
        if isinstance(value, list) and all(isinstance(answer, str) for answer in value):
            return pairs(value, starts_of(start, len(value)))
        if isinstance(value, Mapping):
            starts = value.get("answer_start")
            texts = value.get("text")
            if not isinstance(texts, list) or not isinstance(starts, list):
                raise ValueError(
                    f"is {shown(value)}, not an object with the lists text and answer_start"
                )
            return pairs(texts, starts)
        if isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
            return [(answer.get("text"), answer.get("answer_start")) for answer in value]
        raise ValueError(
            f"is {shown(value)}, not a text, a list of texts, or texts with answer_start"
        )

    def locate(self, context: str, answer: object, start: object) -> tuple[str, int]:
        """An answer and its first character in the context, which is searched if not given.

        Raises:
            ValueError: the context does not contain the answer there, or several times.
        """
        answer = text(answer)
        if start is None or start == "":
            if context.count(answer) > 1:
                raise ValueError(
                    f"is {shown(answer)}, which occurs several times in the context: give "
                    "data.answer_start, the column with the position of its first character"
                )
            start = context.find(answer)
        if not isinstance(start, str | int):
            raise ValueError(f"has the start {shown(start)}, not the position of a character")
        start = int(start)  # a csv file has text
        if start < 0 or context[start : start + len(answer)] != answer:
            raise ValueError(f"is {shown(answer)}, which is not in the context at position {start}")
        return answer, start


def starts_of(value: object, count: int) -> list[object]:
    """The starts of a list of `count` answers, in a column of their own."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value)
    if value is None or value == "":  # the answers are searched in the context
        return [None] * count
    return value if isinstance(value, list) else [value]


def pairs(texts: list[object], starts: list[object]) -> list[tuple[object, object]]:
    """Answers with their starts.

    Raises:
        ValueError: they are not as many.
    """
    if len(texts) != len(starts):
        raise ValueError(f"has {len(texts)} answers, but there are {len(starts)} starts")
    return list(zip(texts, starts, strict=True))
