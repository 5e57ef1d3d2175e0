"""Calibration passes: covariances from data, within a memory bound, cached, over all processes.

Shapes: I in, O out.
"""

import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petl.core.registry import no_calibration
from petl.core.types import Calibration
from petl.errors import InputError
from petl.methods.corda.cache import (
    Cache,
    Key,
    Write,
    hash_of_batches,
    hash_of_config,
    hash_of_weights,
)
from petl.methods.corda.config import CordaConfig
from petl.methods.corda.covariance import Covariance, collect, leaders
from petl.methods.corda.experts import by_stack
from petl.ops.expert_linear import ExpertLinear
from petl.system import collectives as distributed

logger = logging.getLogger(__name__)

SHOWN = 8  # layers that an error lists
FORMAT = 1  # version of the cache files, and of the computation of their content
Several = list[tuple[str, list[Covariance]]]  # layers, each with its covariances


def weight_of(layer: Any) -> Tensor:
    """The weight of a layer as [O, I]."""
    weight = layer.weight.detach()  # Conv1D stores [I, O]
    return weight.t() if isinstance(layer, Conv1D) else weight


class CalibrationPasses:
    """Calibration data for any number of passes: batches, or a function that runs the model."""

    def __init__(self, model: nn.Module, calibration: Calibration | None) -> None:
        self.model = model
        # an iterator allows one pass only
        self.data = list(calibration) if isinstance(calibration, Iterator) else calibration
        self.batches: Iterable[Any] | None = None if callable(self.data) else self.data

    def __bool__(self) -> bool:
        return self.data is not None

    def leader_of(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        """For each layer the first one that has the same inputs, found with one batch.

        With a function instead of batches, each layer is its own leader.
        """
        if self.batches is None:
            return {key: key for key in layers}
        # experts read rows of their own
        apart = {key for key, layer in layers.items() if isinstance(layer, ExpertLinear)}
        shared = {key: layer for key, layer in layers.items() if key not in apart}
        # one batch is enough: data do not change which tensors modules share
        first = next(iter(self.batches), None)
        if first is None:
            raise InputError("calibration has no batches; pass at least one")
        return leaders(self.model, shared, [first]) | {key: key for key in sorted(apart)}


class Covariances:
    """The covariances of the inputs of some layers of a model, equal on all processes.

    Layers with the same inputs share covariances; the first of them is the leader of the others.

    Attributes:
        key: cache key of the covariances; empty if nothing is cached.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CordaConfig,
        layers: dict[str, nn.Module],
        calibration: Calibration | None,
    ) -> None:
        self.model, self.config, self.layers = model, config, layers
        self.data = CalibrationPasses(model, calibration)
        caches = config.covariance_cache or config.factors_cache
        if not self.data and not caches:
            raise no_calibration("method 'corda'")
        # the content of a function cannot be hashed
        if callable(self.data.data) and caches:
            raise InputError(
                f"the cache {caches} identifies calibration data by their content; pass batches, "
                "not a function that runs the model"
            )
        self.key = self.cache_key() if caches else {}
        # the layer with the fewest tokens for its width: tokens / width, tokens, width, name
        self.thinnest = (math.inf, 0, 0, "")

    def cache_key(self) -> Key:
        """All inputs of covariances and factors; unknown ones are None."""
        config, base = self.config, getattr(self.model, "config", None)
        batches = self.data.batches
        hashes = distributed.gathered(hash_of_batches(batches) if batches is not None else None)
        return {
            "format": FORMAT,
            "model": getattr(base, "_name_or_path", None) or type(self.model).__name__,
            "revision": str(getattr(base, "_commit_hash", None)),  # of the hub
            "config": hash_of_config(self.model),
            "weights": hash_of_weights(self.model),  # fine-tuned copies have equal names
            "dtype": str(next(self.model.parameters()).dtype),
            "targets": {key: list(weight_of(layer).shape) for key, layer in self.layers.items()},
            "calibration_data": config.calibration_data,
            "calibration": hashes if batches is not None else None,
            "activation_norm": config.activation_norm,
            "damp": config.damp,
            "inverse_tol": config.inverse_tol,
            "covariance_dtype": config.covariance_dtype,
            "num_covariance_rounds": config.num_covariance_rounds,
        }

    def stream(self) -> Iterator[Several]:
        """Yield all layers with their covariances, in parts, within the memory bound.

        A part has the layers of as many leaders as there are processes. Clear its lists before
        asking for the next part: otherwise memory may exceed the bound.
        """
        if not self.config.covariance_cache:
            yield from self.collected(self.leader_of())
            return
        cache = Cache(self.config.covariance_cache, "covariances")
        path, leader_of = distributed.made_by(0, lambda: with_notes(cache.find(self.key)))
        if path is not None:
            yield from self.read_covariances(path, leader_of)
        else:
            leader_of = self.leader_of()
            yield from self.written(cache, leader_of)

    def leader_of(self) -> dict[str, str]:
        """For each layer the first one that has the same inputs, equal on all processes."""
        if not self.data:
            raise no_calibration("method 'corda', for which no cache file matches,")
        return distributed.made_by(0, lambda: self.data.leader_of(self.layers))

    def groups(self, leader_of: Mapping[str, str]) -> list[list[str]]:
        """The leaders of each pass over the data, so that each pass keeps the memory bound."""
        config, bound = self.config, self.config.max_covariance_bytes or math.inf
        found: list[list[str]] = [[]]
        used = 0
        # those of a stack together, where one may take the mean of the others
        for where, keys in by_stack(dict.fromkeys(leader_of.values())).items():
            width = weight_of(self.layers[keys[0]]).shape[1]
            each = width * width * config.dtype.itemsize * config.num_covariance_rounds
            size = each * len(keys)
            if size > bound:
                raise InputError(
                    f"max_covariance_bytes={bound} is below the {size} bytes that {where} needs; "
                    f"set it to at least {size}"
                )
            # filling in model order keeps layers of one block together
            if used + size > bound:
                found.append([])
                used = 0
            found[-1] += keys
            used += size
        return found

    def collected(self, leader_of: Mapping[str, str]) -> Iterator[Several]:
        """Yield covariances from calibration passes, reduced over all processes."""
        config, groups, data = self.config, self.groups(leader_of), self.data.data
        assert data is not None  # see `leader_of`
        for number, group in enumerate(groups, start=1):
            logger.info(
                "CorDA: pass %d of %d over the calibration data, for the inputs of %d layers",
                number,
                len(groups),
                sum(leader in group for leader in leader_of.values()),
            )
            found = collect(
                self.model,
                {key: self.layers[key] for key in group},
                data,
                norm=config.activation_norm,
                dtype=config.dtype,
                rounds=config.num_covariance_rounds,
            )
            fill_unmet(found, check_reached(found))
            for some in by_process_count(group):
                # pop: frees each local matrix as soon as it is reduced
                reduced = {key: [c.over_processes() for c in found.pop(key)] for key in some}
                for leader, covariances in reduced.items():  # raises on all processes alike
                    self.check(leader, covariances)
                yield with_followers(leader_of, reduced)

    def check(self, leader: str, covariances: list[Covariance]) -> None:
        """Raise if values are not finite; update the layer with the fewest tokens for its width."""
        if not all(c.matrix.isfinite().all() for c in covariances):
            raise InputError(
                f"the inputs of {leader} are not finite on the calibration data; check the data, "
                "or load the model in float32"
            )
        # the rank of X^T X is at most the number of its rows
        width = len(covariances[0].matrix)
        tokens = min(int(c.tokens) for c in covariances if c.samples)
        self.thinnest = min(self.thinnest, (tokens / width, tokens, width, leader))

    def warn_if_thin(self) -> None:
        """Warn if a layer had fewer tokens than its input is wide, so that C is singular."""
        ratio, tokens, width, leader = self.thinnest
        if ratio < 1:
            logger.warning(
                "%s had %d tokens of calibration data and inputs of width %d: the rank of its "
                "covariance is at most the number of tokens, and damping replaces the rest; use "
                "more or longer samples",
                leader,
                tokens,
                width,
            )

    def written(self, cache: Cache, leader_of: Mapping[str, str]) -> Iterator[Several]:
        """`collected`, with each covariance written to a cache file."""
        file = cache.writing(self.key, self.shapes(leader_of), leader_of)
        with ExitStack() as opened:
            write: list[Write] = []  # on process 0; an error there is raised on all
            distributed.made_by(0, lambda: write.append(opened.enter_context(file)))
            for several in self.collected(leader_of):
                leading = [found for key, found in several if leader_of[key] == key]
                distributed.made_by(0, lambda leading=leading: write_covariances(write[0], leading))
                yield several

    def shapes(self, leader_of: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors that `written` writes, by name in the file, on the meta device."""
        found = {}
        for key in dict.fromkeys(leader_of.values()):
            I = weight_of(self.layers[key]).shape[1]
            for number in range(self.config.num_covariance_rounds):
                found[f"{key}.{number}.samples"] = torch.empty((), dtype=torch.int64, device="meta")
                found[f"{key}.{number}.matrix"] = torch.empty(
                    I, I, dtype=self.config.dtype, device="meta"
                )
        return found

    def read_covariances(self, path: Path, leader_of: Mapping[str, str]) -> Iterator[Several]:
        """Yield covariances from a cache file, which process 0 reads."""
        for some in by_process_count(list(dict.fromkeys(leader_of.values()))):
            yield with_followers(leader_of, distributed.made_by(0, partial(self.read, path, some)))

    def read(self, path: Path, some: list[str]) -> dict[str, list[Covariance]]:
        """The covariances of some leaders in a cache file."""
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
    """A cache file and its notes; (None, None) without a file."""
    if path is None:
        return None, None
    with safe_open(path, framework="pt") as opened:
        return path, json.loads(opened.metadata()["notes"])


def write_covariances(write: Write, found: list[list[Covariance]]) -> None:
    """Write the covariances of some leaders, in the order of `Covariances.shapes`."""
    for covariances in found:
        for covariance in covariances:
            write(torch.tensor(covariance.samples))
            write(covariance.matrix)


def by_process_count(leaders: list[str]) -> list[list[str]]:
    """Split layers into lists of one layer per process, which decompose them in parallel."""
    size = distributed.num_processes()
    return [leaders[i : i + size] for i in range(0, len(leaders), size)]


def with_followers(leader_of: Mapping[str, str], found: Mapping[str, list[Covariance]]) -> Several:
    """All layers that share the covariances of some leaders; the lists are the same objects."""
    return [(key, found[leader]) for key, leader in leader_of.items() if leader in found]


def check_reached(found: Mapping[str, list[Covariance]]) -> set[str]:
    """Return the experts without a sample in any process, where others of their stack have some.

    Raises:
        InputError: a layer, or all experts of a stack, had none.
    """
    # a process may legitimately have no samples
    counts = distributed.gathered({key: sum(c.samples for c in found[key]) for key in found})
    unmet = {key for key in found if not any(count[key] for count in counts)}
    missed = [where for where, keys in by_stack(found).items() if unmet >= {*keys}]
    if missed:
        more = f" and {len(missed) - SHOWN} more" if len(missed) > SHOWN else ""
        raise InputError(
            f"the calibration data never reach {', '.join(missed[:SHOWN])}{more}; "
            "leave them out with exclude_modules, or calibrate on other data"
        )
    return unmet


def fill_unmet(found: dict[str, list[Covariance]], unmet: Collection[str]) -> None:
    """Give experts that no token meets the mean of the others of their stack; the log says it."""
    for where, keys in by_stack(found).items():
        own = [key for key in keys if key in unmet]
        if not own:
            continue
        logger.warning(
            "CorDA: the calibration data meet %d of %d experts of %s: the others are oriented by "
            "the mean of these; use more data to give each its own",
            len(keys) - len(own),
            len(keys),
            where,
        )
        # of each round apart
        pooled = [mean_of(each) for each in zip(*(found[key] for key in keys), strict=True)]
        for key in own:
            found[key] = list(pooled)


def mean_of(covariances: Sequence[Covariance]) -> Covariance:
    """Return the mean over the samples of several covariances."""
    samples = sum(each.samples for each in covariances)
    merged = Covariance(torch.zeros_like(covariances[0].matrix), samples)
    for each in covariances:
        merged.matrix += each.matrix * (each.samples / max(1, samples))
        merged.tokens += each.tokens
    return merged
