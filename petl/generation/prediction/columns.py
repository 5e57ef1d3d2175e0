"""The columns of a file to predict or to evaluate: those of the run, or of the command line."""

from collections.abc import Sequence

from petl.core.types import Settings
from petl.data.retrieval_columns import FIELDS, TEST_SET
from petl.data.tabular import TASK_COLUMNS
from petl.data.tasks.base import Task
from petl.errors import InputError, did_you_mean

# settings of the task that name no column, and have the values of the run
READING = (
    *("labels", "prefix", "generate", "pack", "stride"),
    *("max_answer_length", "max_target_length"),
    *FIELDS,
    *TEST_SET,
)


def data_settings(
    given: Settings, task: Task, words: Sequence[str], *, labels: bool = True
) -> dict[str, object]:
    """The settings under `data` of a run, with those of the command line.

    Args:
        given: of the run, `Saved.columns`.
        words: such as "data.text=review".
        labels: True if the rows have labels.

    Raises:
        InputError: a word is not a setting that names columns of the task, or none that is read.
    """
    settings = dict(given)
    kind = TASK_COLUMNS.get(task.file_kind or task.name)
    own = kind.own_settings if kind else ()
    known = [name for name in own if name not in READING]
    if kind is not None and kind.to_predict and not labels:
        known = [*kind.to_predict]
    known += ["task_column"] if task.tasks else []
    for word in words:
        key, is_setting, value = word.partition("=")
        name = key.removeprefix("data.")
        if not is_setting or name == key or name not in known:  # name == key: a word without data.
            hint = did_you_mean(key, [f"data.{name}" for name in known])
            if name in own:
                hint = f": a run keeps its own; there are data.{', data.'.join(known)}"
            elif name == "bad_rows" and name != key:
                hint = ": it is for training; remove these rows from the file"
            raise InputError(f"{word} is not a setting of the columns of a file{hint}")
        # in quotes, as for Hydra, null and numbers are texts
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        settings[name] = value[1:-1] if quoted else None if value == "null" else value
    return settings
