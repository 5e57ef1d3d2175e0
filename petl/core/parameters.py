"""The trainable parameters of a model."""

from collections.abc import Iterator

from torch import nn

Named = tuple[str, nn.Parameter]


def trainable(model: nn.Module) -> Iterator[Named]:
    """Every trainable tensor of the model with its name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
