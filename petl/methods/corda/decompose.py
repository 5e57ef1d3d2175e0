"""From covariances to the components of each layer: distributed over processes, cached.

Shapes: I in, O out, K = min(I, O).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from petl.errors import InputError
from petl.methods.corda.cache import Cache, Key
from petl.methods.corda.calibration import Covariances, weight_of
from petl.methods.corda.covariance import Covariance
from petl.methods.corda.oriented import (
    DampedInverse,
    OrientedFactors,
    damped,
    log_compactness,
    oriented_svd,
    truncated,
)
from petl.system import collectives as distributed
from petl.system.progress import Pass

FACTORS = ("spectrum", "U", "S", "Vt")  # tensors of a layer in a file of factors


@dataclass
class LayerComponents:
    """The components of a layer, on the CPU.

    Attributes:
        spectrum: all singular values, [K].
        columns: the components to train; all components while ranks are still to be chosen.
        compactness: log of CorDA++'s pi; 0 where it is not needed.
    """

    spectrum: Tensor
    columns: OrientedFactors
    compactness: float


class Decomposer:
    """The decompositions of the layers of a model, equal on all processes."""

    def __init__(self, covariances: Covariances) -> None:
        self.covariances = covariances
        self.config, self.layers = covariances.config, covariances.layers

    def parts(self) -> dict[str, LayerComponents]:
        """The components of each layer by name, from the cache if there is one."""
        config = self.config
        if not config.factors_cache:
            return self.decomposed()
        cache = Cache(config.factors_cache, "factors")
        key = {
            **self.covariances.key,
            "corda_method": config.corda_method,
            # with a budget all components are cached, whatever the ranks become
            "ranks": config.rank_budget or {key: config.rank_of(key) for key in self.layers},
        }
        # process 0 reads, so that all agree on hit or miss
        found = distributed.made_by(0, lambda: self.read_parts(cache.find(key)))
        if found is not None:
            return found
        parts = self.decomposed()
        distributed.made_by(0, lambda: write_parts(cache, key, parts))
        return parts

    def decomposed(self) -> dict[str, LayerComponents]:
        """Compute the components of all layers."""
        parts: dict[str, LayerComponents] = {}
        for several in self.covariances.stream():
            # each layer on one process only: the signs of an SVD differ between devices
            with Pass("decomposing weights", len(several), unit="layers", quiet=True) as shown:
                calls = [partial(self.counted, shown, *each) for each in several]
                found = distributed.shared_out(calls)
            parts |= {key: part for (key, _), part in zip(several, found, strict=True)}
            for _, covariances in several:
                covariances.clear()  # frees memory for the next ones
        self.covariances.warn_if_thin()
        return {key: parts[key] for key in self.layers}

    def counted(self, shown: Pass, key: str, covariances: list[Covariance]) -> LayerComponents:
        """As `decompose`, counted as a unit of a pass."""
        found = self.decompose(key, covariances)
        shown.advance()
        return found

    def decompose(self, key: str, covariances: list[Covariance]) -> LayerComponents:
        """The oriented decomposition of a layer, with the best of its covariances."""
        config, W = self.config, weight_of(self.layers[key])
        if not W.isfinite().all():
            raise InputError(
                f"the weight of {key} has nan or infinite entries; leave the layer out with "
                "exclude_modules, or use another model"
            )
        filled = [covariance for covariance in covariances if covariance.samples]
        needs_compactness = config.rank_budget is not None or len(filled) > 1
        found: list[tuple[float, LayerComponents]] = []
        for covariance in filled:
            C = self.damped(key, covariance)
            svd = oriented_svd(W, C)
            pi = log_compactness(C, len(W)) if needs_compactness else 0.0
            if config.rank_budget is None:
                leading = config.corda_method == "ipm"  # kpm: the trailing components
                columns = truncated(svd, config.rank_of(key), leading=leading)
            else:
                columns = svd  # all, until the budget is distributed
            columns = OrientedFactors(*(tensor.cpu().clone() for tensor in columns))
            components = LayerComponents(svd.S.cpu(), columns, pi)
            found.append((pi * float(svd.S.sum() / svd.S[0]), components))  # CorDA++'s criterion
        return min(found, key=lambda pair: pair[0])[1]

    def damped(self, key: str, covariance: Covariance) -> DampedInverse:
        """The damped matrix and its inverse, cached for the layers that share the covariance."""
        if covariance.damped is None:
            dtype = torch.promote_types(self.config.dtype, torch.float32)
            matrix = covariance.matrix.to(weight_of(self.layers[key]).device, dtype)
            try:
                covariance.damped = damped(matrix, self.config.damp, self.config.inverse_tol)
            except ValueError as error:
                raise InputError(
                    f"{key}: {error}; calibrate on data that give this layer nonzero inputs"
                ) from error
        return covariance.damped

    def read_parts(self, path: Path | None) -> dict[str, LayerComponents] | None:
        """Read the components from a cache file; None without one."""
        if path is None:
            return None
        with safe_open(path, framework="pt") as opened:
            compactness = json.loads(opened.metadata()["notes"])
            found = {}
            for key in self.layers:
                spectrum, *columns = (opened.get_tensor(f"{key}.{n}") for n in FACTORS)
                found[key] = LayerComponents(spectrum, OrientedFactors(*columns), compactness[key])
        return found


def write_parts(cache: Cache, key: Key, parts: Mapping[str, LayerComponents]) -> None:
    """Write the components of all layers to a cache file."""
    tensors = {
        f"{name}.{kind}": tensor
        for name, part in parts.items()
        for kind, tensor in zip(FACTORS, (part.spectrum, *part.columns), strict=True)
    }
    notes = {name: part.compactness for name, part in parts.items()}
    with cache.writing(key, tensors, notes) as write:
        for tensor in tensors.values():
            write(tensor)
