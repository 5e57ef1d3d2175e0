"""Rows of several tasks: each has the name of its own, which becomes an id for the model.

The rows of a task kind, such as classification, then have the column `task`; encoded rows and
batches have `task_ids`, for methods that serve several tasks, and scores are also given by task.
"""

import copy
from collections.abc import Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from datasets import Features, Value
from torch import Tensor

from petl.data.tasks import COLUMN, IDS
from petl.data.tasks.base import Collate, Columns, Fields, P, Row, Task
from petl.errors import UnsupportedError


class RowTasks(Task[P]):
    """Mixin before a kind of task whose rows belong to the tasks named by `tasks`."""

    original: ClassVar[type[Task]]

    def __reduce__(self) -> tuple[object, ...]:
        # the generated class cannot be imported by name
        return _restored, (self.original, self.tasks, self.__dict__)

    def encode_rows(self, processor: P, rows: Columns, /) -> Columns:
        """Encode rows without their task, and add the id of it to each encoded row."""
        if self.packs:
            raise UnsupportedError(
                "data.pack=true joins texts of several tasks into one row; set data.pack=false"
            )
        ids = [self.tasks.index(name) for name in rows[COLUMN]]
        rows = {name: values for name, values in rows.items() if name != COLUMN}
        if self.one_for_one:
            return {**super().encode_rows(processor, rows), IDS: ids}
        # a kind that splits or drops rows passes numbers on: those of the places in this call
        places = {**rows, "number": list(range(len(ids)))}
        encoded = super().encode_rows(processor, places)
        found = encoded.pop("_number")
        if "number" in rows:
            encoded["_number"] = [rows["number"][place] for place in found]
        return {**encoded, IDS: [ids[place] for place in found]}

    def prompts(self, processor: P, rows: Columns, /) -> Sequence[Sequence[int]]:
        return super().prompts(processor, {k: v for k, v in rows.items() if k != COLUMN})

    def features(self, processor: P, /) -> Features | None:
        own = super().features(processor)
        return None if own is None else Features({**own, IDS: Value("int64")})

    def settings(self) -> Fields:
        return {**super().settings(), "tasks": list(self.tasks)}

    def collate(self, processor: P, /, multiple: int = 1) -> Collate:
        """A collate function that adds `task_ids`, [B] int64."""
        return partial(_batch, super().collate(processor, multiple))


def _batch(collate: Collate, rows: Sequence[Row]) -> dict[str, Tensor]:
    ids = torch.tensor([row[IDS] for row in rows])
    return {**collate([{k: v for k, v in row.items() if k != IDS} for row in rows]), IDS: ids}


@cache
def _kind(original: type[Task], tasks: tuple[str, ...]) -> type[Task]:
    shown = (*original.shown, COLUMN)
    body = {"tasks": tasks, "original": original, "shown": shown, "__doc__": original.__doc__}
    return type(original.__name__, (RowTasks, original), body)


def _restored(original: type[Task], tasks: tuple[str, ...], values: Fields) -> Task:
    kind = _kind(original, tasks)
    task = kind.__new__(kind)
    vars(task).update(values)
    return task


def of_tasks(task: Task, names: Sequence[str]) -> Task:
    """Return a copy of `task` whose rows belong to tasks of these names, in the order of ids."""
    copied = copy.copy(task)
    copied.__class__ = _kind(type(task), tuple(names))
    return copied
