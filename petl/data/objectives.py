"""Objectives of learning from preferences and rewards, `+task=NAME`, and the settings of each.

They are known without torch, so that a wrong one is found at once; `petl.data.tasks.preferences`
has the losses. A run has them under `task`, and its data under `data.objective`.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petl.errors import InputError, choose, did_you_mean
from petl.system.imports.extras import need_extra
from petl.system.values import Rule, bounded, check_rules, field, integer, one_of, read_fields

ABOVE_0 = bounded(gt=0)
REWARDS = ("exact", "regex", "reasoning")


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


def is_pattern(text: str) -> bool:
    """True if a text is a regular expression with at most one group."""
    try:
        return re.compile(text).groups <= 1
    except re.error:
        return False


def is_reward(text: str) -> bool:
    """True for the name of a built-in reward, and FILE.py:FUNCTION."""
    return text in REWARDS or bool(re.fullmatch(r".+\.py:\w+", text))


def reward_function(reward: str) -> ast.FunctionDef | None:
    """The function of a file that a reward names, which is not run; None for built-in ones.

    Raises:
        InputError: there is none, it cannot take what it is given, or a package is missing.
    """
    if reward == "reasoning":
        need_extra("reasoning", "reasoning_gym", "task.reward=reasoning")
    if reward in REWARDS or not is_reward(reward):  # the latter is refused by its field
        return None
    file, _, name = reward.rpartition(":")
    try:
        tree = ast.parse(Path(file).expanduser().read_text("utf-8"))  # not run
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"task.reward={reward}: {file} cannot be read: {error}") from error
    found = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    if name not in found:
        raise InputError(
            f"task.reward={reward}: {file} has no function {name}{did_you_mean(name, found)}"
        )
    given = found[name].args
    # columns of the data, which are not known yet, may be arguments as well
    names = {each.arg for each in (*given.args, *given.kwonlyargs)}
    if given.kwarg is None and not {"prompts", "completions"} <= names:
        raise InputError(
            f"task.reward={reward} has the arguments {ast.unparse(given)}: begin it with def "
            f"{name}(prompts, completions, **columns), which are lists"
        )
    return found[name]


@dataclass
class GRPOSettings(Objective):
    """Group relative policy optimization: answers that the model samples, and their rewards."""

    reward: str = field(
        "exact",
        Rule(f"{', '.join(REWARDS)}, or FILE.py:FUNCTION of a file that is there", is_reward),
    )
    # with reward=regex: what is found has the reward 1; of a group, if it is the answer
    pattern: str | None = field(None, Rule("a regular expression of one group", is_pattern))
    generations: int = field(8, integer(2))  # answers to each prompt
    max_new_tokens: int = field(128, integer(1))  # of an answer
    temperature: float = field(1.0, ABOVE_0)  # of the sampling
    beta: float = field(0.0, bounded(ge=0))  # weight of the divergence from the base model
    # mean over the tokens of all answers of a micro-batch, or of the means of each answer
    loss: str = field("dapo", one_of("dapo", "grpo"))

    def __post_init__(self) -> None:
        if (self.reward == "regex") != (self.pattern is not None):
            raise InputError(
                f"task.reward={self.reward} and task.pattern={self.pattern}: give a pattern with "
                "task.reward=regex, and only there"
            )


OBJECTIVES: Mapping[str, type[Objective]] = {
    "dpo": DPOSettings,
    "orpo": ORPOSettings,
    "kto": KTOSettings,
    "reward": RewardSettings,
    "grpo": GRPOSettings,
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
    # whatever task the file of the data has
    data = {**settings["data"], "task": group["name"], "objective": dict(group)}
    return {**settings, "data": data}
