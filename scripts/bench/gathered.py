"""Section `gathered`: a down projection that reads the weights of active neurons alone.

An inactive neuron adds nothing to the output of an MLP, so that its row of the transposed weight
[neurons, out] need not be read. For one token at a time, as in decoding, reading the weight is most
of the work. Two ways are timed against the product with all rows: `index_select` copies the rows of
the neurons that are active in any token, for one smaller product; `embedding_bag` sums the weighted
rows of each token without a copy. Both look for the active neurons each time.

The weights of several blocks are used in turn, as in a pass over a model, so that they come from
memory. petl does not leave out neurons itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.clocks import in_turn
from bench.records import Record

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
TOKENS = (1, 8)
TOLERANCE = 1e-5  # of results, relative to the largest value
ALL = " / all rows"


@dataclass(frozen=True)
class Down:
    """The down projections of a model, [out, neurons] each, in float32.

    Attributes:
        blocks: their number; enough to exceed the caches.
    """

    name: str
    out: int
    neurons: int
    blocks: int


DOWNS = (Down("SmolLM2-135M", 576, 1536, 30), Down("7 B", 4096, 11008, 3))


def measure(rounds: int, downs: Sequence[Down] = DOWNS) -> list[Record]:
    """Return a record for each model, number of tokens and density."""
    return [record for down in downs for record in _records(down, rounds)]


@torch.no_grad()
def _records(down: Down, rounds: int) -> list[Record]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(down.neurons, down.out, generator=generator) for _ in range(down.blocks)]
    weights = [each.T.contiguous() for each in rows]  # as in nn.Linear
    records = []
    for tokens in TOKENS:
        for density in DENSITIES:
            values = [drawn(tokens, down.neurons, density, generator) for _ in rows]
            whole = partial(each_block, F.linear, values, weights)
            steps = {
                f"{name}{ALL}": partial(each_block, product, values, rows)
                for name, product in PRODUCTS.items()
            }
            times = in_turn(whole, steps, rounds=rounds, warm_up=1, device="cpu")
            read = sum((x != 0).any(0).float().mean().item() for x in values) / down.blocks
            first = next(iter(steps))
            seconds = times.median(first) / times.over_floor(first).median
            records.append(
                Record(
                    "gathered",
                    f"{down.name}, {down.out} x {down.neurons}, tokens: {tokens}",
                    f"density {density:g}",
                    failed=differing(whole(), {name: step() for name, step in steps.items()}),
                    ratios={name: times.over_floor(name) for name in steps},
                    facts={"read": read, "all rows ms": 1000 * seconds},
                )
            )
    return records


def each_block(
    product: Callable[[Tensor, Tensor], Tensor], values: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Return the product of the values and the weights of each block."""
    return [product(x, weight) for x, weight in zip(values, weights, strict=True)]


def drawn(tokens: int, neurons: int, density: float, generator: torch.Generator) -> Tensor:
    """Return values [tokens, neurons], of which each token has a random share that is not 0."""
    order = torch.rand(tokens, neurons, generator=generator).argsort(1)
    active = order < round(density * neurons)
    return active * (torch.rand(tokens, neurons, generator=generator) + 0.5)


def selected(x: Tensor, rows: Tensor) -> Tensor:
    """Return x @ rows by the rows of neurons that are active in any token."""
    active = (x != 0).any(0).nonzero().squeeze(1)
    return x.index_select(1, active) @ rows.index_select(0, active)


def summed(x: Tensor, rows: Tensor) -> Tensor:
    """Return x @ rows as the weighted sums of each token's rows."""
    tokens, active = x.nonzero(as_tuple=True)
    starts = torch.searchsorted(tokens, torch.arange(len(x)))
    return F.embedding_bag(active, rows, starts, mode="sum", per_sample_weights=x[tokens, active])


PRODUCTS = {"index_select": selected, "embedding_bag": summed}


def differing(whole: Sequence[Tensor], others: dict[str, list[Tensor]]) -> str:
    """Return which results differ from those with all rows; "" if none does."""
    largest = max(each.abs().max().item() for each in whole)
    gaps = {
        name: max((a - b).abs().max().item() for a, b in zip(whole, found, strict=True)) / largest
        for name, found in others.items()
    }
    found = [f"{name} by {gap:.2g}" for name, gap in gaps.items() if gap > TOLERANCE]
    return f"differs, relative to the largest value: {', '.join(found)}" if found else ""
