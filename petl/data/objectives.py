"""What a run learns from preferences by, and the settings of each such objective: `+task=NAME`.

They are known without torch, so that a wrong one is found at once; `petl.data.tasks.preferences`
has the losses. A run has them under `task`, and its data under `data.objective`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petl.errors import InputError, choose
from petl.system.values import bounded, check_rules, field, one_of, read_fields

ABOVE_0 = bounded(gt=0)


@dataclass
class Objective:
    """Settings that all objectives share."""

    # texts as they are, without the model's chat template, as TRL reads prompts that are strings
    plain: bool = False


@dataclass
class DPOSettings(Objective):
    """Direct preference optimization: a loss of the answers' log-ratios to the base model."""

    beta: float = field(0.1, ABOVE_0)  # how strongly the model is held to its base
    # of the difference of the log-ratios; ipo takes them by token
    loss: str = field("sigmoid", one_of("sigmoid", "hinge", "ipo"))


@dataclass
class ORPOSettings(Objective):
    """Odds ratio preference optimization: no reference, and the loss of the chosen text."""

    beta: float = field(0.1, ABOVE_0)  # weight of the odds ratio (the paper's lambda)


@dataclass
class KTOSettings(Objective):
    """Kahneman-Tversky optimization: answers that are good or bad, each for itself."""

    beta: float = field(0.1, ABOVE_0)  # as of DPO
    desirable_weight: float = field(1.0, ABOVE_0)  # of good answers in the loss
    undesirable_weight: float = field(1.0, ABOVE_0)  # of bad ones


@dataclass
class RewardSettings(Objective):
    """A reward model: a number for each text, higher for the chosen one (Bradley-Terry)."""

    # weight of the squared sum of both rewards, which holds their mean at 0; null: without
    center: float | None = field(None, ABOVE_0)


OBJECTIVES: Mapping[str, type[Objective]] = {
    "dpo": DPOSettings,
    "orpo": ORPOSettings,
    "kto": KTOSettings,
    "reward": RewardSettings,
}


def read_objective(task: str, settings: Mapping[str, object] | None) -> Objective:
    """Return the checked settings of a task that is an objective.

    Args:
        settings: those under `data.objective`; None: the defaults.

    Raises:
        InputError: an unknown setting, a value that is not allowed, or settings of another task.
    """
    given = dict(settings or {})
    name = given.pop("name", task)
    if name != task:
        raise InputError(
            f"data.task={task}, but the run has task.name={name}: leave data.task out, which "
            f"+task={name} sets"
        )
    objective = read_fields(OBJECTIVES[task], given, "task")
    check_rules(objective, "task")
    return objective


def with_objective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run whose data have the task that its group `task` names.

    Raises:
        InputError: the group names no objective, or the data have another task.
    """
    group = settings.get("task")
    if not isinstance(group, Mapping):
        return dict(settings)
    choose(OBJECTIVES, group.get("name"), "task")
    data = {**settings["data"], "task": group["name"], "objective": dict(group)}
    return {**settings, "data": data}
