"""The low-rank layer of PELA, its start from the weight's SVD, and its perturbation term.

Shapes: I in, O out, R rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from petl.core.layers.context import add_gradient
from petl.core.layers.layer import Adapter, AdapterLayer, LayerInfo, LayerShape
from petl.core.method import (
    Method,
    NewAdapters,
    Settings,
    Target,
    TrainContext,
    WrapContext,
    linear_targets,
)
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.register import register
from petl.core.support import Capability
from petl.errors import InputError
from petl.methods.pela.config import PelaConfig
from petl.ops.low_rank import product_dtype
from petl.system import collectives as distributed
from petl.system.progress import Pass

OVERSAMPLING, POWER_ITERATIONS = 10, 2  # of the randomized SVD
NO_MERGE = (
    "PELA's factors stand in place of the weight, so a merged model would be as large as the base "
    "and less exact; write the small model with petl.methods.pela.export(model) or "
    "`petl export --small`"
)


class PelaFactors(NamedTuple):
    """B [O, R] and A [R, I] of a layer, on the CPU, and `|BA - W| / |W|`."""

    B: Tensor
    A: Tensor
    error: float


class PelaAdapter(Adapter):
    """The layer that replaces its base layer: `low_A` [R, I], `low_B` [O, R], `bias` [O] or none.

    Attributes:
        is_empty: True until the tensors are known to come from an SVD or a file.
        error: `|BA - W| / |W|` of the SVD; None for an adapter from a file.
    """

    def __init__(self, shape: LayerShape, config: PelaConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        I, O, R = *shape, info.settings["rank"]
        self.low_A = nn.Parameter(torch.zeros(R, I))
        self.low_B = nn.Parameter(torch.zeros(O, R))
        self.bias = nn.Parameter(torch.zeros(O)) if info.settings["has_bias"] else None
        self.perturb_weight, self.perturb_eps = config.perturb_weight, config.perturb_eps
        self.is_empty = True
        self.error: float | None = None

    @torch.no_grad()
    def start(self, factors: PelaFactors, bias: Tensor | None) -> None:
        """Set the tensors to the factors of the weight and to the bias of the base layer."""
        self.low_A.copy_(factors.A)
        self.low_B.copy_(factors.B)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        self.is_empty, self.error = False, factors.error

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_empty = False

    def require_values(self) -> None:
        """Raise InputError if the tensors still are the zeros of a new adapter."""
        if self.low_B.is_meta or isinstance(self.low_B, FakeTensor):  # a dry run
            return
        if not self.low_B.any():
            raise InputError(
                f"the factors of {self.info.key} have no values: load the adapter's file, or start "
                "from the weights with petl.wrap(model, 'pela')"
            )
        self.is_empty = False  # transformers' own loader sets tensors one by one

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Return the output of the low-rank layer, [..., O]; the base layer is not called."""
        y, context = self.product(x), self.info.context
        if self.training and self.perturb_weight > 0 and context.scale is not None:
            term = self.perturbation()
            context.record(f"{self.info.key}.{self.info.adapter_name}", term)
            y = add_gradient(y, term, context.scale)
        return y

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output of the low-rank layer in place of `y`."""
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """`(x A^T) B^T + bias`, [..., O], in the dtype of the base layer's products."""
        if self.is_empty:
            self.require_values()
        dtype = product_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        h = F.linear(x.to(dtype), self.low_A.to(dtype))
        return F.linear(h, self.low_B.to(dtype), bias)

    def perturbation(self) -> Tensor:
        """This layer's part of the perturbation term, 0-d.

        The largest difference is looked for without a graph, in the dense product; the gradient of
        its entry (o, i) needs row o of B and column i of A only.
        """
        W = dense_weight(self.info.layer)
        A, B = self.low_A, self.low_B
        with torch.autocast(W.device.type, enabled=False):
            with torch.no_grad():
                place = (B @ A - W).abs().argmax()  # a tensor: the device is not waited for
                o, i = place // W.shape[1], place % W.shape[1]
            largest = (B[o] @ A[:, i] - W[o, i]).abs()
            weight = self.perturb_weight / self.info.settings["layers"]
            return weight * (largest - self.perturb_eps).square()


def dense_weight(layer: AdapterLayer) -> Tensor:
    """The base weight of a layer as [O, I], dequantized, in float32 or more."""
    weight = layer.get_base_weight().detach()
    weight = weight.t() if layer.fan_in_fan_out else weight  # Conv1D stores [I, O]
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def decomposed(layer: AdapterLayer, key: str, rank: int, svd: str) -> PelaFactors:
    """The factors of a layer's weight.

    Raises:
        InputError: the weight has values that are not finite.
    """
    W = dense_weight(layer)
    if not W.isfinite().all():
        raise InputError(
            f"the weight of {key} has nan or infinite entries; leave the layer out with "
            "exclude_modules, or use another model"
        )
    if svd == "full":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        q = min(rank + OVERSAMPLING, *W.shape)
        # the same draw in each run, whichever process decomposes the layer
        with torch.random.fork_rng([W.device] if W.device.type == "cuda" else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(W, q=q, niter=POWER_ITERATIONS)
        Vh = V.t()
    root = S[:rank].sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    error = float((B @ A - W).norm() / W.norm().clamp(min=torch.finfo(W.dtype).tiny))
    return PelaFactors(B.cpu(), A.cpu(), error)


@register
class Pela(Method[PelaConfig, PelaAdapter]):
    """Two thin factors in place of each weight, from its SVD."""

    name = "pela"
    config_cls, adapter_cls = PelaConfig, PelaAdapter
    summary = "two thin factors in place of each weight, from its SVD; exported as a smaller model"
    paper = (
        "Guo et al. 2024, PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, "
        "CVPR, arXiv:2310.10700"
    )
    need = "a smaller model"
    recommended = "a plain model with half of the weights, and fewer operations"
    lr = 3e-4
    lacks = {Capability.MERGE: NO_MERGE, Capability.EXPERTS: ""}

    def calibrate(self, c: WrapContext[PelaConfig]) -> None:
        """Start from the weights, also with a config that was read from a file."""
        c.config.is_saved = False

    def targets(self, c: WrapContext[PelaConfig]) -> list[Target]:
        """The linear layers, without those of fewer than `min_out_features` outputs."""
        found, least = linear_targets(c, ""), c.config.min_out_features
        kept = [target for target in found if target.shape.out_features >= least]
        if not kept:
            raise InputError(
                f"no target has min_out_features={least} outputs or more; lower it, or choose "
                "other target_modules"
            )
        if len(kept) < len(found):
            c.config.target_modules = {target.stack or target.path for target in kept}
        return kept

    def settings(self, c: WrapContext[PelaConfig]) -> dict[str, Settings]:
        """Rank of each target, whether it has a bias, and the number of targets."""
        settings: dict[str, Settings] = {}
        for key, shape in c.shapes.items():
            module = c.model.get_submodule(key)
            base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
            has_bias = getattr(base, "bias", None) is not None
            rank = c.config.rank(key, shape)
            settings[key] = {"rank": rank, "has_bias": has_bias, "layers": len(c.targets)}
        return settings

    def added(self, new: NewAdapters[PelaConfig, PelaAdapter]) -> None:
        """Unless a file follows, decompose the weights, each in one process.

        The signs of an SVD differ between devices.
        """
        found = new.adapters
        weights = [cast(Any, a.info.layer).get_base_layer().weight for a in found.values()]
        # a dry run, or a model that is loaded later
        is_meta = any(t.is_meta for t in (*weights, *(a.low_A for a in found.values())))
        if new.config.is_saved or is_meta:
            return
        with Pass("decomposing weights", len(found), unit="layers", quiet=True) as shown:

            def make(key: str) -> PelaFactors:
                adapter = found[key]
                rank = len(adapter.low_A)
                factors = decomposed(adapter.info.layer, key, rank, new.config.svd)
                shown.advance()
                return factors

            parts = distributed.shared_out([partial(make, key) for key in found])
        for adapter, part in zip(found.values(), parts, strict=True):
            adapter.start(part, getattr(adapter.info.layer.get_base_layer(), "bias", None))

    def joins(self, configs: Sequence[PelaConfig]) -> str:
        """Several adapters are never active together."""
        return "each adapter of PELA replaces the layer; activate one of them"

    @torch.no_grad()
    def heat_maps(self, t: TrainContext[PelaConfig, PelaAdapter]) -> list[HeatMap]:
        """The relative difference between each product of factors and its weight."""
        percent = {}
        for key, adapter in t.adapters:
            layer = adapter.info.layer
            weight = layer.get_base_weight()
            # a shard of FSDP2 has no norm of the complete weight
            if isinstance(weight, DTensor) or weight.is_meta:
                continue
            W, factors = dense_weight(layer), adapter.tensors()
            product = factors["low_B"].to(W) @ factors["low_A"].to(W)
            percent[key] = 100 * float((product - W).norm() / W.norm())
        return of_layers(
            t.model,
            percent,
            "low_rank_error",
            "Distance of the low-rank product from the weight",
            "% of the weight's norm",
            "How far the product of both factors is from the weight that they replace: the part of "
            "the weight that the SVD cut off, and what training has changed.",
        )
