"""MoLA adapters that train in one pass over one base, see `petl.train_together`.

Shapes: K adapters, T tokens of each, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.layers.grouped import GroupedLowRank, GroupedUpdate, StackedParameter
from petl.methods.mola.routing import top_k_gates


class GroupedMola(GroupedLowRank):
    """MoLA with linear routers, of one rank and as many experts in all adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        generators: Sequence[torch.Generator | None],
        adapters: Sequence[Any],
    ) -> None:
        super().__init__(base_layer, generators)
        self.adapters = tuple(adapters)
        # picks and probabilities of the routers, from `updates` to `finish` of a pass
        self.routed: tuple[Tensor, Tensor] | None = None
        names = ("lora_A", "lora_B", "router")
        self.A, self.B, self.router = (
            StackedParameter([getattr(a, n) for a in adapters]) for n in names
        )

    @property
    def stacks(self) -> Sequence[StackedParameter]:
        return self.A, self.B, self.router

    def rates(self) -> Sequence[float]:
        return [a.config.lora_dropout if a.training else 0.0 for a in self.adapters]

    def updates(self, x: Tensor) -> GroupedUpdate:
        K, T, _ = x.shape
        # float32, because close logits decide which experts are picked
        with torch.autocast(x.device.type, enabled=False):
            logit_KET = torch.bmm(self.router.leaf.float(), x.float().mT)
        # the tokens of all adapters as rows, whose memory layout is [E, K T]
        logit_RE = logit_KET.transpose(0, 1).flatten(1).t()
        # equal in all: `grouped` of the adapter makes this layer only then
        chosen = top_k_gates(logit_RE, self.adapters[0].config.top_k)
        gate, picked, prob = (each.view(K, T, -1) for each in chosen)
        self.routed = picked, prob
        return GroupedUpdate(self.A.leaf, self.B.leaf, [a.scale for a in self.adapters], gate)

    def finish(self, y: Tensor, x: Tensor, update: GroupedUpdate) -> Tensor:
        assert self.routed is not None
        rows, self.routed = zip(self.adapters, *self.routed, strict=True), None
        for adapter, picked_TE, prob_TE in rows:
            # y is of all adapters, but unchanged: backward gives each term to its own router
            y = adapter.balanced(y, picked_TE=picked_TE, prob_TE=prob_TE)
        return y
