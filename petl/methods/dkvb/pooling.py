"""The mean of the encoder's last states, as input of the head."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from petl.core.layers.context import InputCapture
from petl.core.masks import as_2d


class MeanCapture(InputCapture):
    """Forward hook that stores the mean of an encoder's last states over the attention mask."""

    def attach(self, model: nn.Module) -> None:
        """Register the hook on the encoder."""
        module = model.get_submodule(self.source)
        self.handle = module.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Store the mean of the states in `output`."""
        # not under no_grad: `state` is that of the grad mode in which the head runs
        states = output[0] if isinstance(output, tuple) else output.last_hidden_state
        self.context.state[self.place] = mean_state(states.detach(), kwargs.get("attention_mask"))


def mean_state(states: Tensor, mask: Any) -> Tensor:
    """Return the mean over positions in float32, [N, D].

    Args:
        states: [N, T, D], or of a convolutional encoder [N, D, H, W].
        mask: [N, T], 0 at padding; any other value is no mask of the states.
    """
    states = states.float()
    if states.dim() > 3:
        return states.flatten(2).mean(-1)
    weights = as_2d(mask)
    if weights is None or weights.shape != states.shape[:2]:
        return states.mean(1)
    weights = weights.to(states).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
