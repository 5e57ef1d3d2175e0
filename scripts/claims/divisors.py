"""The divisors q that pruning is compared with: unbiased, closed form, authors' bound, searched."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petl.adapters.deltas.adapters import Material, pruned, pruned_names
from petl.adapters.deltas.measured import (
    change_of_outputs,
    closed_divisors,
    live_name,
    searched_divisor,
    train_batches,
)
from petl.adapters.deltas.prune import analytic_q, divisor_of, spread_q
from petl.adapters.export.saved_adapter import SavedAdapter

KINDS = ("dare", "closed", "analytic", "searched")
# The published values of eta belong to sums in half precision (see petl.adapters.deltas.prune): the
# eta whose outputs are nearest to the adapter's is taken, by the same measure as in the search of
# q.
ETAS = (0.01, 0.1, 1.0, 10.0)
TOKENS = 8  # calibration inputs per layer for the bound, evenly from those of the train rows

Divisors = float | Mapping[str, float] | None


def divisors(
    saved: SavedAdapter, material: Material, drop: float, kind: str, seed: int
) -> tuple[Divisors, dict[str, Any]]:
    """Return q and what is worth recording of it.

    Args:
        kind: one of KINDS.
        seed: of the masks.
    """
    facts: dict[str, Any] = {}
    q: Divisors = None
    if kind == "closed":
        q = closed_divisors(saved, material, drop)
    elif kind == "searched":
        q = searched_divisor(saved, material, drop, seed=seed).q
    elif kind == "analytic":
        q, facts["eta"] = analytic_divisors(saved, material, drop, seed)
    used = [divisor_of(q, name, drop) for name in pruned_names(material)]
    return q, facts | {"q": sum(used) / len(used), "q_low": min(used), "q_high": max(used)}


def analytic_divisors(
    saved: SavedAdapter, material: Material, drop: float, seed: int
) -> tuple[dict[str, float], float]:
    """Return the divisors of the authors' bound, and the eta of ETAS that moves outputs least."""
    names = pruned_names(material)
    found = products(saved, material)
    change = change_of_outputs(saved, material)
    best: tuple[float, dict[str, float], float] | None = None
    for eta in ETAS:
        own = {name: float(analytic_q(c, drop, eta=eta).mean()) for name, c in found.items()}
        q = spread_q(names, own)
        moved = change(pruned(material, drop, q=q, seed=seed))
        if best is None or moved < best[0]:
            best = moved, q, eta
    assert best is not None
    return best[1:]


@torch.no_grad()
def products(saved: SavedAdapter, material: Material) -> dict[str, Tensor]:
    """Return delta_ji x_i of each pruned linear layer, [tokens O, I]: S and V are of each token."""
    live = {live_name(name): name for name in pruned_names(material)}
    model, inputs = saved.model(), {}

    def keep(key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.setdefault(key, []).append(args[0][current["attention_mask"].bool()])

        return hook

    hooks = [
        module.register_forward_hook(keep(live[f"{name}.weight"]))
        for name, module in model.named_modules()
        if f"{name}.weight" in live and isinstance(module, nn.Linear)
    ]
    for current in train_batches(saved):
        model(**current)
    for handle in hooks:
        handle.remove()
    found = {}
    for name, parts in inputs.items():
        x = torch.cat(parts)
        x = x[torch.linspace(0, len(x) - 1, TOKENS).long()]
        found[name] = (x[:, None] * material.state[name]).flatten(0, 1)
    return found
