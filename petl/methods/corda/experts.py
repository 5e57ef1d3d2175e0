"""Second moments of the inputs of stacked experts, and their layers as CorDA sees them.

A sample of an expert is the rows of a row of the batch that are routed to it, its real tokens only.
An expert that no calibration token meets takes the mean of all experts of its stack. Shapes: T
tokens of a pass, S rows (a token once for each of its experts), E experts, I in, O out, B rows of a
batch.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from petl.core.experts.forward import Update, UpdatedExperts
from petl.core.experts.layout import Routing, experts_of
from petl.core.experts.linears import paths_of_experts, stack_of
from petl.core.experts.proof import check_experts
from petl.core.layers.class_swap import restore_class, swap_class
from petl.ops.expert_linear import ExpertLinear
from petl.ops.grouped_experts import ExpertRows, grouped_linear


class Seen(NamedTuple):
    """Rows that an expert has read in a pass.

    Attributes:
        path: of its layer, see `petl.core.experts.linears`.
        x: [S, I].
        sample: [S], the row of the batch.
        rows: of the batch.
    """

    path: str
    x: Tensor
    sample: Tensor
    rows: int


Read = Callable[[Seen], None]
# the input [T, H] of a module as samples [B, T / B, H], and their mask
Samples = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]]


def expert_layers(model: nn.Module, stacks: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers of the experts of these stacks, by their paths; the model has none of them.

    Raises:
        ModuleKindError, UnsupportedError: as `check_experts`.
    """
    found: dict[str, nn.Module] = {}
    for stack in stacks:
        owner, _, name = stack.rpartition(".")
        module = model.get_submodule(owner)
        layout = check_experts(module, owner)
        for e, path in enumerate(paths_of_experts(stack, layout.count(module))):
            found[path] = ExpertLinear(
                module, name, e, transposed=layout.transposed, has_bias=layout.bias
            )
    return found


class ReadExperts(UpdatedExperts):
    """A module of experts that shows the rows of each expert while it computes."""

    computes_as_before: ClassVar[bool] = True
    reader: "Reader"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute as before."""
        x = args[0] if args else next(iter(kwargs.values()))
        updates = self.reader.updates(cast(nn.Module, self), x)
        return super().forward(*args, updates=updates, **kwargs)


class Reader:
    """Reads the inputs of the stacks of one module.

    Args:
        paths: of the layers of each stack, by its name, in the order of the experts.
        samples: see `Samples`.
        read: called with what each expert reads.
    """

    def __init__(self, paths: Mapping[str, list[str]], samples: Samples, read: Read) -> None:
        self.paths, self.samples, self.read = paths, samples, read

    def updates(self, module: nn.Module, x: Tensor) -> dict[str, Update]:
        """Return what is computed in the place of the stacks, for the module's input."""
        layout = experts_of(module)
        assert layout is not None
        copies = layout.count(module) if layout.routing is Routing.ALL else 1
        # of Llama 4 each token goes through all experts, those that are not its own as zeros
        x_BTI, mask = self.samples(module, x[: len(x) // copies])
        if layout.routing is Routing.SIZES:  # rows in an order that does not tell samples apart
            x_BTI, mask = x[None], None
        sample = torch.arange(len(x_BTI), device=x.device).repeat_interleave(x_BTI.shape[1])
        real = torch.ones_like(sample, dtype=torch.bool) if mask is None else mask.flatten().bool()

        def product(name: str, x: Tensor, rows: ExpertRows) -> Tensor:
            tokens = torch.arange(len(x), device=x.device) % len(sample)
            tokens = tokens if rows.tokens is None else rows.tokens
            kept = real[tokens] & (x.any(-1) if copies > 1 else True)
            # rows are sorted by expert
            for expert, span in rows.ranges():
                own = kept[span]
                seen = x[span][own], sample[tokens[span][own]]
                if len(seen[0]):
                    self.read(Seen(self.paths[name][expert], *seen, len(x_BTI)))
            bias = getattr(module, f"{name}_bias") if layout.bias else None
            weight = getattr(module, name)
            return grouped_linear(x, weight, rows, bias, transposed=layout.transposed)

        return {name: partial(product, name) for name in self.paths}


@contextmanager
def reading(layers: Mapping[str, nn.Module], samples: Samples, read: Read) -> Generator[None]:
    """Call `read` with the inputs of these layers of experts while the model runs."""
    owners: dict[nn.Module, dict[str, list[str]]] = {}
    for path, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            owners.setdefault(layer.owner[0], {}).setdefault(layer.name, []).append(path)
    # by class, so that hooks of the module see its input as before
    try:
        for module, paths in owners.items():
            swap_class(module, ReadExperts)
            vars(module)["reader"] = Reader(paths, samples, read)
        yield
    finally:
        for module in owners:
            restore_class(module, ReadExperts)


def scaled_rows(seen: Seen, norm: str) -> Tensor:
    """Return the rows divided by the maximum of their sample, at least float32; see `scaled`."""
    x = seen.x.to(torch.promote_types(seen.x.dtype, torch.float32))
    if norm == "none":
        return x
    # as `scaled` does for a block of samples
    largest = _of_samples(x.abs().amax(1), seen, 0.0)
    if norm == "signed_max":
        signed = _of_samples(x.amax(1), seen, -torch.inf).abs()
        largest = torch.where((signed > 0) & (signed < torch.inf), signed, largest)
    divisor = torch.where(largest > 0, largest, 1.0)
    return x / divisor[seen.sample, None]


def _of_samples(values: Tensor, seen: Seen, start: float) -> Tensor:
    """Return the largest of the values [S] of each sample, [B]."""
    return values.new_full((seen.rows,), start).scatter_reduce(0, seen.sample, values, "amax")


def by_stack(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return paths of layers by that of their stack; a layer of its own stands for itself."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(stack_of(key), []).append(key)
    return found
