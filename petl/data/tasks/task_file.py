"""Read the task in an adapter's folder: new rows are encoded as the training rows were."""

from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypedDict, get_type_hints

from petl.data.tasks import TASKS
from petl.data.tasks.base import FILE, Task
from petl.data.tasks.row_tasks import of_tasks
from petl.errors import InputError, choose
from petl.system.files.read import read_json
from petl.system.values import LARGEST, type_problem


class TaskHeader(TypedDict):
    """The entry that each file has; the others are the fields of that task."""

    task: str


def read_task(folder: Path) -> Task | None:
    """Return the task in an adapter's folder; None if there is none, as in those of version 0.1.

    Raises:
        InputError: the file is damaged, or has a value that no task has.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    saved = read_json(file, TaskHeader)
    kind: Any = resolve_name(choose(TASKS, saved.pop("task"), f"task (in {file})"))
    # annotations may be strings, which `type_problem` cannot check
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in fields(kind)}
    # any kind of task may have rows of several; one has the names as a field of its own
    names: Any = None if "tasks" in known else saved.pop("tasks", None)
    if names is not None and type_problem(names, list[str], "tasks"):
        raise InputError(f"{file} cannot be used: {type_problem(names, list[str], 'tasks')}")
    problems = [
        _problem(name, value, known[name]) if name in known else f"{name} is unknown"
        for name, value in saved.items()
    ]
    # other fields have defaults, which hold for files of earlier versions
    if "classes" in known and "classes" not in saved:
        problems.append("it has no classes")
    problem = next(filter(None, problems), "")
    if problem:
        raise InputError(f"{file} cannot be used: {problem}")
    try:
        task = kind(**saved)
    except InputError as error:
        raise InputError(f"{file} cannot be used: {error}") from error
    return of_tasks(task, names) if names else task


def _problem(name: str, value: Any, shape: Any) -> str:
    """Return why a field of a task cannot have a value, or ""."""
    problem = type_problem(value, shape, name)
    if not problem and name == "classes" and not len(value) == len(set(value)) >= 2:
        return f"{name} does not name at least two distinct classes"
    # bool is a subclass of int
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not problem and is_number and not 0 <= value <= LARGEST:
        return f"{name} is {value}, which is out of range"
    return problem
