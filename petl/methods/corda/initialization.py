"""Initialization of a CorDA adapter: checks, initial factors, and the ranks of CorDA++."""

import heapq
import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

from petl.core.compat import refused_names
from petl.core.experts.linears import stack_of
from petl.core.experts.lora import check_stacks
from petl.core.experts.stacks import stacks_of
from petl.core.method import WrapContext
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.names import check_parameters
from petl.core.model.targets import (
    matched_names,
    name_parameters,
    resolve_targets,
    set_targets,
    without,
)
from petl.core.parameters import shared_weights
from petl.errors import InputError, ModuleKindError, UnsupportedError
from petl.methods.corda.calibration import Covariances, weight_of
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.decompose import Decomposer, LayerComponents
from petl.methods.corda.experts import expert_layers
from petl.methods.corda.oriented import balanced, truncated

KINDS = "CorDA supports nn.Linear, Conv1D, and experts"
QUANTIZED = "CorDA needs full-precision weights; leave model.quantization unset"


class InitialFactors(NamedTuple):
    """The update of a layer before training: `scale * B A`, with A [R, I] and B [O, R].

    `spectrum` has all singular values of the decomposition, or is None on the meta device.
    """

    A: Tensor
    B: Tensor
    scale: float
    spectrum: Tensor | None = None


def initialize(c: WrapContext[CordaConfig]) -> None:
    """Compute the initial factors of all layers and store them in `config.initial`.

    On the meta device there are no weights to decompose: the factors then have shapes only.

    Raises:
        InputError: an unsupported target or rank; neither calibration data nor a matching cache
            file; layers that the data never reach, or inputs that are not finite.
    """
    model, config = c.model, c.config
    layers = targets(model, config)
    if any(weight_of(layer).is_meta for layer in layers.values()):
        config.initial = {key: meta_factors(layer, config, key) for key, layer in layers.items()}
        return
    parts = Decomposer(Covariances(model, config, layers, c.calibration)).parts()
    if config.rank_budget is not None:
        allocate_ranks(config, parts)
    initial = {}
    for key, part in parts.items():
        columns = truncated(part.columns, config.rank_of(key), leading=config.corda_method == "ipm")
        scale = config.scale_of(key)
        # sqrt(S) on each side, divided by the scale, so that scale * B A = U S Vt
        A, B = balanced(columns, scale)
        initial[key] = InitialFactors(A.float(), B.float(), scale, part.spectrum)
    config.initial = initial


def targets(model: nn.Module, config: CordaConfig) -> dict[str, nn.Module]:
    """The layers to adapt by name, after all checks that need no data."""
    check_parameters(config, model)
    if config.target_modules is None:  # PEFT's default table has query and value only
        config.target_modules = [] if config.target_parameters else "block-linear"
    no_experts = without_experts(config)
    # as for petl's own methods
    resolve_targets(config, model, words=("all-linear",), no_experts=no_experts)
    names = matched_names(config, model)
    if not no_experts:
        name_parameters(config, model)
    check_stacks(config, model, no_experts)
    stacks = [f"{each.path}.{each.name}" for each in stacks_of(config, model)]
    for given in config.target_parameters or ():
        if not any(f".{stack}".endswith(f".{given}") for stack in stacks):
            raise ModuleKindError(f"target_parameters: {given} is no stack of experts; {KINDS}")
    # the LoRA that is saved could not be loaded
    refused = {} if not names else refused_names(LoraConfig(target_modules=names), model, names)
    if refused:
        names = without(model, names, refused, logging.WARNING)
        set_targets(config, model, names)
    found = {key: model.get_submodule(key) for key in names}
    found |= expert_layers(model, stacks)
    require_splittable(model, config, found)
    return found


def require_splittable(
    model: nn.Module, config: CordaConfig, found: Mapping[str, nn.Module]
) -> None:
    """Raise InputError for a layer, by name, whose weight cannot be split."""
    # subtracting from a tied weight would change both modules
    twins = shared_weights(model)
    for key, layer in found.items():
        weight = getattr(layer, "weight", None)
        if is_quantized(weight):
            raise UnsupportedError(f"{key} is quantized; {QUANTIZED}")
        if not isinstance(layer, LINEAR_KINDS):
            raise ModuleKindError(f"{key} is {type(layer).__name__}; {KINDS}")
        if key in twins:
            raise InputError(
                f"{key} shares its weight with {twins[key]}, which CorDA would change as well; "
                "leave it out with exclude_modules"
            )
        limit = min(weight_of(layer).shape)
        if config.rank_of(key) > limit:
            raise InputError(
                f"r={config.rank_of(key)} is above {limit}, the smaller side of {stack_of(key)}; "
                "use a smaller r, or set one for this layer in rank_pattern"
            )


def without_experts(config: CordaConfig | None) -> str:
    """Return why it adapts no experts with this config; "": it does."""
    if config is None or config.rank_budget is None:
        return ""
    return "rank_budget gives each layer a rank, and the experts of a stack share one; use r"


def is_quantized(weight: object) -> bool:
    """True if a weight is stored as codes, not as floating-point numbers."""
    is_float = isinstance(weight, Tensor) and weight.is_floating_point()
    # torchao's quantized weights are tensor subclasses that report a floating-point dtype
    return isinstance(weight, Tensor) and not (is_float and type(weight.data) is Tensor)


def meta_factors(layer: nn.Module, config: CordaConfig, key: str) -> InitialFactors:
    """Factors on the meta device, for their shapes."""
    (O, I), R = weight_of(layer).shape, config.rank_of(key)
    A, B = torch.empty(R, I, device="meta"), torch.empty(O, R, device="meta")
    return InitialFactors(A, B, config.scale_of(key))


def allocate_ranks(config: CordaConfig, parts: dict[str, LayerComponents]) -> None:
    """Set `rank_pattern` by CorDA++, and `alpha_pattern` so that the scale is equal everywhere.

    From rank 1 in each layer, the rank of the layer with the lowest `cost_of_next` increases by
    one, until the budget is first exceeded.
    """
    assert config.rank_budget is not None
    ranks = dict.fromkeys(parts, 1)
    cost = {key: part.columns.U.shape[0] + part.columns.Vt.shape[1] for key, part in parts.items()}
    spent = sum(cost.values())
    # the number breaks ties, for heapq compares tuples
    queue = [(cost_of_next(p, 1), number, key) for number, (key, p) in enumerate(parts.items())]
    heapq.heapify(queue)
    while spent <= config.rank_budget and queue:
        _, number, key = heapq.heappop(queue)
        ranks[key] += 1
        spent += cost[key]
        if ranks[key] < len(parts[key].spectrum):
            heapq.heappush(queue, (cost_of_next(parts[key], ranks[key]), number, key))
    scale = config.scale_of("")
    names = sorted(ranks, key=lambda name: (-len(name), name))  # PEFT uses the first that matches
    config.rank_pattern = {name: ranks[name] for name in names}
    config.alpha_pattern = {
        name: scale * (math.sqrt(ranks[name]) if config.use_rslora else ranks[name])
        for name in names
    }


def cost_of_next(part: LayerComponents, rank: int) -> float:
    """log(pi) times the `rank`-th smallest singular value, over the sum of the larger ones."""
    S = part.spectrum
    return part.compactness * float(S[-rank] / S[: len(S) - rank].sum())
