"""Columns of preferences: pairs of answers, answers with a label, in the forms that TRL reads.

A prompt is in a column of its own, or both answers begin with it. Prompts and answers are texts or
lists of turns; a text is a turn of its own, or with `task.plain` stands as it is.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from petl.data.conversations import TurnKeys
from petl.data.formats import Sides, fitting_task, shared_length, with_system
from petl.data.objectives import read_objective
from petl.data.task_columns import AnySourceRows, ColumnSettings, TaskColumns
from petl.data.tasks import Message, later
from petl.data.templates import columns_of, is_template
from petl.data.validation import (
    Row,
    SourceRows,
    every,
    passage,
    read,
    require,
    text,
    truth,
    without_paths,
)
from petl.errors import InputError

if TYPE_CHECKING:
    from petl.data.tasks.base import Task

logger = logging.getLogger(__name__)
OPTIONAL = ("system", "tools")  # columns that conversations may have


class PairColumns(TaskColumns):
    """Pairs of a chosen and a rejected answer."""

    own_settings: ClassVar[tuple[str, ...]] = (
        *("prompt", "chosen", "rejected", "system", "role", "content", "roles", "objective"),
    )

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.objective = read_objective(settings.task, settings.objective)
        keys = TurnKeys.of(settings.role, settings.content, settings.roles)
        prompt, chosen = settings.prompt or "prompt", settings.chosen or "chosen"
        self.sides = Sides(prompt, chosen, settings.rejected or "rejected", keys)
        self.completion = settings.completion or "completion"
        if self.objective.plain and settings.system is not None:
            raise InputError(
                f"data.system={settings.system} is a turn of a conversation, and task.plain=true "
                "reads texts: leave one of them out"
            )

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns of prompts and answers, and those that conversations may have."""
        names = list(present)
        needed, settings = self.needed(names), self.settings
        missing = next((name for name in needed if name not in names), None)
        found = missing and (fitting_task(names, settings.task) or self.naming(missing, names))
        # a template reads columns that must be there
        template = settings.system if settings.system and is_template(settings.system) else None
        needed = [*needed, *(columns_of(template) if template else ())]
        own = columns_of(self.sides.prompt)
        optional = [name for name in (*own, *OPTIONAL) if name in names]
        return require([*needed, *optional], names, origin, found)

    def needed(self, names: Collection[str]) -> list[str]:
        """The columns that rows must have, of which `names` are present."""
        if not self.labeled:
            return columns_of(self.sides.prompt)
        prompt = self.sides.prompt
        # the prompt may be in both answers, unless a setting names its column
        asked = columns_of(prompt) if self.settings.prompt else []
        return [*asked, self.sides.chosen, self.sides.rejected]

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build the task with its settings."""
        fields = asdict(self.objective)
        return later(self.settings.task, max_length=self.settings.max_length, **fields)

    def convert(self, row: Row) -> Row:
        """Columns `prompt`, `chosen` and `rejected`: turns, or texts with `task.plain`."""
        if not self.labeled:
            return {"prompt": self.asked(row)}
        if not self.objective.plain:
            prompt, chosen, rejected = self.sides.read(row)
            prompt = with_system(prompt, self.settings.system, row)
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        chosen, rejected = (read(row, n, text) for n in (self.sides.chosen, self.sides.rejected))
        self.sides.differing(chosen, rejected)
        if row.get(self.sides.prompt) is not None:
            prompt = read(row, self.sides.prompt, passage)
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        prompt = chosen[: shared_length([chosen, rejected])]
        if not prompt.strip():
            raise ValueError(
                f"{self.sides.chosen} and {self.sides.rejected} begin with no prompt that both have"
            )
        start = len(prompt) - prompt.endswith(" ")  # a space belongs to the word after it
        return {"prompt": prompt[:start], "chosen": chosen[start:], "rejected": rejected[start:]}

    def asked(self, row: Row) -> str | list[Message]:
        """The prompt of a row that has it in a column of its own."""
        if self.objective.plain:
            return read(row, self.sides.prompt, passage)
        return with_system(self.sides.asked(row), self.settings.system, row)


class RewardColumns(PairColumns):
    """Pairs of a chosen and a rejected answer; to predict a reward, answers."""

    own_settings: ClassVar[tuple[str, ...]] = (*PairColumns.own_settings, "completion")

    def needed(self, names: Collection[str]) -> list[str]:
        """As of pairs; to predict, prompt and completion."""
        more = [] if self.labeled else [self.completion]
        return [*super().needed(names), *more]

    def convert(self, row: Row) -> Row:
        """As of pairs; to predict, columns `prompt` and `completion`."""
        return super().convert(row) if self.labeled else self.answered(row)

    def answered(self, row: Row) -> Row:
        """Columns `prompt` and `completion`."""
        column = self.completion
        if self.objective.plain:
            return {"prompt": self.asked(row), "completion": read(row, column, text)}
        return {"prompt": self.asked(row), "completion": self.sides.side(row, column)}


class RatedColumns(RewardColumns):
    """Answers with a label, true for a good one, or pairs, of which one is good."""

    own_settings: ClassVar[tuple[str, ...]] = (*RewardColumns.own_settings, "label")
    rated: bool | None = None  # False for pairs; known with the first row

    def needed(self, names: Collection[str]) -> list[str]:
        """Prompt, completion and label, or the columns of pairs where rows have these."""
        if not self.labeled:
            return columns_of(self.sides.prompt)
        rated = [*columns_of(self.sides.prompt), self.completion, self.settings.label]
        # rows with both are rated, the more specific form
        is_rated = not {self.sides.chosen, self.sides.rejected} <= {*names} or {*rated} <= {*names}
        if self.rated is None:
            self.rated = is_rated
        if self.rated != is_rated:
            raise InputError(
                "data.task=kto reads answers with a label, or pairs, and the files have both: "
                "give files of one kind"
            )
        return rated if is_rated else super().needed(names)

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build the task; say if no answer is good, or none is bad."""
        # a stream would be read to its end
        if self.rated and isinstance(rows, SourceRows):
            label = self.settings.label
            # rows that are no label are refused with all other faults
            kinds = {*rows.column(label, truth)}
            if len(kinds) == 1:
                one, other = ("good", "bad") if True in kinds else ("bad", "good")
                logger.warning(
                    "%s: by column %r all answers are %s: KTO learns from %s ones as well, without "
                    "which only the reference model holds it",
                    *(rows.origin, label, one, other),
                )
        return super().task(rows)

    def convert(self, row: Row) -> Row:
        """Columns `prompt`, `completion` and `good`, or those of pairs."""
        if not self.labeled:
            return {"prompt": self.asked(row)}
        if not self.rated:
            return super().convert(row)
        return {**self.answered(row), "good": read(row, self.settings.label, truth)}


class PromptColumns(PairColumns):
    """Prompts, with all other columns of a row for the reward of an answer."""

    own_settings: ClassVar[tuple[str, ...]] = (
        *("prompt", "answer", "system", "role", "content", "roles", "objective"),
    )

    def needed(self, names: Collection[str]) -> list[str]:
        """The columns of the prompt, and that of the answer if a reward compares with it."""
        objective: Any = self.objective
        pattern = objective.pattern
        compares = objective.reward == "exact" or (pattern and re.compile(pattern).groups)
        answer = [self.settings.answer or "answer"] if compares and self.labeled else []
        return [*columns_of(self.sides.prompt), *answer]

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return all columns, after a check of those that are needed."""
        names = list(present)
        super().choose(names, origin)
        return every(without_paths(names), origin)

    def convert(self, row: Row) -> Row:
        """Columns `prompt` and `given`: the other columns as JSON text."""
        prompt = {"prompt": self.asked(row)}
        if not self.labeled:
            return prompt
        others = {k: v for k, v in row.items() if k not in columns_of(self.sides.prompt)}
        answer = self.settings.answer
        if answer is not None:
            others["answer"] = read(row, answer, lambda value: value)
        return {**prompt, "given": json.dumps(others, default=str)}
