"""Running statistics of a frozen base model, which adapters neither train nor save."""

import logging
from typing import Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from petl.core.compat import AuxiliaryTrainingWrapper
from petl.core.layers.class_swap import SwappedClass, swap_class

logger = logging.getLogger(__name__)


class KeptStatistics(SwappedClass, _BatchNorm):
    """Mixin for a batch norm that stays in evaluation mode unless its weight is trained.

    In training mode it would change its mean and variance, which no adapter file has: the adapter
    would compute something else on the base that it is loaded onto.
    """

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as far as it has a weight to train."""
        trains = any(parameter.requires_grad for parameter in self.parameters())
        return super().train(mode and trains)


def keep_statistics(base: nn.Module) -> None:
    """Let the frozen batch norms of a base model under adapters keep their running statistics."""
    trained = {
        id(module)
        for wrapper in base.modules()
        if isinstance(wrapper, AuxiliaryTrainingWrapper)
        for module in wrapper.modules()
    }
    found = [
        module
        for module in base.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and id(module) not in trained
    ]
    for module in found:
        swap_class(module, KeptStatistics)
        module.train(module.training)
    if found:
        logger.info("%d batch norms of the base keep their running statistics", len(found))
