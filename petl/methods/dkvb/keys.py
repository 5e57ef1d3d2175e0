"""Nearest keys, and the key phase of DKVB.

Shapes: n pieces of each codebook, C codebooks, K keys of each, d width of a key.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.layers.context import InputCapture
from petl.core.masks import as_2d
from petl.errors import InputError
from petl.system.collectives import gathered

TIE = 4 * torch.finfo(torch.float32).eps  # relative difference of equal distances
# of equal keys: those that averages over the same rows make differ by up to 6 eps
SAME = 64 * torch.finfo(torch.float32).eps
EPS = 1e-5  # e of the smoothed counts
ROWS = 1024  # rows whose distances, C K each, exist at a time; assumption


@torch.no_grad()
def nearest(pieces: Tensor, keys: Tensor) -> Tensor:
    """Return the index of the nearest key in each codebook, the first of equal ones, [n, C].

    Distances are equal if they differ by a few units of rounding, and keys by some more: those that
    calibration has made equal differ by that much, and which of them is nearer to a piece changes
    with the batch in which it was computed.

    Args:
        pieces: [n, C, d], float32.
        keys: [C, K, d], float32.
    """
    parts = []
    for part in pieces.split(ROWS):
        # by differences: |z|^2 - 2 z k + |k|^2 rounds relative to the longest vector, and all keys
        # would be equally near to a long row, or beside one long key
        distances = torch.cdist(
            part.transpose(0, 1), keys, compute_mode="donot_use_mm_for_euclid_dist"
        )
        least = distances.amin(-1, keepdim=True) * (1 + TIE)
        # [C, n]; each pair alone, so the same in any batch
        found = (distances <= least).byte().argmax(-1)
        own = keys.take_along_dim(found.unsqueeze(-1), 1)  # [C, n, d]
        allowed = SAME * own.norm(dim=-1)
        # equal keys are as near, up to what they may differ by
        first = (distances <= least + allowed.unsqueeze(-1)).byte().argmax(-1)
        equal = (own - keys.take_along_dim(first.unsqueeze(-1), 1)).norm(dim=-1) <= allowed
        found = torch.where(equal, first, found)
        parts.append(found)
    return torch.cat(parts, 1).t() if parts else pieces.new_zeros(pieces.shape[:2]).long()


class Keys:
    """Keys that follow the pieces nearest to them, by a moving average.

    Args:
        keys: at the start, [C, K, d]; not changed.
        decay: of the average, from 0 to below 1.
        dead: a key with a smaller average count restarts at a random piece of the batch.
        seed: of the choice of these pieces.

    Attributes:
        keys: [C, K, d], float32.
        counts: N, the average counts, [C, K].

    Raises:
        InputError: `keys` is not of that shape, or an argument out of range.
    """

    def __init__(self, keys: Tensor, decay: float = 0.95, dead: float = 0.1, seed: int = 0) -> None:
        if keys.dim() != 3 or 0 in keys.shape:
            raise InputError(f"keys have the shape {tuple(keys.shape)}, not [codebooks, pairs, d]")
        if not 0 <= decay < 1:
            raise InputError(f"decay={decay} is not in [0, 1)")
        if not dead >= 0:
            raise InputError(f"dead={dead} is not at least 0")
        self.keys = keys.detach().float().clone()
        self.decay, self.dead = decay, dead
        self.counts = torch.ones(keys.shape[:2], device=keys.device)
        self.sums = self.keys.clone()  # M
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, pieces: Tensor) -> None:
        """Update the keys with a batch, which the batches of all processes make up together.

        All processes must call it, with an empty batch if they have none. The order of the rows
        does not matter.

        Args:
            pieces: [n, C, d], of this process.

        Raises:
            InputError: their widths are not those of the keys.
        """
        C, K, d = self.keys.shape
        if pieces.dim() != 3 or pieces.shape[1:] != (C, d):
            raise InputError(
                f"pieces have the shape {tuple(pieces.shape)}, not [rows, {C}, {d}] as the keys"
            )
        parts = gathered(pieces.detach().float().cpu())
        pieces = torch.cat(parts).to(self.keys.device)
        if not len(pieces):
            return
        picked = nearest(pieces, self.keys).t()  # [C, n]
        found = torch.zeros_like(self.counts)
        found.scatter_add_(1, picked, torch.ones_like(picked, dtype=found.dtype))
        sums = torch.zeros_like(self.sums)
        sums.scatter_add_(1, picked.unsqueeze(-1).expand(-1, -1, d), pieces.transpose(0, 1))
        self.counts.lerp_(found, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum(-1, keepdim=True)
        smoothed = (self.counts + EPS) / (total + K * EPS) * total
        self.keys = self.sums / smoothed.unsqueeze(-1)
        self._restart(pieces)

    def _restart(self, pieces: Tensor) -> None:
        """Put keys with a count below `dead` on random pieces."""
        dead = self.counts < self.dead
        for c in dead.any(-1).nonzero().flatten().tolist():
            (k,) = dead[c].nonzero(as_tuple=True)
            chosen = drawn(pieces[:, c], len(k), self.generator)
            self.keys[c, k] = self.sums[c, k] = chosen
            self.counts[c, k] = 1.0


def start_keys(pieces: Tensor, pairs: int, generator: torch.Generator) -> Tensor:
    """Return keys at random pieces of each codebook, [C, K, d], drawn from `pieces`, [n, C, d]."""
    return torch.stack([drawn(part, pairs, generator) for part in pieces.unbind(1)])


def drawn(pieces: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of the pieces [n, d], each at most once if there are enough, [count, d].

    The draw depends on the set of pieces, not on their order, so that it is the same on any number
    of processes.
    """
    n = len(pieces)
    order = torch.arange(n, device=pieces.device)
    for column in range(pieces.shape[1] - 1, -1, -1):  # sorted by the first entry, then the second
        order = order[pieces[order, column].argsort(stable=True)]
    if count <= n:
        chosen = torch.randperm(n, generator=generator)[:count]
    else:
        chosen = torch.randint(n, (count,), generator=generator)
    return pieces[order[chosen.to(order.device)]]


def use_of(counts: Tensor) -> tuple[float, float]:
    """Return the fraction of keys that were picked, and the perplexity of the picks.

    The perplexity, the mean over codebooks, is 1 if one key has all picks of a codebook and K if
    all keys have equally many.

    Args:
        counts: how often each key was picked, [C, K]; not all 0.
    """
    counts = counts.double()
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    perplexity = torch.special.entr(p).sum(-1).exp().mean()
    return counts.ne(0).double().mean().item(), perplexity.item()


# The mean of the encoder's last states, as input of the head


class MeanCapture(InputCapture):
    """Forward hook that stores the mean of an encoder's last states over the attention mask."""

    def attach(self, model: nn.Module) -> None:
        """Register the hook on the encoder."""
        module = model.get_submodule(self.source)
        self.handle = module.register_forward_hook(self.keep, with_kwargs=True)

    def keep(
        self, module: nn.Module, args: object, kwargs: Mapping[str, object], output: Any
    ) -> None:
        """Store the mean of the states in `output`."""
        # not under no_grad: `state` is that of the grad mode in which the head runs
        states = output[0] if isinstance(output, tuple) else output.last_hidden_state
        self.context.state[self.place] = mean_state(states.detach(), kwargs.get("attention_mask"))


def mean_state(states: Tensor, mask: object) -> Tensor:
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
