"""The pools of an adapter, and the factors that a layer gathers from them.

Shapes: I in, O out, R rank, S shards per vector.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petl.core.layers.context import num_processes
from petl.core.layers.layer import Adapter, Factors, LayerInfo, LayerShape
from petl.errors import UnsupportedError
from petl.methods.mos.config import MosConfig
from petl.methods.mos.draw import groups_of
from petl.system.files.tensor_file import check_index


class Pools(nn.Module):
    """The shards of all groups of an adapter: parameters `pool_A_<group>` and `pool_B_<group>`."""

    def __init__(self, config: MosConfig, shapes: Mapping[str, LayerShape]) -> None:
        super().__init__()
        shards = config.shards_per_vector
        for group, members in groups_of(shapes).items():
            I, O = shapes[members[0]]
            rows = config.equivalent_rank * len(members) * shards  # E L S
            bound = I**-0.5  # Kaiming-uniform over the whole vector, not over a shard
            A = torch.empty(rows, I // shards, dtype=torch.float32).uniform_(-bound, bound)
            B = torch.zeros(rows, O // shards, dtype=torch.float32)
            if not config.init_weights:
                nn.init.normal_(B, std=0.02)
            self.register_parameter(f"pool_A_{group}", nn.Parameter(A))
            self.register_parameter(f"pool_B_{group}", nn.Parameter(B))


class MosAdapter(Adapter):
    """The shards of a layer: buffers `index_A` and `index_B`, int32 [R S], rows of the pools."""

    index_A: Tensor
    index_B: Tensor

    def __init__(self, shape: LayerShape, config: MosConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.config = config
        self.group: str = info.settings["group"]
        self.register_buffer("index_A", info.settings["index_A"])
        self.register_buffer("index_B", info.settings["index_B"])

    def check_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError unless the indices are rows of the pools."""
        for pool, name in zip(self.pools, ("index_A", "index_B"), strict=True):
            check_index(f"{self.info.key}: {name}", tensors[name], len(pool))

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """The pools of the layer's group, for A and for B."""
        A, B = (getattr(self.info.shared, f"pool_{side}_{self.group}") for side in "AB")
        return A, B

    @property
    def trains(self) -> bool:
        """True if the pools require gradients."""
        return all(pool.requires_grad for pool in self.pools)

    def factors(self) -> Factors:
        """Gather this layer's factors, A [R, I] and B [O, R], from the pools."""
        context = self.info.context
        # the first pass of reentrant checkpointing
        if context.recording and not torch.is_grad_enabled():
            if num_processes() > 1:
                raise UnsupportedError(
                    f"method 'mos' cannot run under reentrant checkpointing in {num_processes()} "
                    "processes: the pools' gradients would be reduced before they are complete; "
                    "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            with torch.enable_grad():
                context.state.clear()  # each segment has its own backward pass: share nothing
        (A, B), R = self.pools, self.config.r
        return self.of(gather(A, self.index_A, R), gather(B, self.index_B, R))

    def of(self, A: Tensor, B: Tensor) -> Factors:
        """The update with gathered vectors A [R, I] and B [R, O]."""
        return Factors(A, B.t(), self.config.lora_alpha / self.config.r)

    def plain_factors(self) -> Factors | None:
        """The factors gathered for all layers of the group, if there are any and they are valid."""
        gathered = None
        if not torch.compiler.is_compiling():
            gathered = self.info.context.state.get((self.info.adapter_name, self.info.key))
        if gathered is None or gathered.versions != versions(self.pools):
            return super().plain_factors()
        return gathered.factors

    @property
    def drop_rate(self) -> float:
        return self.config.lora_dropout if self.training else 0.0


class GatheredFactors(NamedTuple):
    """The factors of a layer, valid while the pools have these versions."""

    factors: Factors
    versions: list[int]


def versions(pools: Sequence[Tensor]) -> list[int]:
    """PyTorch's version counters: they increase with every in-place write."""
    return [pool._version for pool in pools]


def gather_all(
    placed: Mapping[str, Mapping[str, MosAdapter]], model: nn.Module, args: object
) -> None:
    """Forward pre-hook of the base model: gather for all layers, outside checkpointed segments.

    Args:
        placed: the layers' adapters, by adapter name and module path; it grows.
    """
    # without backward, gathering layer by layer costs nothing extra
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for by_path in placed.values():
        layers = tuple(by_path.values())
        if not layers[0].trains:  # an inactive adapter
            continue
        groups: dict[str, list[MosAdapter]] = {}
        for layer in layers:
            groups.setdefault(layer.group, []).append(layer)
        for group in groups.values():
            gather_group(group)


def gather_group(layers: Sequence[MosAdapter]) -> None:
    """Gather the factors of all layers of a group in one operation, for this forward pass.

    If each layer gathered its own, backward would allocate a gradient of the complete pool for each
    of them. Layers still do so if the pools do not train, are sharded or quantized, or if layers
    are on several devices.
    """
    first, pools = layers[0], layers[0].pools
    # other types: quantized pools have a swapped class, sharded ones are DTensors
    is_plain = type(first.info.shared) is Pools and all(type(p) is nn.Parameter for p in pools)
    devices = {tensor.device for tensor in (*pools, *(layer.index_A for layer in layers))}
    if not (first.trains and is_plain and len(devices) == 1):
        return
    # [L R S]
    rows = torch.cat([layer.index_A for layer in layers]), torch.cat([l.index_B for l in layers])
    A, B = (
        gather(pool, index, len(layers) * first.config.r).chunk(len(layers))
        for pool, index in zip(pools, rows, strict=True)
    )
    for layer, A_RI, B_RO in zip(layers, A, B, strict=True):
        gathered = GatheredFactors(layer.of(A_RI, B_RO), versions(pools))
        layer.info.context.state[layer.info.adapter_name, layer.info.key] = gathered


def gather(pool: Tensor, index: Tensor, rank: int) -> Tensor:
    """Gather the rows `index` [R S] of a pool of shards of width W, concatenated to [R, S W]."""
    rows = pool.index_select(0, index.to(pool.device))
    return rows.view(rank, -1).to(index.device)  # a model may be spread over devices
