"""The low-rank layer of PELA, its start from the weight's SVD, and its perturbation term.

Shapes: I in, O out, R rank.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from petl.core.layers.context import add_gradient
from petl.core.layers.layer import Adapter, AdapterLayer, LayerInfo, LayerShape
from petl.core.method import WrapContext, linear_target
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.targets import matched_names
from petl.core.register import register
from petl.core.support import Capability
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError, UnsupportedError
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
    """

    def __init__(self, shape: LayerShape, config: PelaConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        I, O, R = *shape, info.settings["rank"]
        self.low_A = nn.Parameter(torch.zeros(R, I))
        self.low_B = nn.Parameter(torch.zeros(O, R))
        self.bias = nn.Parameter(torch.zeros(O)) if info.settings["has_bias"] else None
        self.perturb_weight, self.perturb_eps = config.perturb_weight, config.perturb_eps
        self.is_empty = True

    @torch.no_grad()
    def start(self, factors: PelaFactors, bias: Tensor | None) -> None:
        """Set the tensors to the factors of the weight and to the bias of the base layer."""
        self.low_A.copy_(factors.A)
        self.low_B.copy_(factors.B)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        self.is_empty = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
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

    def with_base(self, x: Tensor, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
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
        W = dense_weight(self.__dict__["layer"])
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


@register(
    "pela",
    summary="two thin factors in place of each weight, from its SVD; exported as a smaller model",
    need="a smaller model",
    recommended="a plain model with half of the weights, and fewer operations",
    paper="Guo et al. 2024, PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, "
    "CVPR, arXiv:2310.10700",
    lr=3e-4,
)
class PelaModel(MethodTuner):
    """Tuner of `PelaConfig`.

    Attributes:
        errors: by adapter name and module path, `|BA - W| / |W|` at the start; not of loaded ones.
    """

    config_cls, adapter_cls = PelaConfig, PelaAdapter
    lacks = {Capability.MERGE: NO_MERGE}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.errors: dict[str, dict[str, float]] = {}
        super().__init__(*args, **kwargs)

    @staticmethod
    def on_wrap(model: nn.Module, config: PelaConfig, calibration: Any) -> None:
        """Start from the weights, also with a config that was read from a file."""
        config.is_saved = False

    def choose_targets(self, config: PelaConfig, model: nn.Module) -> None:
        """Choose the targets, without layers of fewer than `min_out_features` outputs."""
        super().choose_targets(config, model)
        names = matched_names(config, model)
        c, least = WrapContext(model, config, ""), config.min_out_features
        kept = [n for n in names if linear_target(c, n).shape.out_features >= least]
        if not kept:
            raise InputError(
                f"no target has min_out_features={config.min_out_features} outputs or more; lower "
                "it, or choose other target_modules"
            )
        if len(kept) < len(names):
            config.target_modules = {*kept}

    def layer_settings(
        self, config: PelaConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Rank of each target, whether it has a bias, and the number of targets."""
        settings = {}
        for key, shape in shapes.items():
            module: Any = model.get_submodule(key)
            base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
            has_bias = getattr(base, "bias", None) is not None
            rank = config.rank(key, shape)
            settings[key] = {"rank": rank, "has_bias": has_bias, "layers": len(shapes)}
        return settings

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject the adapter; unless a file follows, start it from the weights."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        layers: dict[str, Any] = {
            key: model.get_submodule(key) for key in self.placed[adapter_name]
        }
        for layer in layers.values():
            # in `__dict__`: the layer is the adapter's parent, not its child
            layer.adapters[adapter_name].__dict__["layer"] = layer
        if not config.is_saved:
            self._start(adapter_name, layers, config.svd)

    def _start(self, adapter_name: str, layers: Mapping[str, Any], svd: str) -> None:
        """Decompose the weights, each in one process: the signs differ between devices."""
        found = {key: layer.adapters[adapter_name] for key, layer in layers.items()}
        weights = (layer.get_base_layer().weight for layer in layers.values())
        if any(t.is_meta for t in (*weights, *(adapter.low_A for adapter in found.values()))):
            return  # a dry run, or a model that is loaded later
        with Pass("decomposing weights", len(layers), unit="layers", quiet=True) as shown:

            def make(key: str) -> PelaFactors:
                factors = decomposed(layers[key], key, len(found[key].low_A), svd)
                shown.advance()
                return factors

            parts = distributed.shared_out([partial(make, key) for key in layers])
        for (key, adapter), part in zip(found.items(), parts, strict=True):
            adapter.start(part, getattr(layers[key].get_base_layer(), "bias", None))
        self.errors[adapter_name] = {
            key: part.error for key, part in zip(layers, parts, strict=True)
        }

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter; raise UnsupportedError for several."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise UnsupportedError(
                f"adapters {', '.join(names)} of PELA each replace the layer, so only one can be "
                "active; activate one of them"
            )
        super().set_adapter(adapter_name, inference_mode)

    @torch.no_grad()
    def heat_maps(self) -> list[HeatMap]:
        """The relative difference between each product of factors and its weight."""
        percent = {}
        for name in self.active_adapters:
            for key, adapter in self.placed.get(name, {}).items():
                layer: Any = self.model.get_submodule(key)
                weight = layer.get_base_weight()
                # a shard of FSDP2 has no norm of the complete weight
                if isinstance(weight, DTensor) or weight.is_meta:
                    continue
                W, factors = dense_weight(layer), adapter.tensors()
                product = factors["low_B"].to(W) @ factors["low_A"].to(W)
                percent[key] = 100 * float((product - W).norm() / W.norm())
        return of_layers(
            self.model,
            percent,
            "low_rank_error",
            "Distance of the low-rank product from the weight",
            "% of the weight's norm",
            "How far the product of both factors is from the weight that they replace: the part of "
            "the weight that the SVD cut off, and what training has changed.",
        )
