"""Levels of bits: of each quantized weight of the method binary, how many bits it is stored in.

The stored values are quantized again, so that a weight can only go down from what it has.
"""

from peft import PeftModel
from torch import nn

from petl.adapters.search.tensors import active_adapter
from petl.adapters.search.units import Unit
from petl.core.adapter_file import type_of
from petl.errors import InputError, UnsupportedError
from petl.methods.binary.method import quantizer_of
from petl.methods.binary.quantized_weights import QuantizedWeight
from petl.ops.quantize import BITS, packed_bytes, quantize

STATS_BYTES = 8  # mean and deviation of a weight, in float32


def bits_of(model: nn.Module) -> list[Unit]:
    """Return the quantized weights of the active adapter, each at 1 bit to those it has.

    Raises:
        InputError: there is no adapter of the method binary, it has 1 bit already, or it was not
            loaded from a packed file.
    """
    model, name = active_adapter(model)
    units = []
    for live, weight in quantized_weights(model, name).items():
        options = tuple(bits for bits in BITS if bits <= weight.bits)
        stored = weight.weight.detach()
        # what is stored already is not rounded again
        tensors = tuple(
            {live: stored.clone() if bits == weight.bits else quantize(stored, bits)}
            for bits in options
        )
        costs = tuple(packed_bytes(stored.numel(), bits) + STATS_BYTES for bits in options)
        path = live.removeprefix("base_model.model.")
        units.append(Unit(path, len(options), costs, tensors, options))
    if all(unit.levels == 1 for unit in units):
        raise InputError(f"all {len(units)} weights have 1 bit, so there are no bits to distribute")
    return units


def quantized_weights(model: PeftModel, name: str) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of an adapter but that of a head, by name in the model.

    Raises:
        InputError: the adapter is of another method, or was not loaded from a packed file.
    """
    quantizer = quantizer_of(model)
    if quantizer is None:
        raise UnsupportedError(f"{type_of(model)} has no bits to distribute; the method binary has")
    named = {id(parameter): live for live, parameter in model.named_parameters()}
    weights = [w for w in quantizer.quantized_weights[name] if not w.head]
    for weight in weights:
        if weight.packed is None:
            raise InputError(
                f"adapter {name!r} has latent weights, which are quantized as the config says: "
                "save it with save_format=stacked or packed, and load that file"
            )
    return {named[id(weight.weight)]: weight for weight in weights}
