"""How an adapter comes to see the input of another module than its own layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petl.core.layers.context import ForwardContext
from petl.errors import InputError


class InputCapture:
    """Keeps the first input of a source module until the adapted layer takes it.

    It is a forward pre-hook of the source. Source and layer run in one call of their block, the
    source first, so that caching, compilation and checkpointing need no care.
    """

    def __init__(self, context: ForwardContext, key: str, adapter_name: str, source: str) -> None:
        self.context, self.source = context, source
        self.place = (key, adapter_name)
        self.handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Listen to the source module of `model`."""
        module = model.get_submodule(self.source)
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self) -> None:
        """Stop listening."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.context.state[self.place] = args[0] if args else next(iter(kwargs.values()))

    def pop(self) -> Tensor:
        """What the source saw last; it is not kept any longer.

        Raises:
            InputError: the source has not run.
        """
        x = self.context.state.pop(self.place, None)
        if x is None:
            raise InputError(
                f"{self.place[0]} has an adapter that reads the input of {self.source}, which has "
                "not run; call the model, or the block that holds both"
            )
        return x
