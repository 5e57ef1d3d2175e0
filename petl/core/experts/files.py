"""Tensors of the adapters of a stack in files: those of all experts in one, under its own name.

In the model, expert e has `<module>.linears.<stack>.<e>.petl_<method>_adapters.<adapter>.<tensor>`;
in a file there is `<module>.petl_<method>_adapters.<stack>.<tensor>` [E, ...]. Tensors of which
experts may have different sizes keep the first name, without that of the adapter.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from petl.core.experts.linears import LINEARS

OF_EXPERT = re.compile(
    rf"(?P<module>.*)\.{LINEARS}\.(?P<stack>[^.]+)\.(?P<expert>\d+)\."
    r"(?P<slot>petl_\w+_adapters\.[^.]+)\.(?P<tensor>[^.]+)"
)
STACKED = re.compile(
    r"(?P<module>.*)\.(?P<slot>petl_\w+_adapters)\.(?P<stack>[^.]+)\.(?P<tensor>[^.]+)"
)


def stack_experts(tensors: Mapping[str, Tensor], apart: Collection[str]) -> dict[str, Tensor]:
    """Return tensors by names in the model, with those of the experts of a stack as one.

    Args:
        tensors: of one adapter.
        apart: names of tensors that are never stacked.
    """
    found: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        match = OF_EXPERT.fullmatch(key)
        if match is None or match["tensor"] in apart:
            found[key] = tensor
        else:
            name = "{module}.{slot}.{stack}.{tensor}".format(**match.groupdict())
            groups.setdefault(name, []).append(key)
    for name, keys in groups.items():
        own = [tensors[key] for key in keys]
        if _are_alike(own):
            found[name] = torch.stack(own)
        else:
            found.update(zip(keys, own, strict=True))
    return found


def _are_alike(tensors: Iterable[Tensor]) -> bool:
    return len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `stack_experts` for tensors of a file, by their names without that of the adapter."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = STACKED.fullmatch(key)
        if match is None or tensor.dim() == 0:
            found[key] = tensor
            continue
        parts = match.groupdict()
        for expert, own in enumerate(tensor):
            name = "{module}.{linears}.{stack}.{expert}.{slot}.{tensor}"
            found[name.format(**parts, linears=LINEARS, expert=expert)] = own
    return found


def without_adapter(key: str, adapter_name: str) -> str | None:
    """Return the name in a file of a tensor of `stack_experts`; None if it is none."""
    before, found, after = key.partition(f"_adapters.{adapter_name}.")
    return f"{before}_adapters.{after}" if found and after.count(".") == 1 else None
