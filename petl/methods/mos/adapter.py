"""The pools of an adapter, and the factors that a layer makes of its shards.

Shapes: I in, O out, R rank, S shards per vector.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from petl.core.layers.context import num_processes
from petl.core.layers.layer import Adapter, Factors, LayerInfo, LayerShape
from petl.errors import UnsupportedError
from petl.methods.mos.config import MosConfig
from petl.methods.mos.draw import groups_of


class Pools(nn.Module):
    """The shards of all groups of an adapter: parameters `pool_A_<group>` and `pool_B_<group>`."""

    def __init__(self, config: MosConfig, shapes: Mapping[str, LayerShape]) -> None:
        super().__init__()
        shards = config.shards_per_vector
        for group, members in groups_of(shapes).items():
            I, O = shapes[members[0]]
            rows = config.equivalent_rank * len(members) * shards
            bound = I**-0.5  # Kaiming-uniform over the whole vector, not over a shard
            A = torch.empty(rows, I // shards, dtype=torch.float32).uniform_(-bound, bound)
            B = torch.zeros(rows, O // shards, dtype=torch.float32)
            if not config.init_weights:
                nn.init.normal_(B, std=0.02)
            self.register_parameter(f"pool_A_{group}", nn.Parameter(A))
            self.register_parameter(f"pool_B_{group}", nn.Parameter(B))


class MosAdapter(Adapter):
    """Which shards a layer uses: buffers `index_A` and `index_B`, int32 [R S]."""

    index_A: Tensor
    index_B: Tensor

    def __init__(self, shape: LayerShape, config: MosConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        self.group: str = info.settings["group"]
        self.register_buffer("index_A", info.settings["index_A"])
        self.register_buffer("index_B", info.settings["index_B"])

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """The shards of its group, for A and for B."""
        A, B = (getattr(self.info.shared, f"pool_{side}_{self.group}") for side in "AB")
        return A, B

    @property
    def trains(self) -> bool:
        """Whether these shards have a gradient."""
        return all(pool.requires_grad for pool in self.pools)

    def factors(self) -> Factors:
        context = self.info.context
        if context.recording and not torch.is_grad_enabled():
            if num_processes() > 1:
                raise UnsupportedError(
                    "method 'mos' cannot run under reentrant checkpointing in several processes: "
                    "the pools' gradients would be reduced before they are complete; pass "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            with torch.enable_grad():
                context.state.clear()  # segments have backward passes of their own: share nothing
        (A, B), R = self.pools, self.config.r
        return self.of(gather(A, self.index_A, R), gather(B, self.index_B, R))

    def of(self, A: Tensor, B: Tensor) -> Factors:
        """The update of these vectors, [R, I] and [R, O]."""
        return Factors(A, B.t(), self.config.lora_alpha / self.config.r)

    def plain_factors(self) -> Factors | None:
        """Those that were gathered for all layers of the group, where they were and still hold."""
        shared = None
        if not torch.compiler.is_compiling():
            shared = self.info.context.state.get((self.info.adapter_name, self.info.key))
        if shared is None or shared.versions != versions(self.pools):
            return super().plain_factors()
        return shared.factors

    @property
    def drop_rate(self) -> float:
        return self.config.lora_dropout if self.training else 0.0


class Shared(NamedTuple):
    """The factors of a layer, which hold while the pools are of these versions."""

    factors: Factors
    versions: list[int]


def versions(pools: Sequence[Tensor]) -> list[int]:
    """How often each tensor has been written to."""
    return [pool._version for pool in pools]


def gather_all(placed: Mapping[str, Mapping[str, Adapter]], model: nn.Module, args: Any) -> None:
    """Forward pre-hook of the base model: gathers for all layers, before any is checkpointed.

    Args:
        placed: the layers' adapters, by adapter name and module path.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for by_path in placed.values():
        layers = cast(Sequence[MosAdapter], tuple(by_path.values()))
        if not layers[0].trains:  # one of many adapters that are not active
            continue
        groups: dict[str, list[MosAdapter]] = {}
        for layer in layers:
            groups.setdefault(layer.group, []).append(layer)
        for group in groups.values():
            gather_group(group)


def gather_group(layers: Sequence[MosAdapter]) -> None:
    """Leave each layer of a group its factors for this forward pass, all gathered at once.

    Where each gathers its own, backward makes a gradient of the whole pool for each. They still do
    if the pools do not train, or are not whole, or stand for something else (quantised, say).
    """
    first, pools = layers[0], layers[0].pools
    whole = type(first.info.shared) is Pools and all(type(pool) is nn.Parameter for pool in pools)
    devices = {tensor.device for tensor in (*pools, *(layer.index_A for layer in layers))}
    if not (first.trains and whole and len(devices) == 1):
        return
    rows = torch.cat([layer.index_A for layer in layers]), torch.cat([l.index_B for l in layers])
    A, B = (
        gather(pool, index, len(layers) * first.config.r).chunk(len(layers))
        for pool, index in zip(pools, rows, strict=True)
    )
    for layer, A_RI, B_RO in zip(layers, A, B, strict=True):
        shared = Shared(layer.of(A_RI, B_RO), versions(pools))
        layer.info.context.state[layer.info.adapter_name, layer.info.key] = shared


def gather(pool: Tensor, index: Tensor, rank: int) -> Tensor:
    """The vectors [R, S W] made of the rows `index` [R S] of a pool of shards of width W."""
    rows = pool.index_select(0, index.to(pool.device))
    return rows.view(rank, -1).to(index.device)  # a model may be spread over devices
