"""Questions about a text that holds the answer, and the forms in which answers are given."""

import json
from collections.abc import Mapping
from typing import Any

from petl.data.task_columns import Form, Given
from petl.data.validation import Row, read, shown, text
from petl.tasks.base import Task
from petl.tasks.question_answering import QuestionAnswering

JSON_BEGINNINGS = ('{"', "[{", '["', "[]")  # of answers in a csv file


class QuestionForm(Form):
    """Questions about a text that holds the answer."""

    reads = ("question", "context", "answers", "answer_start", "stride", "max_answer_length")

    def columns(self) -> list[str]:
        given = self.given
        found = [given.question, given.context, given.answers]
        return [*found, given.answer_start] if given.answer_start else found

    def task(self, rows: Given) -> Task:
        lacking = not all(rows.column(self.given.answers, self.answers_of))
        return QuestionAnswering(
            max_length=self.given.max_length,
            stride=self.given.stride,
            max_answer_length=self.given.max_answer_length,
            unanswerable=lacking,
        )

    def convert(self, row: Row) -> Row:
        given = self.given
        question = read(row, given.question, text)
        context = read(row, given.context, text)
        start = row[given.answer_start] if given.answer_start else None

        def placed(value: Any) -> list[tuple[str, int]]:
            return [self.place(context, *answer) for answer in self.answers_of(value, start)]

        found = read(row, given.answers, placed)
        return {
            "question": question,
            "context": context,
            "answers": [answer for answer, _ in found],
            "starts": [start for _, start in found],
        }

    def answers_of(self, value: Any, start: Any = None) -> list[tuple[str, Any]]:
        """Answers and where they begin, if that is known, in whichever form they are given."""
        if isinstance(value, str) and value.lstrip().startswith(JSON_BEGINNINGS):
            value = json.loads(value)  # its error is a ValueError
        if value is None or value == "":
            return []
        if isinstance(value, str):
            return [(value, start)]
        if isinstance(value, list) and all(isinstance(answer, str) for answer in value):
            starts = start if isinstance(start, list) else [None] * len(value)
            return list(zip(value, starts, strict=True))
        if isinstance(value, Mapping):
            starts = value.get("answer_start")
            texts = value.get("text")
            if not isinstance(texts, list) or not isinstance(starts, list):
                raise ValueError(f"is {shown(value)}, not lists text and answer_start")
            return list(zip(texts, starts, strict=True))
        if isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
            return [(answer.get("text"), answer.get("answer_start")) for answer in value]
        raise ValueError(f"is {shown(value)}, neither a text nor texts with their answer_start")

    def place(self, context: str, answer: Any, start: Any) -> tuple[str, int]:
        """An answer and the character that it begins at."""
        text(answer)
        if start is None or start == "":
            if context.count(answer) > 1:
                raise ValueError(
                    f"is {shown(answer)}, which the context has several times: give data."
                    "answer_start, the column of the character that it begins at"
                )
            start = context.find(answer)
        start = int(start)
        if start < 0 or context[start : start + len(answer)] != answer:
            raise ValueError(f"is {shown(answer)}, which the context does not have there ({start})")
        return answer, start
