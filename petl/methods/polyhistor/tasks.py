"""Checks of tasks: each row of a batch has the id of one."""

from collections.abc import Sequence

from petl.core.layers.task_rows import TaskRows
from petl.core.spec.config import require
from petl.errors import InputError


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise InputError unless `tasks` are names, no two alike; `require_tasks` refuses none."""
    require(
        isinstance(tasks, Sequence),
        f"tasks={tasks!r} has no order, which gives the ids of the tasks; give a list",
    )
    for name in tasks:
        require(
            bool(name) and name.isprintable(),
            f"tasks has {name!r}, which is no name; use letters, digits and signs",
        )
        require(
            tasks.count(name) == 1, f"tasks={list(tasks)} has {name!r} twice; names must differ"
        )


def require_tasks(tasks: Sequence[str]) -> None:
    """Raise InputError if no task is named; for a model, not for a config: [] is a default."""
    require(bool(tasks), "tasks=[] is empty; name the tasks, such as tasks=[sst2, mnli], or [only]")


def check_ids(rows: TaskRows | None, tasks: Sequence[str], key: str) -> None:
    """Raise InputError if rows have no task, or one that an adapter does not have.

    Args:
        rows: those of the forward pass, or None.
        tasks: names of the adapter's tasks.
        key: path of the adapted module.
    """
    if rows is None:
        if len(tasks) > 1:
            raise InputError(
                f"the adapter on {key} serves {len(tasks)} tasks ({', '.join(tasks)}) and the "
                "batch has no task_ids: pass model(**batch, task_ids=torch.tensor([...])), with "
                "one id for each row; a model loaded by PEFT alone drops them: use petl.load"
            )
        return
    unknown = [task for task in rows.distinct if task >= len(tasks)]
    if unknown:
        raise InputError(
            f"task_ids has {unknown[0]}, and the adapter on {key} has ids from 0 to "
            f"{len(tasks) - 1}: {', '.join(tasks)}"
        )
