"""Mixin for tuners of methods that serve several tasks: each row of a batch has a task id."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from petl.core.layers.task_rows import TaskRows, take_task_ids
from petl.core.spec.config import require
from petl.core.spec.facts import facts_of
from petl.core.tuners.base import ForwardContextTuner
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


class TaskTuner(ForwardContextTuner):
    """Tuner whose model takes `task_ids`, one for each row, in `forward` and `generate`.

    It comes before the tuner class in the bases. Its adapters read `ForwardContext.tasks` and call
    `check_ids`; the config has the names of the tasks, in the order of their ids, as `tasks`.
    """

    takes_task_ids = True

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        # after `begin`, which clears the state
        hook = model.register_forward_pre_hook(self.context.take_tasks, with_kwargs=True)
        self.hooks.append(hook)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Keep `task_ids` during a call of the PeftModel: `generate` calls the model many times."""
        tasks, kwargs = take_task_ids(args, kwargs)
        tuner: Any = super()
        with tuner._enable_peft_forward_hooks(*args, **kwargs):
            before, self.context.given_tasks = self.context.given_tasks, tasks
            try:
                yield
            finally:
                self.context.given_tasks = before


def task_names(peft_config: Mapping[str, Any], adapter_name: str) -> list[str]:
    """Return the tasks of an adapter in the order of their ids; none for other methods."""
    return list(facts_of(peft_config[adapter_name]).tasks)
