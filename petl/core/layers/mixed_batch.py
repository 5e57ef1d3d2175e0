"""Mixed batches: each row of a batch goes through an adapter of its own (`adapter_names`).

Shapes: N rows, T tokens of each, I in, O out, G groups of n rows.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

# arguments of `generate` that a call of the model itself does not have
GENERATION = {"generation_config", "max_new_tokens", "max_length", "do_sample", "num_beams"}
# Cost of moving a token to its group and back, relative to reading an adapter's weights of a layer
# once; an assumption about its order of magnitude.
GATHERING = 0.2
# computes x [G, n T, I] and y [G, n T, O] to the adapted y
BatchedAdapter = Callable[[Tensor, Tensor], Tensor]

K = TypeVar("K")


class Groups(NamedTuple):
    """The rows of a batch sorted by adapter into groups of equal size.

    Attributes:
        names: the adapter, or the task, of each group, [G]; one with many rows may have several.
        take: the row of each place in the groups, [G n]; unfilled places repeat a row. None: the
            batch is in this order already.
        back: the places of the rows that have an adapter.
        rows: these rows; None: all rows have one.
    """

    names: Sequence[Any]
    take: Tensor | None
    back: Tensor
    rows: Tensor | None


def group_size(rows_of: Mapping[K, Sequence[int]], tokens: int) -> int:
    """Return the number of rows of a group that costs least.

    With one row per group, an adapter's weights are read once per row. Larger groups read them less
    often, but rows have to be copied, and places that are not filled are computed for nothing.

    Args:
        rows_of: the rows of each adapter.
        tokens: tokens of a row.
    """
    max_rows = max(map(len, rows_of.values()))

    def cost(n: int) -> float:
        # -(-a // b) rounds up: the last group of an adapter may be partly empty
        groups = sum(-(-len(rows) // n) for rows in rows_of.values())
        # in units of reading one adapter; groups of one row need no gather
        return groups * (1 + GATHERING * n * tokens if n > 1 else 1)

    # powers of two, and the size with which each adapter has a single group
    return min((*(2**i for i in range(max_rows.bit_length())), max_rows), key=cost)


def grouped(rows_of: Mapping[K, Sequence[int]], count: int, n: int) -> Groups:
    """Sort the rows of each adapter into groups of `n`, of a batch of `count` rows."""
    groups = sorted(  # by their first row, so that a batch in order needs no copy
        (rows[i : i + n], name) for name, rows in rows_of.items() for i in range(0, len(rows), n)
    )
    filled = [row for rows, _ in groups for row in (*rows, *[rows[0]] * (n - len(rows)))]
    place = {row: i for i, row in reversed([*enumerate(filled)])}  # the first place of each row
    present = sorted(place)
    return Groups(
        names=[name for _, name in groups],
        take=None if filled == [*range(count)] else torch.tensor(filled),
        back=torch.tensor([place[row] for row in present]),
        rows=None if len(present) == count else torch.tensor(present),
    )


class PreparedBatch(NamedTuple):
    """A layer's rows in groups, and the function that computes all groups together."""

    groups: Groups
    batched: BatchedAdapter

    def compute(self, x: Tensor, y: Tensor, *, is_own: bool) -> Tensor:
        """Return `y` [N, ..., O] after each row went through its adapter.

        Args:
            x: input of the layer, [N, ..., I].
            y: output of the base layer, [N, ..., O].
            is_own: no other code holds `y`, so it may be overwritten.
        """
        _, take, back, rows = self.groups
        if take is None:
            return self._by_group(x, y if is_own else y.clone())
        # new tensors, so the kernel may overwrite them
        out = self._by_group(x.index_select(0, take), y.index_select(0, take))
        out = out.index_select(0, back)
        # rows without an adapter keep the base layer's output
        return out if rows is None else y.index_copy(0, rows, out)

    def _by_group(self, x: Tensor, y: Tensor) -> Tensor:
        G = len(self.groups.names)
        out = self.batched(x.reshape(G, -1, x.shape[-1]), y.reshape(G, -1, y.shape[-1]))
        return out.view(y.shape)


class CachedKernel(NamedTuple):
    """The `PreparedBatch` of a layer for one input shape; None: adapter by adapter."""

    tokens: int
    dtype: torch.dtype
    prepared: PreparedBatch | None


def is_generation_call(arguments: Container[str]) -> bool:
    """Return True if the arguments show that `generate` made the call; False proves nothing."""
    return any(name in arguments for name in GENERATION)


class AdapterRows(list[str]):
    """The adapter names of a batch's rows during one call of the model, and a cache per layer.

    A call of `generate` runs each layer once per token. The stacked weights that a layer prepares
    are cached here during the call, which takes as much memory again as these adapters. One object
    may serve several calls as long as neither the rows nor the adapters change.

    Attributes:
        places: the rows of each name.
        distinct: the names without repetitions.
        is_generation_call: True if the call is known to be `generate`; otherwise a layer's second
            forward pass shows it.
    """

    def __init__(self, names: Sequence[str], *, is_generation_call: bool = False) -> None:
        super().__init__(names)
        self.places: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            self.places.setdefault(name, []).append(row)
        self.distinct = list(self.places)
        self.is_generation_call = is_generation_call
        self._repeated: dict[int, AdapterRows] = {}
        self._groups: dict[tuple[frozenset[str], int, torch.device], Groups] = {}
        # by layer; None: it ran once, and nothing is cached before it runs again
        self._cache: dict[nn.Module, CachedKernel | None] = {}

    @classmethod
    def of(cls, names: Sequence[str], *, is_generation_call: bool = False) -> "AdapterRows":
        """Return the names themselves if they are `AdapterRows`, else new ones."""
        if isinstance(names, AdapterRows):
            return names
        return cls(names, is_generation_call=is_generation_call)

    def repeated(self, times: int) -> "AdapterRows":
        """Return the names with each of them `times` times in a row, the same object each time."""
        if times not in self._repeated:
            names = [name for name in self for _ in range(times)]
            generates = self.is_generation_call
            self._repeated[times] = AdapterRows(names, is_generation_call=generates)
        return self._repeated[times]

    def prepared(
        self,
        layer: nn.Module,
        x: Tensor,
        adapters: Container[str],
        make: Callable[[Sequence[str], torch.dtype], BatchedAdapter | None],
    ) -> PreparedBatch | None:
        """Return what computes all rows of a layer together.

        Args:
            layer: key of the cache.
            x: the layer's input, [N, ..., I].
            adapters: names of the adapters that the layer has; rows of others stay unchanged.
            make: called with the adapter of each group and the dtype of x; returns a function for
                inference during this call of the model, or None.

        Returns:
            None if each adapter has to compute its own rows: gradients are needed, torch.compile is
            at work, no row has an adapter here, or `make` returned None.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        # tokens of a row: x may have several dimensions of them
        tokens, cached = x[0, ..., 0].numel(), self._cache.get(layer)
        if cached is not None and (cached.tokens, cached.dtype) == (tokens, x.dtype):
            return cached.prepared
        prepared, groups = None, self._grouped(adapters, tokens, x.device)
        if groups is not None:
            # another number of tokens often has the same groups, as the prompt and the tokens after
            prepared = cached.prepared if cached is not None and cached.dtype == x.dtype else None
            if prepared is None or prepared.groups is not groups:
                batched = make(groups.names, x.dtype)
                prepared = None if batched is None else PreparedBatch(groups, batched)
        is_repeated = self.is_generation_call or layer in self._cache
        self._cache[layer] = CachedKernel(tokens, x.dtype, prepared) if is_repeated else None
        return prepared

    def _grouped(
        self, adapters: Container[str], tokens: int, device: torch.device
    ) -> Groups | None:
        """Return the groups of the rows that have an adapter here, the same object for all layers.

        None if there are no such rows.
        """
        present = frozenset(name for name in self.distinct if name in adapters)
        if not present:
            return None
        rows_of = {name: rows for name, rows in self.places.items() if name in present}
        n = group_size(rows_of, tokens)
        # layers with the same adapters share the index tensors
        key = present, n, device
        if key not in self._groups:
            # the index tensors are created on the device of the input
            with torch.device(device):
                self._groups[key] = grouped(rows_of, len(self), n)
        return self._groups[key]


# Several adapters in one that computes all of them together. Shapes: G groups of rows, each with
# an adapter of its own, T tokens, W width.


def stacked(adapters: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """Return an adapter for inference on [G, T, ...] that computes group g by `adapters[g]`.

    Its tensors, and those of its pool, are [G, ...]; vectors [W] become [G, 1, W]. So the method's
    computation has to broadcast over the leading G.

    Args:
        adapters: of one class, with equal settings; an adapter may occur several times.
        dtype: of the stacked tensors; None: unchanged.

    Returns:
        The adapter, or None if their tensors differ in shape or name.
    """
    first = adapters[0]
    tensors = {adapter: adapter.tensors() for adapter in adapters}
    shapes = [{name: tensor.shape for name, tensor in own.items()} for own in tensors.values()]
    if any(other != shapes[0] for other in shapes):
        return None
    batched: dict[str, Tensor] = {
        name: _stack([tensors[adapter][name] for adapter in adapters], dtype) for name in shapes[0]
    }
    own = {name: value for name, value in batched.items() if "." not in name}
    pooled = {name.partition(".")[2]: t for name, t in batched.items() if "." in name}
    # quantized adapters have a swapped class, which would quantize the stacked tensors again
    cls = vars(type(first)).get("original", type(first))
    # no `__init__`, which would create parameters: the first adapter's attributes, new tensors
    stacked_adapter = cls.__new__(cls)
    vars(stacked_adapter).update(vars(first), _parameters={}, _buffers=own)
    shared = SimpleNamespace(**pooled) if pooled else None
    vars(stacked_adapter)["info"] = replace(first.info, shared=shared)
    return stacked_adapter


def _stack(tensors: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    batched = torch.stack(tensors)
    if dtype is not None and batched.is_floating_point():
        batched = batched.to(dtype)
    return batched.unsqueeze(1) if batched.dim() == 2 else batched


# Stacked weights, kept between calls of `generate` with equal rows


# of a tensor: where its values are, and the number of writes to them; then some sums of values
State = list[tuple[int, int] | float | None]


class KeptRows:
    """The rows of the last call of `generate`, with what its layers have stacked.

    They take as much memory again as the adapters of that call. They are used again while the rows
    are the same and nobody has written to these adapters, and forgotten when adapters train or are
    deleted. Of writes to `parameter.data`, those to a whole adapter are seen, as PEFT's hotswap
    makes them, and not those to single layers. A copy of the model starts without them.
    """

    def __init__(self) -> None:
        self.rows: AdapterRows | None = None
        self._state: State | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> "KeptRows":
        return KeptRows()

    def __reduce__(self) -> tuple[type["KeptRows"], tuple[()]]:
        return KeptRows, ()

    def of(
        self, hosts: Iterable[nn.Module], names: Sequence[str], *, is_generation_call: bool
    ) -> AdapterRows:
        """Return the rows of a call: those that are kept, if they are still right.

        Args:
            hosts: the modules with adapters, and shared tensors by adapter.
            names: the adapter of each row.
            is_generation_call: only then the rows are kept.
        """
        if isinstance(names, AdapterRows):  # kept by the caller
            return names
        if not is_generation_call:
            return AdapterRows(names)
        # cheap beside a call of `generate`: it reads pointers and counters, and few values
        state = state_of(hosts, dict.fromkeys(names))
        if state is None:
            return AdapterRows(names, is_generation_call=True)
        if self.rows is None or list(names) != list(self.rows) or state != self._state:
            self.rows, self._state = AdapterRows(names, is_generation_call=True), state
        return self.rows

    def forget(self) -> None:
        """Free what is kept."""
        self.rows = self._state = None


def state_of(hosts: Iterable[nn.Module], names: Iterable[str]) -> State | None:
    """Return what changes when an adapter of these names does; None: it cannot be known.

    That is so for sharded and other special tensors, and for those of inference mode, which do not
    count writes.
    """
    names, state = list(names), State()
    sums: dict[str, list[Tensor]] = {}  # by adapter, of its first layer
    for host in hosts:
        scaling = getattr(host, "scaling", None)
        if isinstance(scaling, dict):  # of PEFT's LoRA, a number that users may set
            state += [scaling.get(name) for name in names]
        read = set(sums)
        for name, module in _adapters_in(host, names):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_inference():
                    return None
                # `p.data = x` changes the first, a write the second, `p.data.copy_(x)` neither
                state.append((tensor.data_ptr(), tensor._version))
                if name not in read and tensor.is_floating_point():
                    total = tensor.detach().sum(dtype=torch.float64)
                    sums.setdefault(name, []).append(total)
    totals = [total for own in sums.values() for total in own]
    # one synchronization with the device
    return state + torch.stack([t.to(totals[0].device) for t in totals]).tolist() if sums else state


def _adapters_in(host: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the adapters of these names in the ModuleDicts of `host`, or in it."""
    for child in (host, *host.children()):
        if isinstance(child, nn.ModuleDict):
            for name in names:
                if name in child:
                    yield from ((name, module) for module in child[name].modules())
