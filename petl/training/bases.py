"""The frozen weights that runs of one process share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Bases = dict[str, nn.Parameter]  # frozen weights by place, see `share_base`
WRAPPED = ("base_layer", "original_module")  # names of PEFT's for what an adapter wraps


def share_base(base: nn.Module, own: Sequence[nn.Parameter], known: Bases) -> None:
    """Let a wrapped model use the frozen weights of an earlier one, where equal.

    Call it when the adapter has its initial values, which some methods take out of the weights.
    Weights that train stay the run's own, as do new modules, such as a head that each run draws.

    Args:
        base: the transformers model.
        own: its parameters before it was wrapped; an adapter may change others that are frozen.
        known: the weights of earlier ones, to which those of this one are added.
    """
    ids = {id(parameter) for parameter in own}
    for path, module in base.named_modules():
        # adapters are on other modules in another run
        place = ".".join(part for part in path.split(".") if part not in WRAPPED)
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.requires_grad or id(parameter) not in ids:
                continue
            earlier = known.setdefault(f"{place}.{name}", parameter)
            if earlier is not parameter and _equal(earlier, parameter):
                module._parameters[name] = earlier


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and type(one) is type(other) and torch.equal(one, other)
