"""Read the task in an adapter's folder: new rows are encoded as the training rows were."""

from pathlib import Path
from pkgutil import resolve_name
from typing import TypedDict

from petl.data.tasks import TASKS
from petl.data.tasks.base import FILE, Task
from petl.data.tasks.row_tasks import of_tasks
from petl.errors import InputError, choose
from petl.system.files.read import read_json
from petl.system.values import check_rules, hints_of, type_problem

EARLIER = {"embedding": "retrieval"}  # names in files of before


class TaskHeader(TypedDict):
    """The entry that each file has; the others are the fields of that task."""

    task: str


def read_task(folder: Path) -> Task | None:
    """Return the task in an adapter's folder; None if there is none.

    Raises:
        InputError: the file is damaged, or has a value that no task has.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    saved = read_json(file, TaskHeader)
    name = saved.pop("task")
    kind = resolve_name(choose(TASKS, EARLIER.get(name, name), f"task (in {file})"))
    # any kind of task may have rows of several; one has the names as a field of its own
    names = None if "tasks" in hints_of(kind) else saved.pop("tasks", None)
    # fields that are not there have defaults
    problem = type_problem(names, list[str] | None, "tasks") or type_problem(saved, kind)
    if problem:
        raise InputError(f"{file} cannot be used: {problem}")
    try:
        task = kind(**saved)
        check_rules(task)
    except InputError as error:
        raise InputError(f"{file} cannot be used: {error}") from error
    return of_tasks(task, names) if names else task
