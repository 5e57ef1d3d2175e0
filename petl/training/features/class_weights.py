"""Weights of classes in the loss, so that rare ones count as much as frequent ones.

Of one class for each row or word: the loss is the mean of w_y times the cross-entropy of label y.
`balanced`: w_c = N / (C n_c), of N labels n_c of class c, as in scikit-learn; their mean over the
labels is 1. The mean is over the labels, not over their weights, so that the gradient of a step
does not depend on how it is divided into micro-batches.

Of any number of classes for each row: w_c multiplies the loss of a label that has class c.
`balanced`: w_c = (N - n_c) / n_c, of N rows.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from petl.core.types import base_of
from petl.data.base import BALANCED
from petl.data.tasks.base import IGNORED, Task
from petl.data.tasks.classification import ClassTask
from petl.data.tasks.multi_label import MultiLabel
from petl.data.tasks.multitask import MultitaskClassification
from petl.errors import InputError
from petl.training.features import Context, RunFeature
from petl.training.runs.settings import no_class

if TYPE_CHECKING:
    from petl.training.dataloader import TrainingRows
    from petl.training.runs.run_config import RunConfig

SHOWN = 8  # weights that a line names
logger = logging.getLogger(__name__)


class ClassWeights(RunFeature):
    """Computes the loss of training with a weight for each class."""

    key = "class_weights"
    found: Sequence[float] = ()  # by class, once the rows are known

    def check(self, config: "RunConfig") -> None:
        """Raise InputError if rows are drawn by class as well: rare ones would count twice."""
        if self.settings == BALANCED and self.groups["data"].get("sampling") == BALANCED:
            raise InputError(
                f"train.class_weights={BALANCED} and data.sampling={BALANCED} each let all classes "
                "count alike; both let rare ones count more than frequent ones: leave one out"
            )

    def order(self, rows: "TrainingRows") -> "TrainingRows":
        """Check the weights before a model is loaded."""
        self.found = self.weights(rows.task, rows.train)
        return rows

    def weights(self, task: Task, train: object) -> list[float]:
        """Return the weight of each class.

        Raises:
            InputError: the task has no classes, or a weight is of none of them.
        """
        given = f"train.class_weights={self.settings}"
        if not isinstance(task, ClassTask) or isinstance(task, MultitaskClassification):
            raise InputError(
                f"{given} is for tasks with classes, and data.task={task.name} has none of its own"
            )
        if self.settings != BALANCED:
            return given_weights(self.settings, task.classes)
        if isinstance(train, Dataset):
            return balanced(task, train)
        raise InputError(
            f"{given} counts the labels of all rows, which data.streaming=true does not read "
            "in advance: give the weights, train.class_weights={NAME: WEIGHT}"
        )

    def before_training(self, context: Context) -> None:
        """Replace the loss of the model for the labels of training."""
        task = context.splits.task
        assert isinstance(task, ClassTask), "weights() refuses others"
        named = dict(zip(task.classes, (round(w, 4) for w in self.found), strict=True))
        shown = sorted(named.items(), key=lambda item: -item[1])[:SHOWN]
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        listed = ", ".join(f"{name} {weight:g}" for name, weight in shown)
        logger.info("weights of classes in the loss: %s%s", listed, more)
        if self.key not in context.run.scores:
            context.run.scores.add({self.key: named})
        weigh(
            base_of(context.model), torch.tensor(self.found), several=isinstance(task, MultiLabel)
        )


def given_weights(given: Mapping[str, float], classes: list[str]) -> list[float]:
    """Return the weights of a mapping by class, 1 for others.

    Raises:
        InputError: it has a name that is no class.
    """
    found = {str(name): float(weight) for name, weight in given.items()}
    unknown = next((name for name in found if name not in classes), None)
    if unknown is not None:
        raise no_class(unknown, classes)
    return [found.get(name, 1.0) for name in classes]


def balanced(task: ClassTask, rows: Dataset) -> list[float]:
    """Return the weights by which all classes count alike; 1 for one that does not occur."""
    counts = [task.label_counts(rows).get(name, 0) for name in task.classes]
    if isinstance(task, MultiLabel):
        return [(len(rows) - n) / n if 0 < n < len(rows) else 1.0 for n in counts]
    return [sum(counts) / (len(counts) * n) if n else 1.0 for n in counts]


def weigh(model: nn.Module, weights: Tensor, *, several: bool) -> None:
    """Let a model compute its loss with weights of classes.

    Args:
        weights: [C].
        several: True if a row has any number of classes.
    """
    loss_of = several_loss if several else single_loss

    def replaced(
        model: nn.Module, args: tuple[object, ...], inputs: Mapping[str, Tensor], outputs: Any
    ) -> Any:
        labels = inputs.get("labels")
        if labels is not None:
            own = weights.to(outputs.logits.device)
            outputs.loss = loss_of(outputs.logits.float(), labels, own)
        return outputs

    # before the hooks that add auxiliary losses to it
    model.register_forward_hook(replaced, with_kwargs=True, prepend=True)


def single_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean weighted cross-entropy of the labels, from logits [..., C]."""
    logits, labels = logits.flatten(0, -2), labels.flatten()
    total = F.cross_entropy(logits, labels, weights, reduction="sum", ignore_index=IGNORED)
    return total / (labels != IGNORED).sum().clamp(min=1)


def several_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean binary cross-entropy with weights of the labels that have a class, logits [B, C]."""
    return F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weights)
