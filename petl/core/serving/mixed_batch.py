"""Mixed batches, in which each row has an adapter of its own.

Shapes: N rows, T tokens of each, I in, O out, G groups of n rows.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

GENERATION = {"generation_config", "max_new_tokens", "max_length", "do_sample", "num_beams"}
GATHERING = 0.2  # taking a token to its group and back, over reading what an adapter has of a layer
BatchedAdapter = Callable[
    [Tensor, Tensor], Tensor
]  # of x [G, n T, I] and y [G, n T, O], to y adapted


class Groups(NamedTuple):
    """The rows of a batch put side by side by adapter, so that adapters are computed at once.

    Attributes:
        names: of the groups' adapters, [G]; one that has many rows may have several groups.
        take: the rows in the order of the groups, [G n]; a place that is left over has any row.
            None: they lie so already.
        back: the places of those rows that have an adapter.
        rows: these rows; None: all have one.
    """

    names: Sequence[str]
    take: Tensor | None
    back: Tensor
    rows: Tensor | None


def group_size(rows_of: Mapping[str, Sequence[int]], tokens: int) -> int:
    """How many rows a group should have.

    If it is one, what an adapter holds is read for each row; the more there are, the less often it
    is read, but rows are carried about, and groups that are not full compute for nothing.

    Args:
        rows_of: the rows of each adapter.
        tokens: of a row.
    """
    most = max(map(len, rows_of.values()))

    def cost(n: int) -> float:
        groups = sum(-(-len(rows) // n) for rows in rows_of.values())
        return groups * (1 + GATHERING * n * tokens if n > 1 else 1)

    return min((*(2**i for i in range(most.bit_length())), most), key=cost)


def grouped(rows_of: Mapping[str, Sequence[int]], count: int, n: int) -> Groups:
    """The rows of each adapter in groups of `n`, of a batch of `count` rows."""
    groups = sorted(
        (rows[i : i + n], name) for name, rows in rows_of.items() for i in range(0, len(rows), n)
    )
    filled = [row for rows, _ in groups for row in (*rows, *[rows[0]] * (n - len(rows)))]
    place = {row: i for i, row in reversed([*enumerate(filled)])}
    present = sorted(place)
    return Groups(
        names=[name for _, name in groups],
        take=None if filled == [*range(count)] else torch.tensor(filled),
        back=torch.tensor([place[row] for row in present]),
        rows=None if len(present) == count else torch.tensor(present),
    )


class PreparedBatch(NamedTuple):
    """What computes a layer's rows at once."""

    groups: Groups
    batched: BatchedAdapter

    def compute(self, x: Tensor, y: Tensor, *, is_own: bool) -> Tensor:
        """`y` [N, ..., O], of which each row went through its adapter.

        Args:
            x: [N, ..., I].
            is_own: `y` is nobody else's, and may be written to.
        """
        _, take, back, rows = self.groups
        if take is None:
            return self._by_group(x, y if is_own else y.clone())
        out = self._by_group(x.index_select(0, take), y.index_select(0, take))
        out = out.index_select(0, back)
        return out if rows is None else y.index_copy(0, rows, out)

    def _by_group(self, x: Tensor, y: Tensor) -> Tensor:
        G = len(self.groups.names)
        out = self.batched(x.reshape(G, -1, x.shape[-1]), y.reshape(G, -1, y.shape[-1]))
        return out.view(y.shape)


class CachedKernel(NamedTuple):
    """What a layer's rows of so many tokens were computed by; None: adapter by adapter."""

    tokens: int
    dtype: torch.dtype
    prepared: PreparedBatch | None


def is_generation_call(arguments: Container[str]) -> bool:
    """Whether a call of a model with these arguments is seen to generate; there may be no sign."""
    return any(name in arguments for name in GENERATION)


class AdapterRows(list[str]):
    """The adapters of a batch's rows during one call of the model.

    A call that generates runs each layer once a token. What a layer has put together for its rows
    is kept here while that lasts, which takes as much memory again as these adapters do.

    Attributes:
        distinct: the names, each once.
        generates: whether the call is known to generate; otherwise a layer's second turn shows it.
    """

    def __init__(self, names: Sequence[str], *, is_generation_call: bool = False) -> None:
        super().__init__(names)
        self.distinct = list(dict.fromkeys(names))
        self.is_generation_call = is_generation_call
        self._groups: dict[tuple[frozenset[str], int, torch.device], Groups] = {}
        self._kept: dict[nn.Module, CachedKernel | None] = {}

    @classmethod
    def of(cls, names: Sequence[str]) -> "AdapterRows":
        """The names themselves, if they are `AdapterRows`."""
        return names if isinstance(names, AdapterRows) else cls(names)

    def prepared(
        self,
        layer: nn.Module,
        x: Tensor,
        adapters: Container[str],
        made: Callable[[Sequence[str], torch.dtype], BatchedAdapter | None],
    ) -> PreparedBatch | None:
        """What computes the rows of a layer at once.

        Args:
            x: the layer's input, [N, ..., I].
            adapters: names of those that the layer has; rows of others are left as they are.
            made: called with the adapter of each group and the dtype of x. What it answers is for
                inference, and for this call of the model alone.

        Returns:
            None where each adapter computes its own rows: gradients are needed, or `made` says so.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        tokens, kept = x[0, ..., 0].numel(), self._kept.get(layer)
        if kept is not None and (kept.tokens, kept.dtype) == (tokens, x.dtype):
            return kept.prepared
        prepared, groups = None, self._grouped(adapters, tokens, x.device)
        if groups is not None:
            prepared = kept.prepared if kept is not None and kept.dtype == x.dtype else None
            if prepared is None or prepared.groups is not groups:
                batched = made(groups.names, x.dtype)
                prepared = None if batched is None else PreparedBatch(groups, batched)
        keeps = self.is_generation_call or layer in self._kept
        self._kept[layer] = CachedKernel(tokens, x.dtype, prepared) if keeps else None
        return prepared

    def _grouped(
        self, adapters: Container[str], tokens: int, device: torch.device
    ) -> Groups | None:
        """The groups of those rows that have an adapter here, if any; the same for all layers."""
        here = frozenset(name for name in self.distinct if name in adapters)
        if not here:
            return None
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(self):
            if name in here:
                rows_of.setdefault(name, []).append(row)
        n = group_size(rows_of, tokens)
        key = here, n, device
        if key not in self._groups:
            with torch.device(device):
                self._groups[key] = grouped(rows_of, len(self), n)
        return self._groups[key]
