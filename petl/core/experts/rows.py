"""Rows of a mixed batch in a block with experts, where layers see tokens without their rows.

Shapes: B rows, T tokens of each, H width.
"""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.experts.layer import AdaptedExperts, ExpertLayer
from petl.core.experts.layout import experts_of
from petl.core.experts.lora import FusedExperts
from petl.core.layers.class_swap import outside_adapter_dicts
from petl.core.layers.layer import AdapterLayer
from petl.core.layers.mixed_batch import AdapterRows
from petl.core.types import Arguments


def row_hosts(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that petl's tuner gives `adapter_names`, one for each row of a batch."""
    hosts = AdapterLayer, AuxiliaryTrainingWrapper, AdaptedExperts
    for module in outside_adapter_dicts(model):
        # experts see tokens, and pass their names on to the layers of each
        if isinstance(module, hosts) and not isinstance(module, ExpertLayer):
            yield module


def token_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the adapted layers beside experts: shared experts and routers."""
    for block in outside_adapter_dicts(model):
        named = (child for name, child in block.named_children() if "expert" in name)
        if any(experts_of(child) is not None for child in named):
            for module in outside_adapter_dicts(block):
                if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(
                    module, FusedExperts | ExpertLayer
                ):
                    yield module


def repeat_names(
    module: nn.Module, args: tuple[object, ...], kwargs: Arguments
) -> tuple[tuple[object, ...], Arguments]:
    """Forward pre-hook: of an input [B T, H], give each token the adapter of its row."""
    names, x = kwargs.get("adapter_names"), args[0] if args else None
    if names is not None and isinstance(x, Tensor) and x.dim() == 2:
        each, rest = divmod(len(x), len(names))
        if each > 1 and not rest:
            kwargs["adapter_names"] = AdapterRows.of(names).repeated(each)
    return args, kwargs


@contextmanager
def telling_tokens(hooks: AbstractContextManager[None], model: nn.Module) -> Generator[None]:
    """Add `repeat_names` to the hooks of PEFT's tuner that give layers their `adapter_names`."""
    with hooks:
        handles = [
            layer.register_forward_pre_hook(repeat_names, with_kwargs=True)
            for layer in token_layers(model)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
