"""What a CorDA adapter starts from: refusals, factors, and the ranks of CorDA++."""

import heapq
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from petl.core.model.targets import LINEAR_KINDS, matched_names, resolve_targets
from petl.core.spec.method import Calibration
from petl.errors import InputError, ModuleKindError, UnsupportedError
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.decompose import Decomposer, Parts
from petl.methods.corda.passes import Covariances, weight_of
from petl.ops.oriented import balanced, truncated

QUANTISED = "corda: decompose in float32/16, then quantise the residual"


class Start(NamedTuple):
    """The update of one layer when training begins: `scale * B A`, with A [R, I] and B [O, R]."""

    A: Tensor
    B: Tensor
    scale: float


def begin(model: nn.Module, config: Any, calibration: Calibration | None) -> None:
    """Work out what the adapter starts from, and leave it in the config.

    On the meta device there are no weights to decompose, and shapes are all there is to a start.

    Raises:
        InputError: a target or a rank that CorDA cannot serve; no calibration data and nothing
            cached; layers that the data never reach, or activations that are not finite.
    """
    layers = targets(model, config)
    if any(weight_of(layer).is_meta for layer in layers.values()):
        config.start = {key: shapes_of(layer, config, key) for key, layer in layers.items()}
        return
    parts = Decomposer(Covariances(model, config, layers, calibration)).parts()
    if config.rank_budget is not None:
        spread(config, parts)
    start = {}
    for key, part in parts.items():
        columns = truncated(part.columns, config.rank_of(key), leading=config.corda_method == "ipm")
        scale = config.scale_of(key)
        A, B = balanced(columns, scale)
        start[key] = Start(A.float(), B.float(), scale)
    config.start = start


def targets(model: nn.Module, config: CordaConfig) -> dict[str, nn.Module]:
    """The layers to adapt by name, after every refusal that needs no data."""
    if config.target_modules is None:  # PEFT's own table is for methods that add to few modules
        config.target_modules = "block-linear"
    resolve_targets(config, model, words=("all-linear",))  # as methods of petl's own take it
    found = {key: model.get_submodule(key) for key in matched_names(config, model)}
    twins = shared_weights(model)
    for key, layer in found.items():
        weight = getattr(layer, "weight", None)
        if is_quantized(weight):
            raise UnsupportedError(f"{key} is quantised; {QUANTISED}")
        if not isinstance(layer, LINEAR_KINDS):
            raise ModuleKindError(
                f"{key} is {type(layer).__name__}; CorDA decomposes nn.Linear and Conv1D"
            )
        if key in twins:
            raise InputError(
                f"{key} shares its weight with {twins[key]}, which CorDA would change as well; "
                "leave it out with exclude_modules"
            )
        limit = min(weight_of(layer).shape)
        if config.rank_of(key) > limit:
            raise InputError(
                f"r={config.rank_of(key)} is above {limit}, the smaller side of {key}; choose a "
                "smaller r, or one for this layer by rank_pattern"
            )
    return found


def is_quantized(weight: Any) -> bool:
    """Whether a weight holds codes rather than numbers."""
    plain = isinstance(weight, Tensor) and weight.is_floating_point()
    return isinstance(weight, Tensor) and not (plain and type(weight.data) is Tensor)


def shared_weights(model: nn.Module) -> dict[str, str]:
    """For each module whose weight another one has too, the name of one such other."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return {
        name: names[0] if name != names[0] else names[1]
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def shapes_of(layer: nn.Module, config: CordaConfig, key: str) -> Start:
    (O, I), R = weight_of(layer).shape, config.rank_of(key)
    A, B = torch.empty(R, I, device="meta"), torch.empty(O, R, device="meta")
    return Start(A, B, config.scale_of(key))


def spread(config: CordaConfig, parts: dict[str, Parts]) -> None:
    """Choose the ranks by CorDA++ and write them, and alphas of the same scale, into the config.

    From rank 1 everywhere, the layer whose next trailing component carries least, weighed by the
    compactness of its covariance, goes up by one, until the budget is first exceeded.
    """
    assert config.rank_budget is not None
    ranks = dict.fromkeys(parts, 1)
    cost = {key: part.columns.U.shape[0] + part.columns.Vt.shape[1] for key, part in parts.items()}
    spent = sum(cost.values())
    queue = [(merit(part, 1), number, key) for number, (key, part) in enumerate(parts.items())]
    heapq.heapify(queue)
    while spent <= config.rank_budget and queue:
        _, number, key = heapq.heappop(queue)
        ranks[key] += 1
        spent += cost[key]
        if ranks[key] < len(parts[key].spectrum):
            heapq.heappush(queue, (merit(parts[key], ranks[key]), number, key))
    scale = config.scale_of("")
    names = sorted(ranks, key=lambda name: (-len(name), name))  # PEFT takes the first that fits
    config.rank_pattern = {name: ranks[name] for name in names}
    config.alpha_pattern = {
        name: scale * (math.sqrt(ranks[name]) if config.use_rslora else ranks[name])
        for name in names
    }


def merit(part: Parts, rank: int) -> float:
    """log(pi) times the rank-th smallest singular value over the sum of those above it."""
    S = part.spectrum
    return part.compactness * float(S[-rank] / S[: len(S) - rank].sum())
