"""Keys and values of one head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.methods.dkvb.config import DkvbConfig
from petl.methods.dkvb.keys import nearest


class DkvbAdapter(Adapter):
    """Codebooks in place of a linear head: logits from the values of the nearest keys.

    `values` [C, K, v] and, with a linear decoder, `decoder` [O, C v] train; `keys` [C, K, d] and,
    unless the input is split, `projection` [C, d, D] are saved buffers. All are float32.

    Attributes:
        uses: how often training has picked each key, [C, K]; on this process, not saved.
        collected: while it is a list, forward passes add their pieces [n, C, d] to it.
        has_keys: False for keys as they were drawn, without a key phase.
    """

    keys: Tensor
    projection: Tensor
    uses: Tensor
    keep_float32 = True
    decays = False
    of_own_rows = ("uses",)

    def __init__(self, shape: LayerShape, config: DkvbConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        C, K, (D, O) = config.codebooks, config.pairs, shape
        d, v = config.width(D), config.value_width(O)
        f32 = torch.float32
        self.values = nn.Parameter(torch.zeros(C, K, v, dtype=f32))
        if config.decoder == "linear":
            bound = (C * v) ** -0.5
            self.decoder = nn.Parameter(torch.empty(O, C * v, dtype=f32).uniform_(-bound, bound))
        # on the CPU, so that they are the same for every device, and apart from the run's seed
        generator = torch.Generator().manual_seed(config.seed)
        place = self.values.device
        if config.projection == "random":
            R = torch.randn(C, d, D, generator=generator, device="cpu", dtype=f32) * D**-0.5
            self.register_buffer("projection", R.to(place))
        drawn = torch.randn(C, K, d, generator=generator, device="cpu", dtype=f32)
        self.register_buffer("keys", drawn.to(place))
        self.register_buffer("uses", torch.zeros(C, K, dtype=f32), persistent=False)
        self.collected: list[Tensor] | None = None
        self.has_keys = False

    def check_saved(self, tensors: object) -> None:
        """Note that the keys of a file come from a key phase."""
        self.has_keys = True

    def combination_refusal(self) -> str:
        """Return why no other adapter may be active beside it."""
        return "dkvb replaces the output of the head, so one adapter is active at a time"

    @torch.no_grad()
    def pieces(self, x: Tensor) -> Tensor:
        """Return the pieces of each row or token of `x` [..., D], [n, C, d]."""
        C, _, d = self.keys.shape
        z = x.detach().float().reshape(-1, x.shape[-1])
        if "projection" in self._buffers:
            z = z @ self.projection.flatten(0, 1).t()
        return z.view(len(z), C, d)

    def picked(self, x: Tensor) -> Tensor:
        """Return the index of the nearest key for each row or token of `x` [..., D], [n, C]."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            pieces = self.pieces(x)
            if self.collected is not None:
                self.collected.append(pieces)
            return nearest(pieces, self.keys)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of each row or token of `x` [..., D], [..., O], in float32."""
        picked = self.picked(x)
        C, K = self.values.shape[:2]
        # the tables one after the other: a key's index in them is its own plus that of its table
        index = picked + K * torch.arange(C, device=picked.device)
        if self.info.context.recording:
            self.uses.view(-1).index_add_(
                0, index.flatten(), torch.ones_like(index, dtype=self.uses.dtype).flatten()
            )
        table = self.values.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            if hasattr(self, "decoder"):
                out = F.linear(F.embedding(index, table).flatten(1), self.decoder)
            else:
                out = F.embedding_bag(index, table, mode="sum") / C
        return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logits in the shape and dtype of `y`, the output of the head, [..., O]."""
        out = self.logits(x)
        if out.dim() < y.dim():  # one mean for all tokens of a row
            out = out.unsqueeze(-2).expand_as(y)
        return out.to(y.dtype)

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Return the logits [..., O], in float32; the head itself is not computed."""
        return self.logits(x)
