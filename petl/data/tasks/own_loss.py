"""A model whose forward pass with labels returns the loss of a task, in place of its own.

Whatever computes `model(**batch).loss` then computes this loss: training, methods that look at
gradients before it, and plans of memory.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from petl.core.layers.class_swap import SwappedClass, swap_class, with_signature
from petl.core.types import Arguments
from petl.data.tasks.base import Task


class _OwnLoss(SwappedClass):
    """Mixin for a model of transformers.

    Attributes:
        loss_task: has the loss.
    """

    loss_task: Task

    @classmethod
    def extra_methods(cls, original: type[Any]) -> Arguments:
        """Forward, with the arguments of the model's own."""
        return {"forward": with_signature(cls.forward, original.forward)}

    def forward(self: Any, *args: object, **kwargs: Any) -> Any:
        names = [name for name in self.loss_task.label_columns if name in kwargs]
        labels: Mapping[str, Tensor] = {name: kwargs.pop(name) for name in names}
        # without labels, for which the model would compute a loss of its own
        outputs = super().forward(*args, **kwargs)
        if labels.get("labels") is not None:
            outputs["loss"] = self.loss_task.own_loss(outputs, labels)
        return outputs


def compute_loss_of(task: Task, model: PreTrainedModel) -> None:
    """Let a model compute the loss of a task that has one."""
    swap_class(model, _OwnLoss)
    swapped: Any = model
    swapped.loss_task = task
    # what changes how the loss of next tokens is computed recognizes it by this function
    swapped.loss_function = task.own_loss
