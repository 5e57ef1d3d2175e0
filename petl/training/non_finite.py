"""Where the first NaN or infinite value of a model is: in its weights, or in which output."""

from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn


class _NonFiniteOutput(Exception):
    """Ends a forward pass at the first output that is not finite."""


@torch.no_grad()
def first_not_finite(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Return the first tensor with a value that is not finite, in words.

    Args:
        batches: inputs of the model; they are computed only if all weights are finite.
    """
    for name, tensor in model.state_dict().items():
        # buffers as well: running statistics of a norm can be the first to break
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"the weight {name} has values that are not finite"
    names = {module: name or "the model" for name, module in model.named_modules()}
    found: list[str] = []

    def check(module: nn.Module, inputs: object, outputs: object) -> None:
        if module in names and any(not t.isfinite().all() for t in float_tensors(outputs)):
            found.append(names[module])
            # stops the pass: what follows is NaN as well, and could raise on it
            raise _NonFiniteOutput

    # submodules return before the modules that contain them, so the first is the innermost
    with suppress(_NonFiniteOutput), torch.nn.modules.module.register_module_forward_hook(check):
        for batch in batches:
            model(**batch)
    if not found:
        return "all weights are finite"
    return f"all weights are finite, and the first output that is not is that of {found[0]}"


def float_tensors(value: object) -> Iterable[Tensor]:
    """Yield the floating-point tensors in an output: a tensor, or containers of them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from float_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from float_tensors(item)
