"""Top-k routing of tokens to experts. Shapes: T tokens, E experts, K picked.

The balance loss is `E * sum_e f_e P_e` (Switch Transformer, arXiv:2101.03961): f_e is the fraction
of all picks that went to expert e (they sum to 1), P_e its mean probability; only P carries a
gradient. It is 1 for a uniform router and up to E for a collapsed one. With the picks of any number
of batches it is linear in the sums of the probabilities: `balance_weights(picks_E, K) @ prob_E`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import LayerInfo
from petl.errors import InputError
from petl.ops import Ctx


def uniform(rows: int, fan_in: int) -> nn.Parameter:
    """Parameter [rows, fan_in] from U(-fan_in^-0.5, fan_in^-0.5): Kaiming-uniform, a = sqrt(5)."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(rows, fan_in).uniform_(-bound, bound))


def padded(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices [..., R, N] with rows of zeros added up to the largest R of them."""
    R = max(matrix.shape[-2] for matrix in matrices)
    return [F.pad(matrix, (0, 0, 0, R - matrix.shape[-2])) for matrix in matrices]


class _FloatLinear(torch.autograd.Function):
    """See `float_linear`."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, W)
        # an output without a gradient gives None instead of zeros
        ctx.set_materialize_grads(False)
        x_TI = x.reshape(-1, x.shape[-1]).float()
        logit_ET = W @ x_TI.t()  # experts as rows: later operations are up to ten times faster
        return logit_ET.t(), x.view_as(x)

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor | None, to_x: Tensor | None) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        x, W = ctx.saved_tensors
        if grad is None:
            return to_x, None
        to_W = None
        if ctx.needs_input_grad[0]:
            to_x = _add_product(to_x, grad, W, x)
        if ctx.needs_input_grad[1]:
            to_W = grad.t() @ x.reshape(-1, x.shape[-1]).float()
        return to_x, to_W


def _add_product(y: Tensor | None, grad: Tensor, W: Tensor, x: Tensor) -> Tensor:
    """Return `y + grad W` in the shape and dtype of x, which y has too; rounded once."""
    # float32: the sum costs no extra pass
    if y is not None and y.dtype == W.dtype:
        return torch.addmm(y.reshape(-1, y.shape[-1]), grad, W).view(x.shape)
    product = (grad @ W).view(x.shape)
    return (product if y is None else product + y).to(x.dtype)


def float_linear(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x W^T` in float32, [T, E], for x [..., I] of any dtype and float32 W [E, I]; and x.

    It saves `x` itself for backward, which other functions save as well, not a float32 copy. The
    memory layout of the result is [E, T]. Use the returned `x` for everything that follows: then
    backward adds its gradients within the product instead of in a separate pass.
    """
    logit_TE, same = _FloatLinear.apply(x, W)
    return logit_TE, same if x.requires_grad else x  # `same` requires a gradient whenever W does


def top_k_gates(logit_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return gates, picks and probabilities of a softmax router.

    Args:
        logit_TE: router logits, fp32 [T, E].
        k: experts per token.

    Returns:
        gate [T, E]: softmax over the k largest logits, zero elsewhere; picked [T, E]: 1 where an
        expert was chosen; prob [T, E]: softmax over all experts.
    """
    logit_ET = logit_TE.t()  # softmax over the rows: over few columns it is slow
    index_KT = logit_ET.detach().topk(k, dim=0).indices
    # a mask instead of indices: sizes do not depend on values
    picked_ET = torch.zeros_like(logit_ET).scatter_(0, index_KT, 1.0)
    # softmax over the picked logits only
    gate_ET = logit_ET.masked_fill(picked_ET == 0, -torch.inf).softmax(0)
    return gate_ET.t(), picked_ET.t(), logit_ET.softmax(0).t()


class RoutedRows(NamedTuple):
    """Routed low-rank experts of G groups of rows; each group has its own router and experts.

    Attributes:
        router: [G, E, I], float32.
        A: [G, E, R, I].
        B: [G, E, R, O], so that the rows of an expert are contiguous.
        scale: of the updates, [G, 1, 1].
        k: experts per token.
    """

    router: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor
    k: int

    @classmethod
    def stack(
        cls,
        tensors: Sequence[Mapping[str, Tensor]],
        scales: Sequence[float],
        E: int,
        k: int,
        dtype: torch.dtype,
    ) -> "RoutedRows":
        """Return the groups of these tensors; smaller ranks are padded with zeros.

        Args:
            tensors: of each group, `router` [E, I], `lora_A` [E R, I] and `lora_B` [O, E R].
            scales: of the updates.
            E: experts of each group.
            k: experts per token.
            dtype: of the experts.
        """
        router = torch.stack([group["router"] for group in tensors]).float()
        A_ERI = [group["lora_A"].unflatten(0, (E, -1)) for group in tensors]
        B_ERO = [group["lora_B"].mT.unflatten(0, (E, -1)) for group in tensors]
        scale = torch.tensor(scales, dtype=dtype).to(router.device).view(-1, 1, 1)
        A, B = (torch.stack(padded(matrices)).to(dtype) for matrices in (A_ERI, B_ERO))
        return cls(router, A, B, scale, k)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the picked experts' updates for x [G, T, I] to `y` [G, T, O], in place."""
        with torch.autocast(x.device.type, enabled=False):
            logit_GTE = torch.bmm(self.router, x.float().mT).mT
        top_GTK, picked_GTK = logit_GTE.topk(self.k)
        gate_GTK = self.scale * top_GTK.softmax(-1).to(x.dtype)
        G, T, E = logit_GTE.shape
        # at least one expert is not picked
        if T * self.k < E:
            return self._add_picked(x, y, gate_GTK, picked_GTK)
        gate_GTE = torch.zeros_like(logit_GTE, dtype=x.dtype).scatter_(-1, picked_GTK, gate_GTK)
        h_GQT = torch.bmm(self.A.flatten(1, 2), x.mT)  # all experts of a group are the Q rows
        h_GETR = h_GQT.view(G, E, -1, T).mT * gate_GTE.mT.unsqueeze(-1)
        h_GTQ = h_GETR.transpose(1, 2).reshape(G, T, -1).to(y.dtype)
        return y.baddbmm_(h_GTQ, self.B.flatten(1, 2).to(y.dtype))

    def _add_picked(self, x: Tensor, y: Tensor, gate_GTK: Tensor, picked_GTK: Tensor) -> Tensor:
        """Add the updates for few tokens, reading the weights of picked experts only."""
        G, E, R, I = self.A.shape
        # experts of all groups numbered in one sequence
        first_G11 = torch.arange(0, G * E, E, device=x.device).view(-1, 1, 1)
        expert_X = (picked_GTK + first_G11).flatten()
        A_NQI = self.A.flatten(0, 1).index_select(0, expert_X).view(-1, self.k * R, I)
        h_NQ = torch.bmm(A_NQI, x.reshape(-1, 1, I).mT).view(-1, self.k, R)
        h_NQ = (h_NQ * gate_GTK.view(-1, self.k, 1)).flatten(1)
        row_NQ = (expert_X.view(-1, self.k, 1) * R + torch.arange(R, device=x.device)).flatten(1)
        B, h_NQ = self.B.flatten(0, 2), h_NQ.to(self.B.dtype)
        return y.add_(F.embedding_bag(row_NQ, B, mode="sum", per_sample_weights=h_NQ).view_as(y))


def expert_sums(picked_TE: Tensor, prob_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums over tokens of which the balance loss is made; masked tokens do not count.

    Args:
        picked_TE: 1 where an expert was chosen.
        prob_TE: probabilities.
        mask_T: 0 for tokens to leave out; None: none.

    Returns:
        picks [E]: number of picks of each expert, without a gradient; prob [E]: sum of its
        probabilities.
    """
    if mask_T is not None:
        weight_T1 = mask_T.to(prob_TE.dtype)[:, None]
        # not a matrix product, which autocast would compute in half precision
        picked_TE, prob_TE = weight_T1 * picked_TE, weight_T1 * prob_TE
    return picked_TE.detach().sum(0), prob_TE.sum(0)


def balance_weights(picks_E: Tensor, k: int, factor: float = 1.0) -> Tensor:
    """Return `factor` times the derivative of the balance loss by each sum of probabilities.

    That is E times the expert's fraction of the picks over the number of tokens, [E]; each token
    has picked `k` experts.
    """
    total = picks_E.sum().clamp(min=1.0)
    return picks_E / total / total * (factor * k * len(picks_E))


def busiest(picks_E: Tensor) -> Tensor:
    """Return the picks of the busiest expert over the mean, 0-d: 1 if balanced, at most E."""
    return picks_E.max() * len(picks_E) / picks_E.sum().clamp(min=1.0)


# The recurrent router of RMoE: a GRU carries the state of a token's routers from layer to layer.
#
# Qiu et al. 2025, "Layerwise Recurrent Router for Mixture-of-Experts", ICLR (arXiv:2408.06793).
# Shapes: P router width, T tokens.


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
