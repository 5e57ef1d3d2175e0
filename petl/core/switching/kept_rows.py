"""Stacked weights of mixed batches, kept between calls of `generate` with equal rows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.serving.mixed_batch import AdapterRows

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

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptRows":
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
