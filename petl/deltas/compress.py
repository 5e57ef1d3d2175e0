"""ComPEFT: the signs of the largest entries of what was learned, with one magnitude.

Source: Yadav, Choshen, Raffel, Bansal, "ComPEFT: Compression for Communicating Parameter Efficient
Updates via Sparsification and Quantization", arXiv 2311.13171. Unlike its reference code, which
keeps one entry more and all that equal the threshold, exactly the requested number is kept, and
sizes are those of files, by a Rice code.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from petl.deltas.states import (
    SCOPES,
    check_reference,
    coded_names,
    count_of,
    deviation,
    difference,
    fraction,
    largest,
    one_of,
)
from petl.errors import InputError, shown
from petl.ops.ternary import State, Ternary


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
    density = fraction("density", density)
    one_of("scope", scope, SCOPES)
    # bool is a subclass of int
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha != "fit" and not (is_number and 0 < float(alpha) < float("inf")):
        raise InputError(f'alpha={shown(alpha)} is neither a number above 0 nor "fit"')
    names = coded_names(state, exclude)
    check_reference(names, state, reference)
    # a quantile of an empty tensor is not defined
    parts = {name: difference(state, name, reference) for name in names if state[name].numel()}
    groups = [list(parts)] if scope == "global" else [[name] for name in parts]
    chosen: dict[str, Tensor] = {}
    sigma, scale = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for group in groups:
        masks = _kept([parts[name] for name in group], density)
        chosen.update(zip(group, masks, strict=True))
        spread = deviation(parts[name] for name in group)
        fitted = _mean_magnitude([parts[name][chosen[name]] for name in group])
        for name in group:
            sigma[name] = spread
            scale[name] = fitted if alpha == "fit" else float(alpha) * spread
    # never 0: `largest` chooses no entry that is 0
    signs = [parts[name][mask] > 0 for name, mask in chosen.items()]
    return Ternary(
        {name: (state[name].dtype, state[name].shape) for name in names},
        {name: int(chosen[name].sum()) if name in chosen else 0 for name in names},
        sigma,
        scale,
        # empty tensors have no entries, so positions are those in all of tau
        torch.cat(list(chosen.values())).nonzero().squeeze(1).numpy(),
        torch.cat(signs).numpy(),
        {name: tensor for name, tensor in state.items() if name not in names},
        {"density": density, "alpha": alpha, "scope": scope},
    )


def _kept(parts: list[Tensor], density: float) -> list[Tensor]:
    """Return masks of the largest entries of tensors laid end to end."""
    magnitudes = torch.cat([part.abs() for part in parts])
    mask = largest(magnitudes, count_of(density, len(magnitudes)))
    return list(mask.split([len(part) for part in parts]))


def _mean_magnitude(parts: list[Tensor]) -> float:
    """Return the mean of the absolute values, 0 without any."""
    count = sum(len(part) for part in parts)
    total = sum(float(part.abs().sum(dtype=torch.float64)) for part in parts)
    return total / count if count else 0.0
