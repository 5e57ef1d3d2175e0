"""IncreLoRA adapters that train in one pass over one base, see `petl.train_together`."""

import torch
from torch import Tensor

from petl.core.layers.grouped import GroupedFactors, GroupedUpdate, each_alone, stacked_factors


class GroupedIncrelora(GroupedFactors):
    """IncreLoRA: components that grow, each adapter's on its own, and their scores."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # scores are of the dropped input, which the fused product does not have
        if any(adapter.is_scored and adapter.drop_rate > 0 for adapter in self.adapters):
            return each_alone(self, self.adapters, self.generators, x, args, kwargs)
        return super().forward(x, *args, **kwargs)

    def updates(self, x: Tensor) -> GroupedUpdate:
        self.current = [adapter.current_factors() for adapter in self.adapters]
        return stacked_factors(self.current)

    def finish(self, y: Tensor, x: Tensor, update: GroupedUpdate) -> Tensor:
        # let go here: they hold the graph of the pass
        factors, self.current = self.current, []
        if not any(adapter.is_scored for adapter in self.adapters):
            return y
        rows = zip(self.adapters, y, x, factors, strict=True)
        return torch.stack([adapter.with_score(*row) for adapter, *row in rows])
