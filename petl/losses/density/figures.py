"""How many neurons are active on given batches, and on which models that can be asked."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petl.losses.density.modules import Places, watch
from petl.losses.density.ppl import total
from petl.losses.density.tokens import Masks, inputs_of, rows_of, share_active

Batch = Mapping[str, Any]


def active_shares(
    run: Callable[[Batch], Any],
    base: nn.Module,
    places: Places,
    batches: Iterable[Batch],
    threshold: float,
    masks_of: Callable[[Batch], Masks],
) -> dict[str, float]:
    """By module, the share of values with `|a| > threshold`, averaged over samples.

    Args:
        run: puts a batch through the model that `base` is in.
        batches: with several processes, each one's share of them.
        masks_of: called with the inputs of `base`: which tokens count.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in places.layers}  # shares, samples

    def visit(name: str, module: nn.Module, a: Tensor, *, inputs: Batch) -> Tensor:
        rows = rows_of(masks_of(inputs).get(places.stack(name)), a)
        shares = share_active(a, threshold, rows)
        sums[name] += torch.stack([shares.double().sum().cpu(), torch.tensor(float(len(shares)))])
        return a

    with inputs_of(base) as inputs, watching(base, places, partial(visit, inputs=inputs)):
        for batch in batches:
            run(batch)
    summed = total(torch.stack(list(sums.values()))).tolist()
    return {name: s / max(n, 1.0) for name, (s, n) in zip(sums, summed, strict=True)}


@contextmanager
def watching(base: nn.Module, places: Places, visit: Any) -> Generator[None]:
    """Hooks for the time of a block; see `watch`."""
    handles = watch(base, places, visit)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode for the time of a block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[dict[str, Any]]:
    """The batches where the model is."""
    device = next(model.parameters()).device
    for batch in batches:
        yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def predicts_tokens(model: Any) -> bool:
    """Whether a model has a head that scores the tokens of its vocabulary."""
    head = getattr(model, "get_output_embeddings", None)
    return head is not None and head() is not None


def mean(values: Iterable[float]) -> float:
    """The mean of one value or more."""
    found = list(values)
    return sum(found) / len(found)
