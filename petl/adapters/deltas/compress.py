"""ComPEFT: the signs of the largest entries of what was learned, with one magnitude.

Source: Yadav, Choshen, Raffel, Bansal, "ComPEFT: Compression for Communicating Parameter Efficient
Updates via Sparsification and Quantization", arXiv 2311.13171. Unlike its reference code, which
keeps one entry more and all that equal the threshold, exactly the requested number is kept, and
sizes are those of files, by a Rice code.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from petl.adapters.deltas.states import (
    SCOPES,
    SHARE,
    check_reference,
    coded_names,
    count_of,
    deviation,
    difference,
    largest_each,
)
from petl.ops.ternary import State, Ternary
from petl.system.values import Rule, type_problem

Setting = tuple[float, float | str]  # density and alpha
ALPHA = Rule(
    'a number above 0, or "fit"',
    lambda alpha: alpha == "fit" or (not type_problem(alpha, float) and alpha > 0),
)


def compress(
    state: State,
    *,
    density: float = 0.05,
    alpha: float | str = 1.0,
    scope: str = "global",
    exclude: Iterable[str] = (),
    reference: State | None = None,
) -> Ternary:
    """Keep the signs of the largest entries of a state, with one magnitude.

    Args:
        state: tensors by name; those of floating-point type are coded, the others kept.
        density: fraction of the entries kept, in (0, 1].
        alpha: the magnitude in standard deviations of tau, above 0; or "fit": the mean of the kept
            magnitudes, the best in least squares.
        scope: the largest entries, and the deviation, of all tensors together ("global") or of each
            ("tensor").
        exclude: regular expressions; tensors in whose name one is found are not coded.
        reference: subtracted from the state; None: 0.

    Raises:
        InputError: an argument is out of range, a value is not finite, or no tensor is coded.
    """
    settings = [(density, alpha)]
    (found,) = compress_each(state, settings, scope=scope, exclude=exclude, reference=reference)
    return found


def compress_each(
    state: State,
    settings: Sequence[Setting],
    *,
    scope: str = "global",
    exclude: Iterable[str] = (),
    reference: State | None = None,
) -> list[Ternary]:
    """Return a state compressed by several densities and alphas; other arguments as of `compress`.

    The largest entries of all densities are found by one selection among all entries.
    """
    SCOPES.check("scope", scope, str)
    for density, alpha in settings:
        SHARE.check("density", density, float)
        ALPHA.check("alpha", alpha)
    names = coded_names(state, exclude)
    groups = [names] if scope == "global" else [[name] for name in names]
    return compress_groups(state, settings, groups, scope=scope, reference=reference)


def compress_groups(
    state: State,
    settings: Sequence[Setting],
    groups: Iterable[Sequence[str]],
    *,
    scope: str,
    reference: State | None = None,
) -> list[Ternary]:
    """Return a state compressed by several densities and alphas, which were checked before.

    Args:
        groups: names of tensors whose largest entries, and deviation, are found together; every
            coded tensor is in one group.
        scope: the name of this division, for the record.
        reference: as of `compress`.
    """
    groups = [list(group) for group in groups]
    names = sorted(name for group in groups for name in group)
    check_reference(names, state, reference)
    # a quantile of an empty tensor is not defined
    parts = {name: difference(state, name, reference) for name in names if state[name].numel()}
    masks: list[dict[str, Tensor]] = [{} for _ in settings]
    scales = [dict.fromkeys(names, 0.0) for _ in settings]
    sigma = dict.fromkeys(names, 0.0)
    for group in groups:
        members = [name for name in group if name in parts]
        if not members:
            continue
        tensors = [parts[name] for name in members]
        chosen = _kept_each(tensors, [density for density, _ in settings])
        spread = deviation(tensors)
        sigma |= dict.fromkeys(members, spread)
        for i, (_, alpha) in enumerate(settings):
            masks[i].update(zip(members, chosen[i], strict=True))
            kept = (part[mask] for part, mask in zip(tensors, chosen[i], strict=True))
            scale = _mean_magnitude(list(kept)) if alpha == "fit" else float(alpha) * spread
            scales[i] |= dict.fromkeys(members, scale)
    found = []
    for i, (density, alpha) in enumerate(settings):
        chosen = [masks[i][name] for name in parts]  # in the order of the names
        # never 0: `largest` chooses no entry that is 0
        signs = [part[mask] > 0 for part, mask in zip(parts.values(), chosen, strict=True)]
        found.append(
            Ternary(
                {name: (state[name].dtype, state[name].shape) for name in names},
                {name: int(masks[i][name].sum()) if name in parts else 0 for name in names},
                sigma,
                scales[i],
                # empty tensors have no entries, so positions are those in all of tau
                torch.cat(chosen).nonzero().squeeze(1).cpu().numpy(),
                torch.cat(signs).cpu().numpy(),
                {name: tensor for name, tensor in state.items() if name not in sigma},
                {"density": density, "alpha": alpha, "scope": scope},
            )
        )
    return found


def _kept_each(parts: list[Tensor], densities: Sequence[float]) -> list[list[Tensor]]:
    """Return, for each density, masks of the largest entries of tensors laid end to end."""
    magnitudes = torch.cat([part.abs() for part in parts])
    counts = [count_of(density, len(magnitudes)) for density in densities]
    found = largest_each(magnitudes, counts)
    return [list(found[count].split([len(part) for part in parts])) for count in counts]


def _mean_magnitude(parts: list[Tensor]) -> float:
    """Return the mean of the absolute values, 0 without any."""
    count = sum(len(part) for part in parts)
    total = sum(float(part.abs().sum(dtype=torch.float64)) for part in parts)
    return total / count if count else 0.0
