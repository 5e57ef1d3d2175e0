"""Pure functions of tensors that several methods use."""

from typing import Any

from torch import Tensor


class Ctx:
    """What `forward` of an autograd function keeps for its `backward`, for annotations.

    No object has this class: torch declares no attributes for its own.

    Attributes:
        saved_tensors: those of `save_for_backward`; one that was None is None again.
        needs_input_grad: by argument of `forward`, whether it needs a gradient.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for `saved_tensors`."""

    def __getattr__(self, name: str) -> Any:
        """Return what `forward` kept under a name of its own."""

    def __setattr__(self, name: str, value: object) -> None:
        """Keep a value under a name of its own."""


IGNORED = -100  # the label of padding, and of tokens that are not learned, as in transformers
