"""Learning from preferences and rewards: `+task=dpo|orpo|kto|reward|grpo`, settings in `task`."""

from pathlib import Path
from typing import Any, ClassVar

from petl.core.support import Capability, Lacks, Part
from petl.core.types import Groups, Record
from petl.data.objectives import REWARDS, with_objective
from petl.data.tasks.preferences.rewards import from_file
from petl.errors import InputError
from petl.training.features import Context, RunFeature
from petl.training.features.section import Section

REFERENCED = ("dpo", "kto")  # compared with the base model, as grpo with task.beta above 0
TITLES = {
    "dpo": "Direct preference optimization (DPO)",
    "orpo": "Odds ratio preference optimization (ORPO)",
    "kto": "Kahneman-Tversky optimization (KTO)",
    "reward": "Reward model",
    "grpo": "Group relative policy optimization (GRPO)",
}
# what the scores of each are
MEANINGS = {
    "dpo": "A reward is beta times the log-ratio of an answer to the base model, the margin that "
    "of the chosen answer over the rejected one.",
    "orpo": "A reward is beta times the mean log-probability of a token of an answer, the margin "
    "that of the chosen answer over the rejected one.",
    "kto": "A reward is beta times the log-ratio of an answer to the base model, the margin that "
    "of good answers over bad ones.",
    "reward": "A reward is the model's output, the margin that of the chosen text over the "
    "rejected one.",
    "grpo": "Rewards on test rows are those of the most probable answer to each prompt, in "
    "training those of sampled ones.",
}


class LearnFromPreferences(RunFeature):
    """Sets the task of the data, and excludes what does not go with it."""

    lacks: ClassVar[Lacks] = {
        Capability.CHANGED_BASE: lambda own: own.of_reference(
            "the reference is the base model, by disabling the adapter, and this method changes "
            "the base weights; orpo and reward need no reference"
        ),
        Capability.EXTRA_LOSS: "its loss is not that of the model",
        Capability.TASKS: "its rows are of one task",
    }

    @property
    def part(self) -> Part:
        """The feature by the name of the objective."""
        return Part(f"task={self.settings['name']}", self.uses, self.lacks, self)

    def of_reference(self, reason: str) -> str:
        """Return why something is lacking; "" for an objective without a reference."""
        name, beta = self.settings["name"], self.settings.get("beta")
        return reason if name in REFERENCED or (name == "grpo" and beta) else ""

    def settle(self, settings: Groups) -> Groups:
        """Give the data the task and its settings.

        Raises:
            InputError: they are not allowed, or the run begins with an adapter that is not part of
                the reference.
        """
        train = settings["train"]
        sizes = {name: train.get(name) for name in ("batch_size", "micro_batch_size")}
        lone = next((name for name, size in sizes.items() if size == 1), None)
        if self.settings["name"] == "kto" and lone is not None:
            raise InputError(
                f"train.{lone}=1 leaves task=kto no answer of another row for its reference "
                "point: set 2 or more"
            )
        start = train.get("init_from")
        if start is not None and self.of_reference("it has one"):
            raise InputError(
                f"train.init_from={start} is not possible with task={self.settings['name']}, whose "
                "reference is the base model without this adapter: set "
                f"model.adapter={start} to learn on top of it, with it as the reference"
            )
        return with_objective(settings)

    def before_training(self, context: Context) -> None:
        """Run the file of a reward that is no built-in one."""
        task: Any = context.splits.task
        reward = getattr(task, "reward", None)
        if reward is not None and reward not in REWARDS:
            task.rate = from_file(reward, plain=task.plain)

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return what the scores mean."""
        task = scores.get("task")
        if task not in TITLES:
            return None
        accuracy = (
            "Accuracy is the share with the higher reward on the right side; equal ones count half."
        )
        return Section(TITLES[task], " ".join([MEANINGS[task], accuracy][: 1 + (task != "grpo")]))
