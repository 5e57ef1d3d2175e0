"""Whether a module of experts computes what its layout says: both run on a few random tokens."""

import copy
import inspect

import torch
from torch import Tensor, nn

from petl.core.experts.forward import updated_forward
from petl.core.experts.layout import ExpertsLayout, Routing, experts_of
from petl.core.layers.class_swap import original_class
from petl.errors import ModuleKindError, UnsupportedError

TOKENS = 8  # that it is tried with
TOLERANCE = 1e-5  # of the outputs, relative to the largest
STEP = 64  # entries between the weights of two experts that overlap
OTHER_KERNELS = ("deepgemm", "sonicmoe")  # implementations that take no update

_faults: dict[tuple[object, ...], str] = {}  # by class and settings of a module


def check_experts(module: nn.Module, name: str) -> ExpertsLayout:
    """Return the layout of a module of experts on which adapters compute correctly.

    Args:
        module: for which `experts_of` returns a layout; it is not changed.
        name: its path, for messages.

    Raises:
        ModuleKindError: its weights are quantized, or it computes something else than its layout
            says. On the meta device the layout is trusted.
        UnsupportedError: the model is set to kernels that take no update, or each process holds
            other experts.
    """
    layout = experts_of(module)
    assert layout is not None, name
    kind, stack = original_class(module).__name__, module._parameters[layout.up]
    assert stack is not None
    implementation = layout.implementation(module)
    if implementation in OTHER_KERNELS:
        raise UnsupportedError(
            f"{name}: experts_implementation={implementation!r} computes experts by kernels that "
            "take no update; load the model with experts_implementation='grouped_mm'"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedError(
            f"{name}: the model was loaded with expert parallelism, and an adapter's file would "
            "have the experts of one process only; load it without ep_size, and divide it among "
            "processes by FSDP"
        )
    if stack.element_size() == 1:
        raise ModuleKindError(
            f"{name} is {kind} with weights in {stack.dtype}, on which adapters do not compute; "
            "load the model with its weights dequantized"
        )
    # of a plan: the flags decide
    if stack.is_meta:
        return layout
    # blocks are built alike, so that one proof holds for all of them
    settings = (v for v in vars(module).items() if isinstance(v[1], str | int | float))
    key = (original_class(module), layout, *(item for item in settings if item[0] != "training"))
    if key not in _faults:
        _faults[key] = _fault(module, layout)
    if _faults[key]:
        raise ModuleKindError(
            f"{name} is {kind}, which computes something else than experts whose weights are "
            f"stacked as {', '.join(layout.stacks)} ({_faults[key]}); leave it out with "
            "exclude_modules"
        )
    return layout


def _fault(module: nn.Module, layout: ExpertsLayout) -> str:
    """Return how the outputs of a module differ from those of its layout; "" if they do not."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        tried = _with_random_weights(module, layout, generator)
        inputs = _inputs(tried, layout, generator)
        # below the decorator, which would choose another implementation
        forward = inspect.unwrap(original_class(module).forward)
        try:
            expected = forward(tried, *inputs)
            y = updated_forward(tried, layout, inputs, {})
        # whatever the class raises: it takes other inputs
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            return str(error).partition("\n")[0]
    if not isinstance(expected, Tensor) or y.shape != expected.shape:
        return "its outputs have another shape"
    error = float((y - expected).abs().max() / expected.abs().max())
    return "" if error <= TOLERANCE else f"outputs differ by {error:.0e}"


def _with_random_weights(
    module: nn.Module, layout: ExpertsLayout, generator: torch.Generator
) -> nn.Module:
    """Return a copy of a module with other weights; it takes the memory of one expert.

    Weights of neighbouring experts overlap in memory, so that they differ nevertheless.
    """
    # its own may be zero, on another device, or of half precision
    tried = copy.copy(module)
    tried.__dict__ |= {"training": False, "_forward_hooks": {}, "_forward_pre_hooks": {}}
    tried._modules = {k: copy.deepcopy(m).cpu().float() for k, m in module.named_children()}
    tried._parameters = dict(module._parameters)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if name in layout.stacks:
            shape = layout.shape(module, name)
            E, first, second = parameter.shape
            # one buffer, in which each expert begins a little later than the one before
            values = torch.randn(first * second + E * STEP, generator=generator)
            values /= shape.in_features**0.5
            weight = values.as_strided((E, first, second), (STEP, second, 1))
        else:
            weight = torch.randn(parameter.shape, generator=generator)
        tried._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return tried


def _inputs(
    module: nn.Module, layout: ExpertsLayout, generator: torch.Generator
) -> tuple[Tensor | list[int], ...]:
    """Return inputs with which limits of gates are reached."""
    E, width, _ = layout.shape(module, layout.up)
    count = layout.count(module)
    K = min(2, count)
    T = TOKENS * (count if layout.routing is Routing.ALL else 1)
    x = 4 * torch.randn(T, width, generator=generator)
    if layout.routing is Routing.ALL:
        return (x,)
    if layout.routing is Routing.SIZES:
        return x, [TOKENS - 1, *[0] * (E - 2), 1] if E > 1 else [TOKENS]
    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return x, index, torch.rand(T, K, generator=generator)
