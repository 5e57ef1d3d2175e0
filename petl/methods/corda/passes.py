"""From calibration data to covariances: within a memory bound, cached, over all processes.

Shapes: I in, O out.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl.core import distributed
from petl.core.registry import no_calibration
from petl.core.spec.method import Calibration
from petl.errors import InputError
from petl.methods.corda.cache import Cache, Key, Write, digest_of, settings_of, weights_of
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.covariance import Covariance, collect, leaders

logger = logging.getLogger(__name__)

SHOWN = 8  # layers that an error names
FORMAT = 1  # of the files, and of how their content is worked out
Several = list[tuple[str, list[Covariance]]]  # layers, each with its covariances


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


class Covariances:
    """The covariances of the inputs of some layers of a model, equal on all processes.

    Attributes:
        key: of the caches: what covariances are made of; empty if nothing is cached.
    """

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
        digests = distributed.gathered(digest_of(batches) if batches is not None else None)
        return {
            "format": FORMAT,
            "model": getattr(base, "_name_or_path", None) or type(self.model).__name__,
            "revision": str(getattr(base, "_commit_hash", None)),
            "config": settings_of(self.model),
            "weights": weights_of(self.model),
            "dtype": str(next(self.model.parameters()).dtype),
            "targets": {key: list(weight_of(layer).shape) for key, layer in self.layers.items()},
            "calibration_data": config.calibration_data,
            "calibration": digests if batches is not None else None,
            "activation_norm": config.activation_norm,
            "damp": config.damp,
            "inverse_tol": config.inverse_tol,
            "covariance_dtype": config.covariance_dtype,
            "num_covariance_rounds": config.num_covariance_rounds,
        }

    def stream(self) -> Iterator[Several]:
        """All layers with their covariances, a few at a time; only as many exist as the bound says.

        A few are those that share the covariances of as many layers as there are processes. Clear
        the lists when you are done with them: there may be no room for the next ones before.
        """
        if not self.config.covariance_cache:
            yield from self.collected(self.shares())
            return
        cache = Cache(self.config.covariance_cache, "covariances")
        path, shares = distributed.made_by(0, lambda: with_notes(cache.find(self.key)))
        if path is not None:
            yield from self.read_covariances(path, shares)
        else:
            shares = self.shares()
            yield from self.written(cache, shares)

    def shares(self) -> dict[str, str]:
        if not self.data:
            raise no_calibration("method 'corda', for which its caches hold nothing that fits,")
        return distributed.made_by(0, lambda: self.data.shares(self.layers))

    def groups(self, shares: Mapping[str, str]) -> list[list[str]]:
        """The layers to collect for, pass by pass."""
        config, bound = self.config, self.config.max_covariance_bytes or math.inf
        found: list[list[str]] = [[]]
        used = 0
        for key in dict.fromkeys(shares.values()):
            width = weight_of(self.layers[key]).shape[1]
            size = width * width * config.dtype.itemsize * config.num_covariance_rounds
            if size > bound:
                raise InputError(
                    f"max_covariance_bytes={bound} is below the {size} bytes that {key} needs"
                )
            if used + size > bound:
                found.append([])
                used = 0
            found[-1].append(key)
            used += size
        return found

    def collected(self, shares: Mapping[str, str]) -> Iterator[Several]:
        """Covariances from passes over the data, over all processes."""
        config, groups = self.config, self.groups(shares)
        for number, group in enumerate(groups, start=1):
            logger.info(
                "CorDA: pass %d of %d over the calibration data, for the inputs of %d layers",
                number,
                len(groups),
                sum(leader in group for leader in shares.values()),
            )
            found = collect(
                self.model,
                {key: self.layers[key] for key in group},
                self.data.run,
                norm=config.activation_norm,
                dtype=config.dtype,
                rounds=config.num_covariance_rounds,
            )
            check_reached(found)
            for some in few(group):
                whole = {key: [c.over_processes() for c in found.pop(key)] for key in some}
                for leader, covariances in whole.items():
                    self.check(leader, covariances)
                yield followers(shares, whole)

    def check(self, leader: str, covariances: list[Covariance]) -> None:
        """Refuse what is not finite; remember the layer with the fewest tokens for its width."""
        if not all(c.matrix.isfinite().all() for c in covariances):
            raise InputError(f"the inputs of {leader} are not finite on the calibration data")
        width = len(covariances[0].matrix)
        tokens = min(int(c.tokens) for c in covariances if c.samples)
        self.thinnest = min(self.thinnest, (tokens / width, tokens, width, leader))

    def warn_if_thin(self) -> None:
        """Say which covariance has too few tokens for its width, if one has."""
        share, tokens, width, leader = self.thinnest
        if share < 1:
            logger.warning(
                "%s saw %d tokens and is %d wide: a covariance has at most the rank of its tokens, "
                "and damping fills in the rest; more or longer samples orient better",
                leader,
                tokens,
                width,
            )

    def written(self, cache: Cache, shares: Mapping[str, str]) -> Iterator[Several]:
        """`collected`, each covariance written down on its way."""
        file = cache.writing(self.key, self.shapes(shares), shares)
        with ExitStack() as opened:
            write: list[Write] = []  # in the first process; if it fails there, it fails in all
            distributed.made_by(0, lambda: write.append(opened.enter_context(file)))
            for several in self.collected(shares):
                leading = [found for key, found in several if shares[key] == key]
                distributed.made_by(0, lambda leading=leading: write_covariances(write[0], leading))
                yield several

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

    def read_covariances(self, path: Path, shares: Mapping[str, str]) -> Iterator[Several]:
        for some in few(list(dict.fromkeys(shares.values()))):
            yield followers(shares, distributed.made_by(0, partial(self.read, path, some)))

    def read(self, path: Path, some: list[str]) -> dict[str, list[Covariance]]:
        rounds = range(self.config.num_covariance_rounds)
        with safe_open(path, framework="pt") as opened:
            return {
                leader: [
                    Covariance(
                        opened.get_tensor(f"{leader}.{number}.matrix"),
                        int(opened.get_tensor(f"{leader}.{number}.samples")),
                    )
                    for number in rounds
                ]
                for leader in some
            }


def with_notes(path: Path | None) -> tuple[Path | None, Any]:
    if path is None:
        return None, None
    with safe_open(path, framework="pt") as opened:
        return path, json.loads(opened.metadata()["notes"])


def write_covariances(write: Write, found: list[list[Covariance]]) -> None:
    """Write those of some leaders down, in the order of `Covariances.shapes`."""
    for covariances in found:
        for covariance in covariances:
            write(torch.tensor(covariance.samples))
            write(covariance.matrix)


def few(leaders: list[str]) -> list[list[str]]:
    """Layers in parts of as many as there are processes to decompose them."""
    size = distributed.num_processes()
    return [leaders[i : i + size] for i in range(0, len(leaders), size)]


def followers(shares: Mapping[str, str], found: Mapping[str, list[Covariance]]) -> Several:
    """All layers that the covariances of some leaders are about; a list of them is shared."""
    return [(key, found[leader]) for key, leader in shares.items() if leader in found]


def check_reached(found: Mapping[str, list[Covariance]]) -> None:
    """Raise InputError for layers that no sample of any process reached."""
    counts = distributed.gathered({key: sum(c.samples for c in found[key]) for key in found})
    missed = [key for key in found if not any(count[key] for count in counts)]
    if missed:
        more = f" and {len(missed) - SHOWN} more" if len(missed) > SHOWN else ""
        raise InputError(
            f"the calibration data never reach {', '.join(missed[:SHOWN])}{more}; "
            "leave them out with exclude_modules, or calibrate on other data"
        )
