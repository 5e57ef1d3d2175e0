"""The pre-gated router of Read-ME: one small causal model over token ids, for all layers.

Cai et al. 2024, "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System
Co-Design", NeurIPS (arXiv:2410.19123). Shapes: B rows, T tokens, S tokens in the cache, H width of
the base's embedding, P router width, n blocks, E experts (the largest number of any layer), N
numbers that the cache keeps of a token.

    z = e(x) Q^T, or a table of the token    e: the base's frozen embedding
    z <- z + O Attn(rms(z))                  causal, rotary, scores over sqrt(P / heads)
    z <- z + D silu(U rms(z))
    g = G rms(z) + b                         logits of all experts, float32

Where we depart from the authors' code: attention scores are divided by sqrt(P / heads), not by 1;
the embedding is projected by default, not a trained copy of P columns; the router learns through
the gates and has MoLA's balance loss, and is not distilled from statistics of activations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.errors import InputError
from petl.methods.mola.routing import uniform
from petl.methods.mola.tokens import RoutedTokens

MATRICES = ("q", "k", "v", "o", "up", "down")  # of a block, [P, P] with a bias each
EPS, BASE = 1e-6, 10_000.0  # of the norms, and of the rotary frequencies


class PreGate(nn.Module):
    """Parameters of a pre-gated router under flat names; `forward` returns its logits."""

    def __init__(self, config: Any, experts: int, embedding: nn.Module) -> None:
        super().__init__()
        self.heads, self.blocks = config.router_heads, config.router_layers
        self.lookahead = config.router_lookahead
        self.width = P = config.router_hidden_size
        table: Any = embedding.weight
        if config.router_embedding == "own":
            if table.shape[1] < P:
                raise InputError(
                    f"router_hidden_size={P} exceeds the {table.shape[1]} columns of the model's "
                    "embedding, from which router_embedding='own' starts; lower it"
                )
            self.pregate_embedding = nn.Parameter(table.detach()[:, :P].float().clone())
        else:
            self.pregate_in = uniform(P, table.shape[1])
        for i in range(self.blocks):
            for name in MATRICES:
                self.register_parameter(f"pregate_{i}_{name}_weight", uniform(P, P))
                self.register_parameter(f"pregate_{i}_{name}_bias", nn.Parameter(torch.zeros(P)))
            for name in ("norm_1", "norm_2"):
                self.register_parameter(f"pregate_{i}_{name}", nn.Parameter(torch.ones(P)))
        self.pregate_norm = nn.Parameter(torch.ones(P))
        self.pregate_out_weight = uniform(experts, P)
        self.pregate_out_bias = nn.Parameter(torch.zeros(experts))

    @property
    def reads_embedding(self) -> bool:
        """True if it reads the base's embedding; False if it has a table of its own."""
        return hasattr(self, "pregate_in")

    @property
    def reads_previous_token(self) -> bool:
        """True if it reads the token before each one, which a tree of drafts does not tell."""
        return self.lookahead > 0

    def forward(self, tokens: RoutedTokens, past_BSN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the logits for routing, [B, T, E] float32, and what a cache has to keep.

        Args:
            tokens: of this pass.
            past_BSN: what this method returned for the tokens before; None: there are none.

        Returns:
            logits: of each token; with a lookahead of 1, of the token before it.
            present: [B, T, N], by block the keys and values [P], then the token's own logits [E].
        """
        device = self.pregate_norm.device
        with torch.autocast(device.type, enabled=False):
            z_BTP, present = self._start(tokens), []
            for i in range(self.blocks):
                z_BTP, kept = self._block(i, z_BTP, tokens, past_BSN)
                present += kept
            weight, bias = self.pregate_out_weight.float(), self.pregate_out_bias.float()
            g_BTE = F.linear(self._norm("norm", z_BTP), weight, bias)
            logits_BTE = g_BTE
            if self.lookahead:
                E = len(bias)
                # the first token has none before it: `follows` is False there
                last_B1E = g_BTE[:, :1] if past_BSN is None else past_BSN[:, -1:, -E:]
                before_BTE = torch.cat([last_B1E, g_BTE[:, :-1]], 1)
                logits_BTE = torch.where(tokens.follows[..., None], before_BTE, bias)
            return logits_BTE, torch.cat([*present, g_BTE], -1)

    def _start(self, tokens: RoutedTokens) -> Tensor:
        if self.reads_embedding:
            assert tokens.embedded is not None
            return F.linear(tokens.embedded.float(), self.pregate_in.float())
        if tokens.ids is None:
            raise InputError(
                "router_embedding='own' reads token ids and the model was called with "
                "inputs_embeds; pass input_ids, or train with router_embedding='projected'"
            )
        return F.embedding(tokens.ids, self.pregate_embedding.float())

    def _norm(self, name: str, z_BTP: Tensor) -> Tensor:
        return F.rms_norm(z_BTP, (self.width,), getattr(self, f"pregate_{name}").float(), EPS)

    def _linear(self, name: str, z_BTP: Tensor) -> Tensor:
        weight, bias = (getattr(self, f"pregate_{name}_{part}") for part in ("weight", "bias"))
        return F.linear(z_BTP, weight.float(), bias.float())

    def _block(
        self, i: int, z_BTP: Tensor, tokens: RoutedTokens, past_BSN: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        P, x_BTP = self.width, self._norm(f"{i}_norm_1", z_BTP)
        q_BTP, k_BTP = (
            rotated(self._linear(f"{i}_{name}", x_BTP), tokens.positions, self.heads)
            for name in ("q", "k")
        )
        kept = k_BTP, self._linear(f"{i}_v", x_BTP)
        all_k, all_v = kept
        if past_BSN is not None:
            start = 2 * i * P
            all_k = torch.cat([past_BSN[..., start : start + P], all_k], 1)
            all_v = torch.cat([past_BSN[..., start + P : start + 2 * P], all_v], 1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q_BTP, all_k, all_v))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=tokens.allowed, is_causal=tokens.allowed is None
        )
        z_BTP = z_BTP + self._linear(f"{i}_o", mixed.transpose(1, 2).flatten(2))
        inner_BTP = F.silu(self._linear(f"{i}_up", self._norm(f"{i}_norm_2", z_BTP)))
        return z_BTP + self._linear(f"{i}_down", inner_BTP), kept


def rotated(x_BTP: Tensor, positions: Tensor, heads: int) -> Tensor:
    """Return x with each head rotated by its position, in halves as in Llama."""
    x_BThD = x_BTP.unflatten(-1, (heads, -1))
    D = x_BThD.shape[-1]
    steps = torch.arange(0, D, 2, device=x_BTP.device, dtype=torch.float32)
    angle = positions[..., None, None].float() * BASE ** (-steps / D)  # [B, T, 1, D / 2]
    first, second = x_BThD.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).flatten(2)
