"""From calibration data to decompositions: within a memory bound, cached, shared by processes.

Shapes: I in, O out, K = min(I, O).
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl.core import processes
from petl.core.registry import Calibration, no_calibration
from petl.errors import InputError
from petl.methods.corda.cache import Cache, Key, digest_of, weights_of
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.covariance import Covariance, collect, leaders
from petl.ops.oriented import Damped, Oriented, damped, kept, log_compactness, oriented_svd

logger = logging.getLogger(__name__)

SHOWN = 8  # layers that an error names
FACTORS = ("spectrum", "U", "S", "Vt")  # tensors of a layer in a file of factors
Stream = Iterator[tuple[str, list[Covariance]]]  # a layer, and its covariances


@dataclass
class Parts:
    """What is kept of a layer's decomposition, on the CPU.

    Attributes:
        spectrum: all singular values, [K].
        columns: the components to train; all of them when ranks are still to be chosen.
        compactness: the log of CorDA++'s pi; 0 where nothing asks for it.
    """

    spectrum: Tensor
    columns: Oriented
    compactness: float


def weight_of(layer: Any) -> Tensor:
    """The weight as [O, I]."""
    weight = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


class Data:
    """Calibration data, as often as they are needed: batches, or a function that runs the model."""

    def __init__(self, model: nn.Module, calibration: Calibration | None) -> None:
        self.model = model
        self.function = calibration if callable(calibration) else None
        self.batches: Iterable[Any] | None = None if callable(calibration) else calibration
        if isinstance(self.batches, Iterator):
            self.batches = list(self.batches)  # it can be walked through but once

    def __bool__(self) -> bool:
        return self.function is not None or self.batches is not None

    def forward(self, batch: Mapping[str, Any]) -> None:
        device = next(self.model.parameters()).device
        self.model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})

    def run(self) -> None:
        """One pass over all of it."""
        if self.function is not None:
            self.function()
        for batch in self.batches or ():
            self.forward(batch)

    def shares(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        """For each layer the one whose inputs are the same: what one batch shows."""
        if self.batches is None:
            return {key: key for key in layers}
        first = next(iter(self.batches), None)
        if first is None:
            raise InputError("the calibration data hold no batch")
        return leaders(self.model, layers, lambda: self.forward(first))


class Decomposer:
    """The decompositions of the layers of a model, equal on all processes."""

    def __init__(
        self,
        model: nn.Module,
        config: CordaConfig,
        layers: dict[str, nn.Module],
        calibration: Calibration | None,
    ) -> None:
        self.model, self.config, self.layers = model, config, layers
        self.data = Data(model, calibration)
        caches = config.covariance_cache or config.factors_cache
        if not self.data and not caches:
            raise no_calibration("method 'corda'")
        if self.data.function is not None and caches:
            raise InputError(
                "covariance_cache and factors_cache know calibration data by their content; pass "
                "batches, not a function that runs the model"
            )
        self.key = self.content() if caches else {}
        self.thinnest = (math.inf, 0, 0, "")  # tokens over width, tokens, width, layer

    def content(self) -> Key:
        """What covariances and factors are made of; None for what is not known here."""
        config, base = self.config, getattr(self.model, "config", None)
        batches = self.data.batches
        known = batches is not None
        digests = processes.gathered(digest_of(batches) if batches is not None else None)
        return {
            "model": getattr(base, "_name_or_path", None) or type(self.model).__name__,
            "revision": str(getattr(base, "_commit_hash", None)),
            "weights": weights_of(self.model),
            "dtype": str(next(self.model.parameters()).dtype),
            "targets": {key: list(weight_of(layer).shape) for key, layer in self.layers.items()},
            "calibration": {"spec": config.calibration_data, "digests": digests} if known else None,
            "activation_norm": config.activation_norm,
            "damp": config.damp,
            "inverse_tol": config.inverse_tol,
            "covariance_dtype": config.covariance_dtype,
            "num_covariance_rounds": config.num_covariance_rounds,
        }

    def parts(self) -> dict[str, Parts]:
        """The decomposition of each layer, by name."""
        config = self.config
        if not config.factors_cache:
            return self.decomposed()
        cache = Cache(config.factors_cache, "factors")
        key = {
            **self.key,
            "corda_method": config.corda_method,
            "ranks": config.rank_budget or {key: config.rank_of(key) for key in self.layers},
        }
        found = processes.made_by(0, lambda: self.read_parts(cache.find(key)))
        if found is not None:
            return found
        parts = self.decomposed()
        processes.made_by(0, lambda: write_parts(cache, key, parts))
        return parts

    def decomposed(self) -> dict[str, Parts]:
        parts: dict[str, Parts] = {}
        for key, covariances in self.covariances():
            # one process decomposes for all: the signs of an SVD differ between devices
            owner = len(parts) % processes.num_processes()
            parts[key] = processes.made_by(owner, lambda k=key, c=covariances: self.decompose(k, c))
        share, tokens, width, leader = self.thinnest
        if share < 1:
            logger.warning(
                "%s saw %d tokens and is %d wide: a covariance has at most the rank of its tokens, "
                "and damping fills in the rest; more or longer samples orient better",
                leader,
                tokens,
                width,
            )
        return {key: parts[key] for key in self.layers}

    def decompose(self, key: str, covariances: list[Covariance]) -> Parts:
        """The oriented decomposition of a layer, under the best of its covariances."""
        config, W = self.config, weight_of(self.layers[key])
        if not W.isfinite().all():
            raise InputError(f"the weight of {key} is not finite")
        compared = config.rank_budget is not None or len(covariances) > 1
        found: list[tuple[float, Parts]] = []
        for covariance in covariances:
            C = self.damped(key, covariance)
            svd = oriented_svd(W, C)
            pi = log_compactness(C, len(W)) if compared else 0.0
            if config.rank_budget is None:
                leading = config.corda_method == "ipm"
                columns = kept(svd, config.rank_of(key), leading=leading)
            else:
                columns = svd
            columns = Oriented(*(tensor.cpu().clone() for tensor in columns))
            found.append((pi * float(svd.S.sum() / svd.S[0]), Parts(svd.S.cpu(), columns, pi)))
        return min(found, key=lambda pair: pair[0])[1]

    def damped(self, key: str, covariance: Covariance) -> Damped:
        """The damped matrix and its inverse, kept for the layers that share them."""
        if covariance.damped is None:
            dtype = torch.promote_types(self.config.dtype, torch.float32)
            matrix = covariance.matrix.to(weight_of(self.layers[key]).device, dtype)
            try:
                covariance.damped = damped(matrix, self.config.damp, self.config.inverse_tol)
            except ValueError as error:
                raise InputError(f"{key}: {error}; calibrate on data that it sees") from error
        return covariance.damped

    # Covariances

    def covariances(self) -> Stream:
        """Each layer with its covariances; only as many exist at a time as the bound allows."""
        if not self.config.covariance_cache:
            yield from self.collected(self.shares())
            return
        cache = Cache(self.config.covariance_cache, "covariances")
        path, shares = processes.made_by(0, lambda: with_notes(cache.find(self.key)))
        if path is not None:
            yield from self.read_covariances(path, shares)
        else:
            shares = self.shares()
            yield from self.written(cache, shares)

    def shares(self) -> dict[str, str]:
        if not self.data:
            raise no_calibration("method 'corda', for which its caches hold nothing that fits,")
        return processes.made_by(0, lambda: self.data.shares(self.layers))

    def groups(self, shares: Mapping[str, str]) -> Iterator[list[str]]:
        """The layers to collect for, pass by pass."""
        config, bound = self.config, self.config.max_covariance_bytes or math.inf
        group: list[str] = []
        used = 0
        for key in dict.fromkeys(shares.values()):
            width = weight_of(self.layers[key]).shape[1]
            size = width * width * config.dtype.itemsize * config.num_covariance_rounds
            if size > bound:
                raise InputError(
                    f"max_covariance_bytes={bound} is below the {size} bytes that {key} needs"
                )
            if used + size > bound:
                yield group
                group, used = [], 0
            group.append(key)
            used += size
        yield group

    def collected(self, shares: Mapping[str, str]) -> Stream:
        """Covariances from passes over the data, over all processes."""
        config = self.config
        for group in self.groups(shares):
            found = collect(
                self.model,
                {key: self.layers[key] for key in group},
                self.data.run,
                norm=config.activation_norm,
                dtype=config.dtype,
                rounds=config.num_covariance_rounds,
            )
            check_reached(found)
            for leader in group:
                whole = [covariance.over_processes() for covariance in found.pop(leader)]
                if not all(c.matrix.isfinite().all() for c in whole):
                    raise InputError(
                        f"the inputs of {leader} are not finite on the calibration data"
                    )
                self.note_tokens(leader, whole)
                yield from followers(shares, leader, whole)

    def note_tokens(self, leader: str, covariances: list[Covariance]) -> None:
        """Remember the layer whose covariance has the fewest tokens for its width."""
        width = len(covariances[0].matrix)
        tokens = min(int(c.tokens) for c in covariances)
        self.thinnest = min(self.thinnest, (tokens / width, tokens, width, leader))

    def written(self, cache: Cache, shares: Mapping[str, str]) -> Stream:
        """`collected`, each covariance written down on its way."""
        if processes.number() > 0:
            yield from self.collected(shares)
            return
        with cache.writing(self.key, self.shapes(shares), shares) as write:
            for key, covariances in self.collected(shares):
                if shares[key] == key:
                    for covariance in covariances:
                        write(torch.tensor(covariance.samples))
                        write(covariance.matrix)
                yield key, covariances

    def shapes(self, shares: Mapping[str, str]) -> dict[str, Tensor]:
        """By name in the file, what `written` writes, on the meta device."""
        found = {}
        for key in dict.fromkeys(shares.values()):
            I = weight_of(self.layers[key]).shape[1]
            for number in range(self.config.num_covariance_rounds):
                found[f"{key}.{number}.samples"] = torch.empty((), dtype=torch.int64, device="meta")
                found[f"{key}.{number}.matrix"] = torch.empty(
                    I, I, dtype=self.config.dtype, device="meta"
                )
        return found

    def read_covariances(self, path: Path, shares: Mapping[str, str]) -> Stream:
        for leader in dict.fromkeys(shares.values()):
            found = processes.made_by(0, lambda leader=leader: self.read_leader(path, leader))
            yield from followers(shares, leader, found)

    def read_leader(self, path: Path, leader: str) -> list[Covariance]:
        with safe_open(path, framework="pt") as opened:
            return [
                Covariance(
                    opened.get_tensor(f"{leader}.{number}.matrix"),
                    int(opened.get_tensor(f"{leader}.{number}.samples")),
                )
                for number in range(self.config.num_covariance_rounds)
            ]

    # Factors

    def read_parts(self, path: Path | None) -> dict[str, Parts] | None:
        if path is None:
            return None
        with safe_open(path, framework="pt") as opened:
            compactness = json.loads(opened.metadata()["notes"])
            found = {}
            for key in self.layers:
                spectrum, *columns = (opened.get_tensor(f"{key}.{n}") for n in FACTORS)
                found[key] = Parts(spectrum, Oriented(*columns), compactness[key])
        return found


def write_parts(cache: Cache, key: Key, parts: Mapping[str, Parts]) -> None:
    tensors = {
        f"{name}.{kind}": tensor
        for name, part in parts.items()
        for kind, tensor in zip(FACTORS, (part.spectrum, *part.columns), strict=True)
    }
    notes = {name: part.compactness for name, part in parts.items()}
    with cache.writing(key, tensors, notes) as write:
        for tensor in tensors.values():
            write(tensor)


def with_notes(path: Path | None) -> tuple[Path | None, Any]:
    if path is None:
        return None, None
    with safe_open(path, framework="pt") as opened:
        return path, json.loads(opened.metadata()["notes"])


def followers(shares: Mapping[str, str], leader: str, covariances: list[Covariance]) -> Stream:
    """Each layer that the covariances of `leader` are about, itself first; empty ones left out."""
    filled = [covariance for covariance in covariances if covariance.samples]
    return ((key, filled) for key, other in shares.items() if other == leader)


def check_reached(found: Mapping[str, list[Covariance]]) -> None:
    """Raise InputError for layers that no sample of any process reached."""
    counts = processes.gathered({key: sum(c.samples for c in found[key]) for key in found})
    missed = [key for key in found if not any(count[key] for count in counts)]
    if missed:
        more = f" and {len(missed) - SHOWN} more" if len(missed) > SHOWN else ""
        raise InputError(
            f"the calibration data never reach {', '.join(missed[:SHOWN])}{more}; "
            "leave them out with exclude_modules, or calibrate on other data"
        )
