"""Which weights and heads are pruned: scores, groups, masks, and what they leave.

Shapes: I in, O out.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from petl.core.layers.layer import AdapterLayer, LayerShape, weight_of
from petl.core.model.structure import find_attention
from petl.core.spec.config import require
from petl.methods.dsee.adapter import DseeAdapter
from petl.methods.dsee.config import DseeConfig
from petl.methods.dsee.entries import SparseUpdate
from petl.ops.masks import count_kept, pack_mask, prune_smallest, unpack_mask
from petl.ops.positions import generator_of
from petl.system.collectives import num_processes, number, to_full

Placed = Mapping[str, tuple[AdapterLayer, DseeAdapter]]


class PrunedHeads(NamedTuple):
    """The heads of an attention sub-layer; paths are None for projections without an adapter.

    Attributes:
        query, key, value, output: paths of the projections.
        width: entries of a head.
        per_group: query heads that share one head of key and value.
        to_prune: number of query heads to prune.
    """

    query: str | None
    key: str | None
    value: str | None
    output: str
    width: int
    per_group: int
    to_prune: int


def heads_of(
    config: DseeConfig, model: nn.Module, shapes: Mapping[str, LayerShape], targets: set[str]
) -> list[PrunedHeads]:
    """Return the attention sub-layers whose heads are pruned; none if `prune_heads` is 0.

    Args:
        config: the method's.
        model: the base model.
        shapes: of all adapted modules, by path.
        targets: paths of those with an update.

    Raises:
        InputError: heads cannot be pruned with these fields.
    """
    count, found = config.prune_heads, []
    for each in find_attention(model) if count else ():
        scored = [path for path in (each.query, each.value) if path in targets]
        if not scored:
            continue
        require(
            each.output in shapes,
            f"prune_heads={count} drops heads at the columns of {each.output}, which is adapted by "
            "neither target_modules nor prune_modules; add it to prune_modules",
        )
        width = each.head_width
        require(width is not None, f"prune_heads={count}: the heads of {scored[0]} are not known")
        assert width is not None
        total = shapes[each.output].in_features // width
        # with grouped keys, these projections have fewer heads than the query
        grouped = next((p for p in (each.value, each.key) if p is not None and p in shapes), None)
        groups = total if grouped is None else shapes[grouped].out_features // width
        require(
            count < total,
            f"prune_heads={count} is not below {total}, the number of heads of {scored[0]}",
        )
        require(
            count % (total // groups) == 0,
            f"prune_heads={count} is not a multiple of {total // groups}, the number of heads of "
            f"{scored[0]} that share a key and a value and are pruned together",
        )
        adapted = [path if path in shapes else None for path in each[:3]]
        found.append(PrunedHeads(*adapted, each.output, width, total // groups, count))
    require(
        bool(found) or not count,
        f"prune_heads={count} needs attention with a query or value projection of its own among "
        f"target_modules, and there is none in {type(model).__name__}",
    )
    return found


class Pruning:
    """Computes new masks for the layers of an adapter; the model is not changed before `apply`.

    With several processes rank 0 computes; sharded weights are put together one at a time, for
    which all processes call it.

    Attributes:
        masks: the packed masks by path, so far.
    """

    def __init__(self, config: DseeConfig, placed: Placed, heads: list[PrunedHeads]) -> None:
        self.config, self.placed, self.heads = config, placed, heads
        self.masks = {key: adapter.mask.clone() for key, (_, adapter) in placed.items()}
        tensors = [t for layer, a in placed.values() for t in (weight_of(layer), *a.parameters())]
        self.is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors)

    @torch.no_grad()
    def apply(self) -> None:
        """Compute the masks of heads, then of single weights, and give them to the adapters."""
        if self.is_sharded or number() == 0:
            for heads in self.heads:
                self._drop_heads(heads)
            targets = [key for key, (_, a) in self.placed.items() if a.is_target]
            others = [key for key in self.placed if key not in targets]
            self._drop_weights(targets, self.config.target_prune_ratio, self._target_score)
            self._drop_weights(others, self.config.prune_ratio, self._magnitude)
        for key, (_, adapter) in self.placed.items():
            if num_processes() > 1:
                distributed.broadcast(self.masks[key], src=0)
            adapter.set_mask(self.masks[key])

    # Single weights

    def _drop_weights(self, keys: list[str], ratio: float, score: Callable[[str], Tensor]) -> None:
        """Prune up to a share of the weights of a group; those that are 0 count."""
        size = sum(self.placed[key][1].size for key in keys)
        packed = [self.masks[key] for key in keys]
        zeros = size - sum(int(count_kept(mask)) for mask in packed)
        missing = max(0, round(ratio * size) - zeros)
        masks = prune_smallest(packed, lambda index: score(keys[index]), missing)
        self.masks |= dict(zip(keys, masks, strict=True))

    def _magnitude(self, key: str) -> Tensor:
        """Return |W| [O, I] in float32."""
        return to_full(weight_of(self.placed[key][0]).detach()).float().abs()

    def _target_score(self, key: str) -> Tensor:
        """Return the scores [O, I] of `prune_mode`, in float32."""
        mode, (layer, adapter) = self.config.prune_mode, self.placed[key]
        if mode == "weight":
            return self._magnitude(key)
        if mode == "random":
            generator = generator_of(self.config.init_seed, f"{key} scores")
            return torch.rand(adapter.size, generator=generator).to(adapter.mask.device)
        if mode == "delta":
            return self._delta(key).abs()
        return (to_full(weight_of(layer).detach()).float() + self._delta(key)).abs()

    def _delta(self, key: str) -> Tensor:
        """Return D [O, I] in float32."""
        update = self.placed[key][1].update
        assert update is not None
        A, B, values = (to_full(t.detach()).float() for t in update[:3])
        # autocast would round the scores to half precision
        with torch.autocast(A.device.type, enabled=False):
            return SparseUpdate(A, B, values, *update[3:]).dense()

    # Heads

    def _drop_heads(self, heads: PrunedHeads) -> None:
        """Prune the heads of smallest score: rows of the projections, columns behind them."""
        width, group = heads.width, heads.per_group * heads.width
        output = self.placed[heads.output][1]
        keep_OI = self._kept(heads.output)
        # [groups]: sums over the rows of a group of query heads, and of its head of the values
        scores = torch.zeros(output.shape.in_features // group)
        for key, rows in ((heads.query, group), (heads.value, width)):
            if key is not None and self.placed[key][1].is_target:
                scores += self._delta(key).abs().sum(1).view(-1, rows).sum(1).cpu()
        # pruned before: these count first
        gone = ~keep_OI.any(0).view(-1, group).any(1).cpu()
        order = torch.where(gone, -1.0, scores).argsort(stable=True)
        for index in order[: heads.to_prune // heads.per_group].tolist():
            keep_OI[:, index * group : (index + 1) * group] = False
            self._drop_rows(heads.query, index * group, group)
            self._drop_rows(heads.key, index * width, width)
            self._drop_rows(heads.value, index * width, width)
        self.masks[heads.output] = pack_mask(keep_OI)

    def _drop_rows(self, key: str | None, start: int, count: int) -> None:
        if key is not None:
            keep_OI = self._kept(key)
            keep_OI[start : start + count] = False
            self.masks[key] = pack_mask(keep_OI)

    def _kept(self, key: str) -> Tensor:
        """Return a copy of the mask so far, [O, I], as bools."""
        into, out = self.placed[key][1].shape
        return unpack_mask(self.masks[key], (out, into)).clone()


def moves(placed: Placed) -> bool:
    """Return True if the update of a layer is not 0 everywhere."""
    found = False
    for _, adapter in placed.values():
        if adapter.is_target:
            # all processes take part, whatever the first layers have
            B, values = to_full(adapter.lora_B.detach()), to_full(adapter.values.detach())
            found |= bool(B.any()) or bool(values.any())
    return found


def sparsity(placed: Placed) -> dict[str, float]:
    """Return the shares of zeros, by group and of all masked weights, and bytes of the weights.

    `packed_bytes` are those of the weights that are not 0, of one bit for each weight, and of the
    trained tensors and positions; `dense_bytes` are those of the weights.
    """
    groups: dict[str, list[tuple[int, int]]] = {"target": [], "prune_modules": []}
    packed = dense = 0
    for layer, adapter in placed.values():
        groups["target" if adapter.is_target else "prune_modules"].append(
            (adapter.pruned, adapter.size)
        )
        item = weight_of(layer).element_size()
        dense += item * adapter.size
        packed += item * (adapter.size - adapter.pruned) + adapter.mask.numel()
        packed += sum(p.numel() * p.element_size() for p in adapter.parameters())
        packed += adapter.indices.nbytes if adapter.is_target else 0
    figures = {f"{name}_sparsity": _share(entries) for name, entries in groups.items() if entries}
    everything = [entry for entries in groups.values() for entry in entries]
    sizes = {"packed_bytes": packed, "dense_bytes": dense}
    return {"sparsity": _share(everything), **figures, **sizes}


def _share(entries: list[tuple[int, int]]) -> float:
    return sum(pruned for pruned, _ in entries) / max(1, sum(size for _, size in entries))
