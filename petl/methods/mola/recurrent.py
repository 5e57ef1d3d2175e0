"""The recurrent router of RMoE: a GRU carries the state of a token's routers from layer to layer.

Qiu et al. 2025, "Layerwise Recurrent Router for Mixture-of-Experts", ICLR (arXiv:2408.06793).
Shapes: P router width, T tokens.
"""

import torch
from torch import Tensor, nn

from petl.core.layers.layer import LayerInfo
from petl.errors import InputError


class Gru(nn.Module):
    """Parameters of `torch.nn.GRUCell(P, P)` under flat names, shared by all layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in nn.GRUCell(width, width).named_parameters():
            self.register_parameter(f"gru_{name}", value)

    def forward(self, z_TP: Tensor, h_TP: Tensor) -> Tensor:
        """State of this layer, [T, P], from its projected input and the state of the layer below.

        The cell is called directly, so that its weights can be cast to the dtype of `z_TP`.
        """
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = (getattr(self, f"gru_{name}").to(z_TP.dtype) for name in names)
        return torch.gru_cell(z_TP, h_TP, *weights)


def next_state(info: LayerInfo, z_TP: Tensor) -> Tensor:
    """Return the router state of a layer, [T, P], from that of the layer below it in its chain.

    A chain is the modules of one name in one stack, such as all `mlp.up_proj` of a decoder.

    Raises:
        InputError: it runs under reentrant checkpointing.
    """
    context, chain = info.context, (info.adapter_name, info.settings["chain"])
    if context.recording and not torch.is_grad_enabled():
        raise InputError(
            f"{info.key}: router_type='recurrent' cannot run under reentrant checkpointing, which "
            "detaches the router's states between layers; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    below = context.state.get((*chain, info.settings["below"]))  # None in the lowest layer
    assert info.shared is not None
    h_TP = info.shared(z_TP, torch.zeros_like(z_TP) if below is None else below)
    context.state[(*chain, info.settings["index"])] = h_TP  # for the layer above
    return h_TP
