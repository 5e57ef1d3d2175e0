"""The trainable parameters of a model."""

from collections.abc import Iterator

from torch import nn

Named = tuple[str, nn.Parameter]


def trainable(model: nn.Module) -> Iterator[Named]:
    """Yield name and tensor of every trainable parameter of the model."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
