"""Combine states: task arithmetic, magnitude pruning, TIES and DARE.

Sources: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023; Yadav et al., "TIES-
Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708; Yu et al.,
"Language Models are Super Mario", arXiv 2311.03099 (DARE).

Where the sources disagree: PEFT's TIES trims each tensor and takes undecided signs for plus; the
authors' trims all tensors together and gives undecided signs to the majority. `scope` chooses what
is trimmed together, and undecided signs follow the authors.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from petl.adapters.deltas.prune import Q, divisor_of, mask
from petl.adapters.deltas.states import (
    SCOPES,
    SHARE,
    check_reference,
    coded_names,
    count_of,
    difference,
    largest,
)
from petl.errors import InputError, shown
from petl.ops.ternary import State, restored
from petl.system.values import one_of

METHODS = one_of("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
SIGNS, AGGREGATES = one_of("total", "frequency"), one_of("mean", "sum")


def combine(  # noqa: PLR0913
    states: Sequence[State],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    density: float = 1.0,
    q: Q = None,
    seed: int = 0,
    sign: str = "total",
    aggregate: str = "mean",
    scope: str = "global",
    reference: State | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Return one state from several of the same tensors.

    Args:
        states: at least two; each is taken as its difference tau from `reference`.
        method: "linear": sum w tau; "magnitude_prune": of the largest entries of each; "ties": of
            those that have the elected sign; "dare_linear" and "dare_ties": of random entries.
        weights: w, one to a state; None: 1.
        density: fraction of the entries of each state that is kept, in (0, 1].
        q: divisor of DARE, in [density, 1], or by name; None: `density`.
        seed: of DARE's masks, which differ between the states.
        sign: TIES elects the sign of the sum of tau ("total") or of the signs ("frequency").
        aggregate: TIES divides by the number of states that agree ("mean") or not ("sum").
        scope: entries are trimmed, and undecided signs decided, over all tensors together
            ("global") or in each ("tensor").
        reference: None: 0.
        exclude: regular expressions; tensors in whose name one is found are those of the first
            state, as are those that are not of floating-point type and equal in all.

    Returns:
        Tensors in the dtypes of the first state; computed in float32.

    Raises:
        InputError: an argument is out of range; the states differ in names, shapes or tensors that
            are not of floating-point type; a value is not finite.
    """
    METHODS.check("method", method, str)
    SIGNS.check("sign", sign, str)
    AGGREGATES.check("aggregate", aggregate, str)
    SCOPES.check("scope", scope, str)
    SHARE.check("density", density, float)
    if len(states) < 2:
        raise InputError(f"combining needs at least two states, and got {len(states)}")
    weights = [1.0] * len(states) if weights is None else list(weights)
    if len(weights) != len(states):
        raise InputError(f"weights={shown(weights)} are {len(weights)}, for {len(states)} states")
    if not all(map(math.isfinite, weights)):
        raise InputError(f"weights={shown(weights)} are not finite numbers")
    first, names = states[0], check_alike(states, exclude)
    check_reference(names, first, reference)
    combined: dict[str, Tensor] = {}
    for group in [names] if scope == "global" else [[name] for name in names]:
        # [state][tensor of the group], each flattened
        parts = [[difference(state, name, reference) for name in group] for state in states]
        if method.startswith("dare"):
            for i, own in enumerate(parts):
                for k, name in enumerate(group):
                    # `i` in the seed: states lose different entries
                    kept = mask(f"{seed} {i} {name}", own[k].shape, 1 - density).to(own[k].device)
                    own[k] = own[k] * kept / divisor_of(q, name, 1 - density)
        taus = [torch.cat(own) for own in parts]
        if method in ("magnitude_prune", "ties"):
            taus = [trimmed(tau, density) for tau in taus]
        ties = method.endswith("ties")
        tau = agreeing(taus, weights, sign, aggregate) if ties else weighted(taus, weights)
        for name, part in zip(group, tau.split([len(x) for x in parts[0]]), strict=True):
            combined[name] = restored(part, first[name], name, reference)
    return {name: combined.get(name, tensor) for name, tensor in first.items()}


def check_alike(states: Sequence[State], exclude: Iterable[str] = ()) -> list[str]:
    """Return the names that are combined; raise InputError unless all states have the same.

    What is excluded is that of the first state: the others may have it in other shapes, or lack it.
    """
    exclude, first = list(exclude), states[0]
    names = coded_names(first, exclude)
    compared = [*names, *(name for name, t in first.items() if not t.is_floating_point())]
    for state in states[1:]:
        # checks that they are finite, too
        others = {*coded_names(state, exclude)}
        others |= {name for name, tensor in state.items() if not tensor.is_floating_point()}
        differing = sorted(others ^ {*compared})
        if differing:
            raise InputError(
                f"{differing[0]} is not in all states ({len(differing)} tensors are not): they are "
                "of other methods or targets; --level update combines updates of weights"
            )
        for name in compared:
            tensor, other = first[name], state[name]
            if other.shape != tensor.shape:
                raise InputError(
                    f"{name} has shapes {list(tensor.shape)} and {list(other.shape)}: the states "
                    "have other ranks or bases; --level update combines updates of weights"
                )
            if not tensor.is_floating_point() and not torch.equal(tensor, other):
                raise InputError(
                    f"{name} differs, and is not of floating-point type: the adapters drew other "
                    "indices; use --level update"
                )
    return names


def trimmed(tau: Tensor, density: float) -> Tensor:
    """Return tau with all but its largest entries set to 0."""
    if not len(tau):
        return tau
    return tau * largest(tau.abs(), count_of(density, len(tau)))


def weighted(taus: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum w tau."""
    return torch.stack([w * tau for w, tau in zip(weights, taus, strict=True)]).sum(0)


def agreeing(taus: Sequence[Tensor], weights: Sequence[float], sign: str, aggregate: str) -> Tensor:
    """Return sum w tau over the states that have the elected sign, or their mean (TIES)."""
    stacked = torch.stack(list(taus))
    elected = (stacked if sign == "total" else stacked.sign()).sum(0).sign()
    undecided = elected == 0
    # the majority over all entries, as in the authors' code
    elected[undecided] = elected.sum().sign()
    # a trimmed entry (0) has no vote and does not count in the mean
    agrees = (stacked.sign() == elected) & (stacked != 0)
    total = weighted(list(stacked * agrees), weights)
    return total / agrees.sum(0).clamp(min=1) if aggregate == "mean" else total
