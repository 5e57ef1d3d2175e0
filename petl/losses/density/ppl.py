"""PPL-p% sparsity: how many MLP neurons can be left out at p per cent more perplexity.

Luo et al. 2025, "Sparsing Law" (arXiv:2411.02335). Neuron i of a block adds `a_i W[:, i]` to its
output, a the input of the down projection; its norm is `|a_i| ||W[:, i]||`. Below a threshold it is
left out. What that costs a layer is its CETT, the norm of what is left out over that of the whole
output, averaged over tokens. All layers get the largest thresholds with a CETT of at most one
common value, and the largest such value is sought that keeps the perplexity.

Unlike the authors' search, which looks at quantiles of a sample, this one bisects on all tokens,
and gives 0 where nothing fits. `W` is that of the adapted layer, found by asking the layer itself.
"""

import math
from bisect import insort
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.layers.context import counted_labels, num_processes
from petl.core.layers.layer import AdapterLayer
from petl.errors import InputError, UnsupportedError
from petl.losses.density.tokens import inputs_of

Batch = Mapping[str, Any]
TokenMask = Callable[[str, Batch, Tensor], Tensor | None]

COST_STEPS = 20  # values of the common CETT that are tried
CLOSE = 0.005  # a layer's CETT may fall short of the common one by this share of it
UNIT_VECTORS = 512  # put through a down projection at a time
HELD_BYTES = 4 * 2**30  # of dense activations; beyond it they are computed again for each value


class Search:
    """The search over one set of batches, for a model in evaluation mode.

    With several processes, each searches over its own batches, and all find the same.

    Args:
        model: called with batches; its output has a loss.
        base: the model with the down projections in it.
        names: of the down projections in `base`.
        batches: dicts of model inputs with labels.
        token_mask: called with (name, inputs of `base`, values [..., F]): which rows are tokens;
            None: all.

    Raises:
        InputError: a batch without labels.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        names: Sequence[str],
        batches: Sequence[Batch],
        token_mask: TokenMask,
    ) -> None:
        self.model, self.base, self.batches, self.token_mask = model, base, batches, token_mask
        self.layers = {name: Layer(name, base.get_submodule(name)) for name in names}
        self.dense, _ = self.perplexity(dict.fromkeys(names, 0.0))
        self.groups = self._groups()
        for group in self.groups:
            self._hold(group)
            for layer in group:
                layer.begin()

    def run(self, p: float) -> dict[str, Any]:
        """What `ActivationDensity.ppl_sparsity` returns."""
        thresholds = dict.fromkeys(self.layers, 0.0)
        best = (0.0, thresholds, *self.perplexity(thresholds))
        low, high = 0.0, 2.0  # so that all of it, a CETT of 1, is tried first
        for _ in range(COST_STEPS):
            cost = (low + high) / 2
            thresholds = self._thresholds(cost)
            ppl, kept = self.perplexity(thresholds)
            if ppl <= self.dense * (1 + p / 100):
                low, best = cost, (cost, thresholds, ppl, kept)
            else:
                high = cost
            if low == 1:
                break
        cost, thresholds, ppl, kept = best
        ratio = sum(kept.values()) / len(kept)
        return {
            "sparsity": 1 - ratio,
            "activation_ratio": ratio,
            "per_layer": {name: 1 - share for name, share in kept.items()},
            "cett": cost,
            "thresholds": thresholds,
            "ppl_dense": self.dense,
            "ppl_sparse": ppl,
        }

    def perplexity(self, thresholds: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Perplexity without the neurons below the thresholds, and by layer the share kept."""
        loss = torch.zeros(2, dtype=torch.float64)
        kept = {name: torch.zeros(2) for name in thresholds}  # sum over tokens, tokens

        def leave_out(name: str, inputs: Batch, a: Tensor) -> Tensor:
            layer = self.layers[name]
            layer.bytes += a.numel() * a.element_size()
            keep = layer.strength(a) >= thresholds[name]
            share = self._sum_over_tokens(name, inputs, keep.float().mean(-1, keepdim=True))
            kept[name] = kept[name].to(share) + share
            return a * keep

        for layer in self.layers.values():
            layer.bytes = 0
        with self._at_inputs(self.layers, leave_out) as inputs:
            for batch in self.batches:
                loss += self._loss(batch, inputs)
        flat = total(torch.stack([loss, *(k.double().cpu() for k in kept.values())])).tolist()
        shares = {name: s / max(n, 1.0) for name, (s, n) in zip(kept, flat[1:], strict=True)}
        return math.exp(flat[0][0] / flat[0][1]), shares

    def _loss(self, batch: Batch, inputs: Batch) -> Tensor:
        """Sum of the loss over the labels that it is a mean of, and their number, on the CPU."""
        labels: Any = batch.get("labels")
        if labels is None or labels.is_floating_point():
            raise InputError("ppl_sparsity needs labels of tokens or classes in every batch")
        loss = self.model(**batch).loss
        count = counted_labels(self.base, inputs["labels"], inputs).ne(-100).sum()
        return torch.stack([loss.double() * count, count.double()]).cpu()

    def _sum_over_tokens(self, name: str, inputs: Batch, figure: Tensor) -> Tensor:
        """Sum of a figure [..., 1] over the rows that are tokens, and their number."""
        mask, rows = self.token_mask(name, inputs, figure), figure.flatten()
        weight = torch.ones_like(rows) if mask is None else mask.to(rows)
        return torch.stack([(rows * weight).sum(), weight.sum()])

    @contextmanager
    def _at_inputs(self, names: Iterable[str], change: Any) -> Generator[Batch]:
        """Let `change(name, inputs, a)` replace the inputs of down projections.

        `inputs` are those of the base model in that forward pass, and what the block is given.
        """
        with inputs_of(self.base) as inputs:

            def hook(module: nn.Module, args: Any, *, name: str) -> tuple[Any, ...]:
                return (change(name, inputs, args[0]), *args[1:])

            handles = [
                self.layers[name].module.register_forward_pre_hook(partial(hook, name=name))
                for name in names
            ]
            try:
                yield inputs
            finally:
                for handle in handles:
                    handle.remove()

    # Dense activations and thresholds

    def _groups(self) -> list[list["Layer"]]:
        """Layers whose dense activations are held together."""
        groups: list[list[Layer]] = [[]]
        for layer in self.layers.values():
            if groups[-1] and sum(other.bytes for other in groups[-1]) + layer.bytes > HELD_BYTES:
                groups.append([])
            groups[-1].append(layer)
        return groups

    def _hold(self, group: Sequence["Layer"]) -> None:
        """Hold the dense activations of these layers, and no others."""
        if all(layer.held for layer in group):
            return
        for layer in self.layers.values():
            layer.held = []

        def keep(name: str, inputs: Batch, a: Tensor) -> Tensor:
            mask = self.token_mask(name, inputs, a)
            rows = a.reshape(-1, a.shape[-1])
            self.layers[name].held.append(rows if mask is None else rows[mask.bool()])
            return a

        with self._at_inputs([layer.name for layer in group], keep):
            for batch in self.batches:
                self.model(**batch)

    def _thresholds(self, cost: float) -> dict[str, float]:
        """For each layer the largest threshold found whose CETT is at most `cost`."""
        found = {}
        for group in self.groups:
            self._hold(group)
            found |= {layer.name: layer.threshold(cost) for layer in group}
        return found


class Layer:
    """One down projection: the norms of its columns, and its CETT by threshold.

    An adapter that routes, that is no linear map, or that reads the input of another module adds no
    columns to the matrix: norms and CETT are then those of the base layer below it.

    Attributes:
        module: where inputs are taken.
        matrix: the layer that is one matrix for all inputs.
        held: dense inputs [N, F], one a call.
        bytes: what they take.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.held: list[Tensor] = []
        self.bytes = 0
        self.matrix = module.get_base_layer() if _adds_no_matrix(module) else module
        norms = self._column_norms()
        if norms is None and isinstance(self.matrix, BaseTunerLayer):
            self.matrix = self.matrix.get_base_layer()
            norms = self._column_norms()
        if norms is None:
            raise UnsupportedError(
                f"{name} multiplies each input by another matrix, so its neurons have no norm"
            )
        self.norms = norms

    def _column_norms(self) -> Tensor | None:
        """Norms [F] of what each unit vector becomes, or None if their sum becomes another."""
        weight = next(self.matrix.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            return self._norms_like(weight)

    def _norms_like(self, weight: Tensor) -> Tensor | None:
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        width: Any = getattr(self.matrix, "in_features", None) or self.matrix.nx
        ones = torch.ones(1, width, dtype=dtype, device=weight.device)
        self.zero = self.matrix(torch.zeros_like(ones))
        norms, whole = [], torch.zeros_like(self.zero, dtype=torch.float32)
        for part in torch.arange(width, device=weight.device).split(UNIT_VECTORS):
            units = nn.functional.one_hot(part, width).to(dtype)
            columns = self.matrix(units).float() - self.zero
            norms.append(columns.norm(dim=1))
            whole += columns.sum(0)
        expected = self.matrix(ones).float() - self.zero
        gap = (whole - expected).norm() / expected.norm()
        close = gap <= (1e-3 if dtype == torch.float32 else 0.03)
        return torch.cat(norms) if close else None

    def strength(self, a: Tensor) -> Tensor:
        """`|a_i|` times the norm of column i, in float32."""
        return a.float().abs() * self.norms

    def begin(self) -> None:
        """Measure the dense outputs and the ends of the curve."""
        self.sizes = [self.matrix(a).float().norm(dim=1).clamp(min=1e-30) for a in self.held]
        most = max(float(self.strength(a).max()) for a in self.held) if self.held else 0.0
        end = float(total(torch.tensor(most), largest=True)) * 1.001
        self.curve = [(0.0, 0.0), (end, self.cett(end))]

    def cett(self, threshold: float) -> float:
        """Mean over tokens of the norm of what is left out over that of the whole output."""
        sums = torch.zeros(2, dtype=torch.float64)
        for a, size in zip(self.held, self.sizes, strict=True):
            part = self.matrix(a * (self.strength(a) < threshold)) - self.zero
            share = part.float().norm(dim=1) / size
            sums += torch.tensor([float(share.sum()), len(share)], dtype=sums.dtype)
        left, tokens = total(sums).tolist()
        return left / max(tokens, 1.0)

    def threshold(self, cost: float) -> float:
        """The largest threshold found with a CETT of at most `cost`; 0 if nothing fits."""
        while True:
            fits = max(i for i, (_, cett) in enumerate(self.curve) if cett <= cost)
            low, cett = self.curve[fits]
            if fits == len(self.curve) - 1 or cost - cett <= CLOSE * cost:
                return low
            high, above = self.curve[fits + 1]
            if high - low <= 1e-6 * self.curve[-1][0]:
                return low
            guess = (cost - cett) / (above - cett)
            middle = low + (high - low) * min(max(guess, 0.1), 0.9)
            insort(self.curve, (middle, self.cett(middle)))


def _adds_no_matrix(module: nn.Module) -> TypeGuard[AdapterLayer]:
    """Whether adapters of petl's own on a layer are no update of its weight."""
    return isinstance(module, AdapterLayer) and not all(
        map(module.supports_lora_conversion, module.active_adapters)
    )


def total(sums: Tensor, *, largest: bool = False) -> Tensor:
    """`sums` added up over all processes, or the largest of each."""
    if num_processes() > 1:
        operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        on_device = sums.to(_device())
        torch.distributed.all_reduce(on_device, op=operation)
        sums = on_device.cpu()
    return sums


def _device() -> torch.device:
    """Where the default group of processes takes tensors from."""
    backend = torch.distributed.get_backend()
    return torch.device("cuda" if backend == "nccl" else "cpu")
