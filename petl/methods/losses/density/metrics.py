"""The fraction of active neurons on given batches."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from petl.core.types import Batch
from petl.methods.losses.density.modules import ActivationSites, Visit, register_hooks
from petl.methods.losses.density.ppl import total
from petl.methods.losses.density.tokens import Masks, active_fraction, inputs_of, rows_of


def active_fractions(
    run: Callable[[Batch], object],
    base: nn.Module,
    sites: ActivationSites,
    batches: Iterable[Batch],
    threshold: float,
    masks_of: Callable[[Batch], Masks],
) -> dict[str, float]:
    """The fraction of values with `|a| > threshold` by module, averaged over examples.

    Args:
        run: runs the model that `base` is in on a batch.
        batches: with several processes, each one passes its own part.
        masks_of: called with the inputs of `base`, returns the padding masks.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in sites.layers}  # sum, examples

    def visit(name: str, module: nn.Module, a: Tensor, *, inputs: Batch) -> Tensor:
        rows = rows_of(masks_of(inputs).get(sites.stack(name)), a)
        values = active_fraction(a, threshold, rows)
        # float64: sums over many tokens
        sums[name] += torch.stack([values.double().sum().cpu(), torch.tensor(float(len(values)))])
        return a  # the hooks replace values; here they stay

    with inputs_of(base) as inputs, hooked(base, sites, partial(visit, inputs=inputs)):
        for batch in batches:
            run(batch)
    summed = total(torch.stack(list(sums.values()))).tolist()  # over processes
    return {name: s / max(n, 1.0) for name, (s, n) in zip(sums, summed, strict=True)}


@contextmanager
def hooked(base: nn.Module, sites: ActivationSites, visit: Visit) -> Generator[None]:
    """Context with the hooks of `register_hooks`."""
    handles = register_hooks(base, sites, visit)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the batches with their tensors on the model's device."""
    device = next(model.parameters()).device
    for batch in batches:
        yield send_to_device(dict(batch), device)


def predicts_tokens(model: nn.Module) -> bool:
    """True if a model has a language-model head."""
    head = getattr(model, "get_output_embeddings", None)
    return head is not None and head() is not None


def mean(values: Iterable[float]) -> float:
    """The mean of at least one value."""
    numbers = list(values)
    return sum(numbers) / len(numbers)
