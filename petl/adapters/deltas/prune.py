"""DARE and DAREx: drop entries of a delta at random and divide the others by q.

Sources: Yu et al., "Language Models are Super Mario", arXiv 2311.03099 (DARE: q = 1 - p, unbiased);
Deng, Zhao, Vakilian, Chen, Li, Thrampoulidis, "DARE the Extreme: Revisiting Delta-Parameter Pruning
For Fine-Tuned Models", ICLR 2025, arXiv 2410.09344 (DAREx: a larger q, a little bias for much less
variance). The closed form of q is our own derivation.

Symbols: p the fraction dropped; for output j of a linear layer and input x, c_ji = delta_ji x_i,
S_j = sum_i c_ji and V_j = sum_i c_ji^2. The pruned output has bias S ((1 - p) / q - 1) and variance
p (1 - p) V / q^2.

Where the sources disagree: the published scan sums in half precision, where ln 40 has steps of
0.002, so that its search ends at once, and it begins below 1 - p. Here it is in float64 and begins
at 1 - p; the published values of eta belong to the former and do not carry over.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl.adapters.deltas.states import DROPPED, SHARE, coded_names
from petl.core.masks import without_padding
from petl.core.model.modes import calibration_pass
from petl.errors import InputError, shown
from petl.ops.ternary import State

Q = float | Mapping[str, float] | None
STEP = 0.001  # of the analytic scan, as published
LAST = 0.998  # the last value of the scan
PATIENCE = 4  # worse values in a row after which a search ends, as published
GRID = 20  # steps of the default coarse grid (assumption)
logger = logging.getLogger(__name__)


def extract(tuned: State, base: State) -> dict[str, Tensor]:
    """Return the floating-point tensors of `tuned` less those of `base`, in float32 or wider.

    Raises:
        InputError: their names or shapes differ, or a tensor that is not of floating-point type.
    """
    _same_tensors(tuned, base)
    for name, tensor in tuned.items():
        if not tensor.is_floating_point() and not torch.equal(tensor, base[name]):
            raise InputError(f"{name} is not of floating-point type, and differs from the base's")
    wide = {n: torch.promote_types(t.dtype, torch.float32) for n, t in tuned.items()}
    return {
        name: tensor.to(wide[name]) - base[name].to(wide[name])
        for name, tensor in tuned.items()
        if tensor.is_floating_point()
    }


def apply(base: State, delta: State) -> dict[str, Tensor]:
    """Return `base` plus `delta`, in the dtypes of `base`.

    Raises:
        InputError: the delta has a tensor that the base lacks, or of another shape.
    """
    for name, tensor in delta.items():
        if name not in base or base[name].shape != tensor.shape:
            raise InputError(f"the base has no tensor {name} of shape {list(tensor.shape)}")
    return {
        name: (tensor + delta[name]).to(tensor.dtype) if name in delta else tensor
        for name, tensor in base.items()
    }


def _same_tensors(one: State, other: State) -> None:
    differing = sorted(one.keys() ^ other.keys())
    if differing:
        raise InputError(f"{differing[0]} is not in both states ({len(differing)} tensors are not)")
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            shapes = f"{list(tensor.shape)} and {list(other[name].shape)}"
            raise InputError(f"{name} has shapes {shapes} in the two states")


def prune(
    delta: State, drop: float, *, q: Q = None, seed: int = 0, exclude: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Set a random fraction of each tensor to 0 and divide the rest by q.

    The mask of a tensor depends on `seed` and its name alone: not on the order, the device or the
    process.

    Args:
        delta: tensors by name; those that are not of floating-point type are kept.
        drop: the fraction p set to 0, in [0, 1).
        q: in [1 - drop, 1], or by name; None: 1 - drop, the unbiased choice.
        exclude: regular expressions; tensors in whose name one is found are kept.

    Raises:
        InputError: an argument is out of range, or `q` lacks a name.
    """
    DROPPED.check("drop", drop, float)
    pruned = dict(delta)
    for name in coded_names(delta, exclude):
        divisor = divisor_of(q, name, drop)
        kept = mask(f"{seed} {name}", delta[name].shape, drop).to(delta[name].device)
        # float32: rounded once
        wide = delta[name].to(torch.promote_types(delta[name].dtype, torch.float32))
        pruned[name] = (wide * kept / divisor).to(delta[name].dtype)
    return pruned


def divisor_of(q: Q, name: str, drop: float) -> float:
    """Return the divisor of a tensor, checked."""
    if q is None:
        return 1 - drop
    if isinstance(q, Mapping) and name not in q:
        raise InputError(f"q has no value for {name}; petl.deltas.spread_q gives one to all")
    value = q[name] if isinstance(q, Mapping) else q
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # 1 - drop may have been computed in another order
    if not is_number or not 1 - drop - 1e-9 <= value <= 1:
        raise InputError(f"q={shown(value)} is not in [{1 - drop:g}, 1], which is [1 - drop, 1]")
    return float(value)


def mask(text: str, shape: torch.Size, drop: float) -> Tensor:
    """Return a random mask, True with probability 1 - drop, that follows from `text` alone."""
    digest = hashlib.sha256(text.encode()).digest()
    # 63 bits: torch's seeds are signed
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= drop


# The divisor


def closed_q(sum_S2: float, sum_V: float, drop: float) -> float:
    """Return the q of least expected squared error of a layer's outputs.

    q = (1 - p) + p sum V / sum S^2, at most 1; the sums are over outputs and calibration tokens.
    """
    DROPPED.check("drop", drop, float)
    return min(1.0, (1 - drop) + drop * sum_V / sum_S2) if sum_S2 > 0 else 1.0


def analytic_q(products: Tensor, drop: float, *, eta: float, stop: float = 0.8) -> Tensor:
    """Return, for each output, the q of the authors' bound.

    Of 1 - p, 1 - p + 0.001, ..., 0.998 the one at which |eta S (1 - (1 - p) / q) + eta^2 Phi V /
    (4 q^2) + ln 40| is least, the last among equals; Phi = (1 - 2p) / ln((1 - p) / p). The scan
    ends once a fraction `stop` of the outputs has had a value that is not below its best.

    Args:
        products: c, [O, I].
        drop: p, neither 0 nor 0.5, where Phi is not defined.

    Returns:
        [O], float64.
    """
    DROPPED.check("drop", drop, float)
    if drop in (0, 0.5):
        raise InputError(
            f"drop={drop:g}: the bound's Phi is not defined there; choose another drop in (0, 1)"
        )
    SHARE.check("stop", stop, float)
    S, V = products.double().sum(1), products.double().square().sum(1)
    phi = (1 - 2 * drop) / math.log((1 - drop) / drop)
    best = torch.full_like(S, math.inf)
    chosen, passed = torch.full_like(S, 1 - drop), torch.zeros_like(S, dtype=torch.bool)
    # 1e-9: the quotient may be just below an integer
    for step in range(math.floor((LAST - (1 - drop)) / STEP + 1e-9) + 1):
        q = 1 - drop + STEP * step
        value = (
            eta * S * (1 - (1 - drop) / q) + eta**2 * phi * V / (4 * q**2) + math.log(40)
        ).abs()
        passed |= value >= best
        better = value <= best
        best, chosen = torch.where(better, value, best), torch.where(better, q, chosen)
        if passed.double().mean() >= stop:
            break
    return chosen


def spread_q(names: Iterable[str], q: Mapping[str, float]) -> dict[str, float]:
    """Return a q for each name: its own; for a bias, that of its weight; else the mean of all."""
    if not q:
        raise InputError(f"q={shown(q)} has no value at all; give at least one tensor a divisor")
    mean = sum(q.values()) / len(q)
    weight_of = {f"{name.removesuffix('.weight')}.bias": value for name, value in q.items()}
    return {name: q.get(name, weight_of.get(name, mean)) for name in names}


def output_moments(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], delta: State
) -> dict[str, tuple[float, float]]:
    """Return, for each linear layer in a delta, the sums of S^2 and V over outputs and tokens.

    Args:
        model: run in evaluation mode, and left in the mode that it had.
        batches: inputs; positions with attention mask 0 do not count.
        delta: its keys are "<module>.weight".

    Returns:
        (sum S^2, sum V) by key of the delta, for keys of linear layers.
    """
    sums: dict[str, Tensor] = {}
    current: dict[str, Tensor] = {}

    def measure(key: str, weight: Tensor, column_squares: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            # [tokens, I]
            x = without_padding(args[0], current.get("attention_mask")).to(weight.dtype)
            S2 = (x @ weight.t()).square().sum(dtype=torch.float64)
            # sum_j c_ji^2 = x_i^2 sum_j delta_ji^2: no [tokens, O, I] is formed
            V = (x.square().sum(0).double() * column_squares).sum()
            sums[key] = sums.get(key, 0) + torch.stack([S2, V])

        return hook

    hooks = []
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if key in delta and isinstance(module, nn.Linear | Conv1D):
            weight = delta[key].t() if isinstance(module, Conv1D) else delta[key]  # [O, I]
            weight = weight.float().to(module.weight.device)
            measured = measure(key, weight, weight.double().square().sum(0))
            hooks.append(module.register_forward_hook(measured))
    with calibration_pass(model, hooks):
        for batch in batches:
            current = dict(batch)
            model(**batch)
    return {key: (float(S2), float(V)) for key, (S2, V) in sums.items()}


@dataclass(frozen=True)
class QResult:
    """The result of a search.

    Attributes:
        q: the best divisor.
        history: each divisor tried and its score, in order.
    """

    q: float
    history: list[tuple[float, float]]


def find_q(
    score: Callable[[float, int], float],
    drop: float,
    *,
    grid: Sequence[float] | None = None,
    fine: bool = True,
    seeds: Sequence[int] = (0,),
) -> QResult:
    """Search the divisor of the lowest score: on a coarse grid, then in tenths of its step.

    The coarse search ends once four divisors in a row are worse than the best.

    Args:
        score: of (q, seed of the masks); lower is better.
        drop: p; divisors are in [1 - p, 1].
        grid: ascending divisors; None: 21 from 1 - p to 1.
        fine: search on around the best one.
        seeds: each divisor's score is the mean over them; of more than two, the score furthest
            from the mean is left out.
    """
    DROPPED.check("drop", drop, float)
    if grid is None:
        grid = [1 - drop * k / GRID for k in range(GRID, -1, -1)]
    grid = [divisor_of(q, "", drop) for q in grid]
    if not grid or not seeds:
        raise InputError(
            f"grid has {len(grid)} divisors and seeds={list(seeds)!r}: find_q needs at least one "
            "of each"
        )
    history: list[tuple[float, float]] = []
    worse = 0
    for q in grid:
        value = _averaged([score(q, seed) for seed in seeds])
        worse = 0 if not history or value < min(v for _, v in history) else worse + 1
        history.append((q, value))
        if worse == PATIENCE:
            break
    best = _best(history)
    if len(grid) > 1 and best in (grid[0], grid[-1]):
        edge = "lowest" if best == grid[0] else "highest"
        logger.warning("the best divisor, %g, is the %s of the grid", best, edge)
    if fine and len(grid) > 1:
        at = grid.index(best)
        step = grid[at + 1] - best if at + 1 < len(grid) else best - grid[at - 1]
        for tenth in range(-9, 11):
            q = best + tenth * step / 10
            if tenth and 1 - drop <= q <= 1:
                history.append((q, _averaged([score(q, seed) for seed in seeds])))
    return QResult(_best(history), history)


def _best(history: Sequence[tuple[float, float]]) -> float:
    return min(history, key=lambda entry: entry[1])[0]


def _averaged(values: list[float]) -> float:
    """Return the mean; of more than two values, without the one furthest from their mean."""
    mean = sum(values) / len(values)
    if len(values) > 2:
        values = sorted(values, key=lambda value: abs(value - mean))[:-1]
    return sum(values) / len(values)
