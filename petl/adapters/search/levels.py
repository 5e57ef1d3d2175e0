"""The units of an adapted model and their levels: density, rank, bits, or skipped blocks."""

from collections.abc import Callable

from peft import PeftModel
from torch import nn

from petl.adapters.search.bits import bits_of
from petl.adapters.search.density import density_of
from petl.adapters.search.rank import rank_of
from petl.adapters.search.units import Unit
from petl.core.model.structure import blocks
from petl.errors import InputError
from petl.system.values import one_of


def levels_of(model: nn.Module, what: str) -> list[Unit]:
    """Return the units of the active adapter, or of the model, with the levels of each.

    Args:
        model: a PeftModel; for "skip" any model with transformer blocks.
        what: "density": fractions of the values of each adapted module that ComPEFT keeps, costs in
            bytes; "rank": of each LoRA layer, by SVD, costs in values; "bits": of each quantized
            weight of the method binary, costs in bytes; "skip": run a block (level 0) or skip it,
            a cost of 1.

    Raises:
        InputError: `what` is none of these, or the model has no such units.
    """
    one_of(*WHAT).check("what", what, str)
    return WHAT[what](model)


def skip_of(model: nn.Module) -> list[Unit]:
    """Return the blocks of a model, which can be run or skipped."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = [
        Unit(name, 2, (0, 1), ({}, {}), ("run", "skip"), block) for name, block in blocks(base)
    ]
    if not found:
        raise InputError(f"{type(base).__name__} has no list of transformer blocks to skip")
    return found


WHAT: dict[str, Callable[..., list[Unit]]] = {
    "density": density_of,
    "rank": rank_of,
    "bits": bits_of,
    "skip": skip_of,
}
