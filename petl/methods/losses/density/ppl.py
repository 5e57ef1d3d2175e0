"""PPL-p% sparsity: the fraction of MLP neurons that can be left out at p % more perplexity.

Luo et al. 2025, "Sparsing Law" (arXiv:2411.02335). Neuron i of a block adds `a_i W[:, i]` to its
output, with a the input of the down projection; its norm is `|a_i| ||W[:, i]||`. Neurons below a
threshold are left out. The cost for a layer is its CETT (cumulative error of tail truncation): the
norm of the omitted part over the norm of the output, averaged over tokens. Each layer gets the
largest threshold with a CETT of at most one common value, and the search finds the largest common
value that keeps the perplexity within p %.

Shapes: F neurons, N rows (tokens) of a call, O out.

Unlike the authors' search over quantiles of a sample, this one bisects over all tokens, and returns
0 if no threshold is possible. `W` is the weight of the adapted layer, measured by calling the layer
on unit vectors.
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
from petl.core.spec.config import require
from petl.core.types import Record
from petl.errors import InputError, UnsupportedError
from petl.methods.losses.density.tokens import inputs_of
from petl.ops import IGNORED

Batch = Mapping[str, Any]
TokenMask = Callable[[str, Batch, Tensor], Tensor | None]

# assumptions
COST_STEPS = 20  # bisection steps for the common CETT
CLOSE = 0.005  # relative tolerance of a layer's CETT below the common one
UNIT_VECTORS = 512  # rows of a call of a down projection, to bound memory
HELD_BYTES = 4 * 2**30  # of dense activations in memory; beyond, they are computed again each time


class Search:
    """The search on one set of batches, for a model in evaluation mode.

    With several processes, each passes its own batches; sums are reduced, so all results are equal.

    Args:
        model: called with batches; its output has a loss.
        base: the model that has the down projections.
        names: paths of the down projections in `base`.
        batches: dicts of model inputs with labels.
        token_mask: called with (name, inputs of `base`, values [..., F]), returns the mask of rows
            that are tokens, or None if all are.

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
        self.layers = {name: PplLayer(name, base.get_submodule(name)) for name in names}
        # threshold 0 keeps all neurons; also measures the bytes of activations
        self.dense, _ = self.perplexity(dict.fromkeys(names, 0.0))
        self.groups = self._groups()
        for group in self.groups:
            self._hold(group)
            for layer in group:
                layer.begin()

    def run(self, p: float) -> Record:
        """Bisect the common CETT; returns the result of `ActivationDensity.ppl_sparsity`."""
        thresholds = dict.fromkeys(self.layers, 0.0)
        best = (0.0, thresholds, *self.perplexity(thresholds))
        low, high = 0.0, 2.0  # so that 1, which leaves out everything, is tried first
        for _ in range(COST_STEPS):
            cost = (low + high) / 2
            thresholds = self._thresholds(cost)
            ppl, kept = self.perplexity(thresholds)
            if ppl <= self.dense * (1 + p / 100):
                low, best = cost, (cost, thresholds, ppl, kept)  # it fits: try a higher cost
            else:
                high = cost
            if low == 1:  # nothing more to leave out
                break
        cost, thresholds, ppl, kept = best
        ratio = sum(kept.values()) / len(kept)
        return {
            "sparsity": 1 - ratio,
            "activation_ratio": ratio,
            "per_layer": {name: 1 - fraction for name, fraction in kept.items()},
            "cett": cost,
            "thresholds": thresholds,
            "ppl_dense": self.dense,
            "ppl_sparse": ppl,
        }

    def perplexity(self, thresholds: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Perplexity without neurons below the thresholds, and the kept fraction by layer."""
        loss = torch.zeros(2, dtype=torch.float64)
        kept = {name: torch.zeros(2) for name in thresholds}  # sum over tokens, tokens

        def leave_out(name: str, inputs: Batch, a: Tensor) -> Tensor:
            layer = self.layers[name]
            layer.bytes += a.numel() * a.element_size()
            keep = layer.strength(a) >= thresholds[name]
            sums = self._sum_over_tokens(name, inputs, keep.float().mean(-1, keepdim=True))
            kept[name] = kept[name].to(sums) + sums
            return a * keep

        for layer in self.layers.values():
            layer.bytes = 0
        with self._at_inputs(self.layers, leave_out) as inputs:
            for batch in self.batches:
                loss += self._loss(batch, inputs)
        flat = total(torch.stack([loss, *(k.double().cpu() for k in kept.values())])).tolist()
        fractions = {name: s / max(n, 1.0) for name, (s, n) in zip(kept, flat[1:], strict=True)}
        require(flat[0][1] > 0, "no token of the batches has a label; pass batches with labels")
        return math.exp(flat[0][0] / flat[0][1]), fractions

    def _loss(self, batch: Batch, inputs: Batch) -> Tensor:
        """Loss summed over labels, and the number of labels, on the CPU."""
        labels = batch.get("labels")
        if labels is None or labels.is_floating_point():
            kind = "no labels" if labels is None else f"labels of dtype {labels.dtype}"
            raise InputError(
                f"ppl_sparsity needs labels of tokens or classes in every batch, and one has {kind}"
            )
        loss = self.model(**batch).loss
        count = counted_labels(self.base, inputs["labels"], inputs).ne(IGNORED).sum()
        # the model's loss is a mean, which is NaN without labels: weigh it by their number
        summed = loss.double() * count if count else torch.zeros_like(loss, dtype=torch.float64)
        return torch.stack([summed, count.double()]).cpu()

    def _sum_over_tokens(self, name: str, inputs: Batch, values: Tensor) -> Tensor:
        """Sum of values [..., 1] over the rows that are tokens, and the number of tokens."""
        mask, rows = self.token_mask(name, inputs, values), values.flatten()
        weight = torch.ones_like(rows) if mask is None else mask.to(rows)
        return torch.stack([(rows * weight).sum(), weight.sum()])

    @contextmanager
    def _at_inputs(self, names: Iterable[str], change: Any) -> Generator[Batch]:
        """Context in which `change(name, inputs, a)` replaces the inputs of down projections.

        Yields `inputs`, the inputs of the base model's last forward pass.
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

    def _groups(self) -> list[list["PplLayer"]]:
        """Split the layers into groups whose dense activations fit `HELD_BYTES` together."""
        groups: list[list[PplLayer]] = [[]]
        for layer in self.layers.values():
            if groups[-1] and sum(other.bytes for other in groups[-1]) + layer.bytes > HELD_BYTES:
                groups.append([])
            groups[-1].append(layer)
        return groups

    def _hold(self, group: Sequence["PplLayer"]) -> None:
        """Store the dense activations of these layers, and free those of others."""
        # a single group stays in memory for all cost values
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
        """The largest threshold of each layer whose CETT is at most `cost`."""
        found = {}
        for group in self.groups:
            self._hold(group)
            found |= {layer.name: layer.threshold(cost) for layer in group}
        return found


class PplLayer:
    """One down projection: the norms of its columns, and its CETT as a function of the threshold.

    The update of an adapter that routes, that is not linear, or that reads another module's input
    is not a matrix: norms and CETT are then those of the base layer.

    Attributes:
        module: the module whose inputs are replaced.
        matrix: the layer that is one matrix for all inputs.
        held: dense inputs [N, F] of each call.
        bytes: their size in memory.
        curve: pairs of threshold and CETT measured so far, sorted.
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
                f"{name} ({type(self.matrix).__name__}) is not one matrix for all inputs, so its "
                "neurons have no norm; PPL sparsity is not defined for it"
            )
        self.norms = norms

    def _column_norms(self) -> Tensor | None:
        """Norms [F] of the columns of the layer's matrix; None if the layer is not linear."""
        weight = next(self.matrix.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            return self._norms_like(weight)

    def _norms_like(self, weight: Tensor) -> Tensor | None:
        """`_column_norms` by calls in the dtype of `weight`.

        Linearity is checked by comparing the sum of the columns with the output for a vector of
        ones.
        """
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        width: Any = getattr(self.matrix, "in_features", None) or self.matrix.nx
        ones = torch.ones(1, width, dtype=dtype, device=weight.device)
        self.zero = self.matrix(torch.zeros_like(ones))  # the bias
        norms, column_sum = [], torch.zeros_like(self.zero, dtype=torch.float32)
        for part in torch.arange(width, device=weight.device).split(UNIT_VECTORS):
            units = nn.functional.one_hot(part, width).to(dtype)
            columns = self.matrix(units).float() - self.zero
            norms.append(columns.norm(dim=1))
            column_sum += columns.sum(0)
        expected = self.matrix(ones).float() - self.zero
        gap = (column_sum - expected).norm() / expected.norm()
        is_linear = gap <= (1e-3 if dtype == torch.float32 else 0.03)  # rounding; assumptions
        return torch.cat(norms) if is_linear else None

    def strength(self, a: Tensor) -> Tensor:
        """The norm of each neuron's output, `|a_i| ||W[:, i]||`, in float32."""
        return a.float().abs() * self.norms

    def begin(self) -> None:
        """Measure the norms of the dense outputs and both ends of the curve."""
        self.sizes = [self.matrix(a).float().norm(dim=1).clamp(min=1e-30) for a in self.held]
        largest = max((float(self.strength(a).max()) for a in self.held if len(a)), default=0.0)
        end = float(total(torch.tensor(largest), largest=True)) * 1.001  # above every neuron
        self.curve = [(0.0, 0.0), (end, self.cett(end))]

    def cett(self, threshold: float) -> float:
        """Mean over tokens of the norm of the omitted part over the norm of the output."""
        sums = torch.zeros(2, dtype=torch.float64)
        for a, size in zip(self.held, self.sizes, strict=True):
            part = self.matrix(a * (self.strength(a) < threshold)) - self.zero
            ratio = part.float().norm(dim=1) / size
            sums += torch.tensor([float(ratio.sum()), len(ratio)], dtype=sums.dtype)
        omitted, tokens = total(sums).tolist()
        return omitted / max(tokens, 1.0)

    def threshold(self, cost: float) -> float:
        """The largest threshold found with a CETT of at most `cost`, by regula falsi; at least 0.

        Measured points are kept in `curve` for later calls.
        """
        while True:
            fits = max(i for i, (_, cett) in enumerate(self.curve) if cett <= cost)
            low, cett = self.curve[fits]
            if fits == len(self.curve) - 1 or cost - cett <= CLOSE * cost:
                return low
            high, above = self.curve[fits + 1]
            if high - low <= 1e-6 * self.curve[-1][0]:
                return low
            position = (cost - cett) / (above - cett)
            # kept off the ends, where interpolation converges slowly
            middle = low + (high - low) * min(max(position, 0.1), 0.9)
            insort(self.curve, (middle, self.cett(middle)))


def _adds_no_matrix(module: nn.Module) -> TypeGuard[AdapterLayer]:
    """True if one of petl's own adapters on a layer is not an update of its weight."""
    return isinstance(module, AdapterLayer) and any(
        not adapter.is_matrix for _, adapter in module.pick(module.active_adapters)
    )


def total(sums: Tensor, *, largest: bool = False) -> Tensor:
    """`sums` added over all processes, or their maximum."""
    if num_processes() > 1:
        operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        on_device = sums.to(_device())
        torch.distributed.all_reduce(on_device, op=operation)
        sums = on_device.cpu()
    return sums


def _device() -> torch.device:
    """The device of tensors for the default process group."""
    backend = torch.distributed.get_backend()
    return torch.device("cuda" if backend == "nccl" else "cpu")
