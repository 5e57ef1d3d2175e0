"""Learning from preferences in a run: `+task=dpo|orpo|kto|reward` with settings under `task`."""

from pathlib import Path
from typing import ClassVar

from petl.core.support import Capability, Lacks
from petl.core.types import Groups, Record
from petl.data.objectives import with_objective
from petl.training.features import RunFeature
from petl.training.features.section import Section

SHARDED = "its reference is a pass of the whole model beside that of training; use +launch=ddp"
TITLES = {
    "dpo": "Direct preference optimization (DPO)",
    "orpo": "Odds ratio preference optimization (ORPO)",
    "kto": "Kahneman-Tversky optimization (KTO)",
    "reward": "Reward model",
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
}


class LearnFromPreferences(RunFeature):
    """Sets the task of the data, and excludes what does not go with it."""

    lacks: ClassVar[Lacks] = {
        Capability.CHANGED_BASE: "the reference is the base model, by disabling the adapter, and "
        "this method changes the base weights: train with another method",
        Capability.FSDP: SHARDED,
        Capability.ZERO: SHARDED,
        Capability.STORE: "the store has one text a row, and rows here have two",
        Capability.TOGETHER: "its loss is no loss of the model",
        Capability.EXTRA_LOSS: "its loss is no loss of the model",
        Capability.TASKS: "its rows are of one task",
    }

    def settle(self, settings: Groups) -> Groups:
        """Give the data the task and its settings."""
        return with_objective(settings)

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return what the scores mean."""
        task = scores.get("task")
        if task not in TITLES:
            return None
        accuracy = "Accuracy is the share with the higher reward on the right side; equal ones "
        return Section(TITLES[task], f"{MEANINGS[task]} {accuracy}count half.")
