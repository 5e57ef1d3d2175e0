"""Weights whose codes are trained themselves, in place of latent weights that are rounded.

Malinovskii, Mazur, Ilin, Kuznedelev, Burlachenko, Yi, Alistarh and Richtarik 2024, "PV-Tuning:
Beyond Straight-Through Estimation for Extreme LLM Compression", NeurIPS (arXiv:2405.14852). The P
step is that of the optimizer: it moves the mean and the deviation, which are parameters, and a
buffer with the gradients of the quantized values. The V step follows it and gives few entries the
code nearest to their buffer.

Where we depart from the authors' code: the entries that change are the farthest of those whose
nearest code is another one. Theirs are the farthest of all, which suits codes of eight weights
each; of single weights, the farthest are those beyond the outer codes, which are right where they
are.

Shapes: L weights, N entries of each.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from petl.core.compat import BaseTunerLayer, add_beside
from petl.core.types import Group
from petl.methods.binary.quantized_weights import Packed, QuantizedWeight
from petl.ops.quantize import coded_each, decode, numbers_of, pack, pv_codes_each, unpack
from petl.system.values import LR

CODES, STATS = "_codes", "_stats"  # suffixes of names of tensors
LEAST_SIGMA = 1e-8  # a negative one would reverse the order of the codes


class StepFields(Protocol):
    """Fields of the config that the steps read."""

    pv_fraction: float
    pv_trust: float | None
    pv_decay: float
    pv_lr_ratio: float
    pv_betas: list[float]


@dataclass
class CodedWeight(QuantizedWeight):
    """A quantized weight with steps on its codes.

    Its parameter is the buffer. Beside it stand `<name>_stats`, a parameter [2] with mean and
    deviation, and `<name>_codes`, the number of each entry's code, uint8.

    Attributes:
        layer: the layer of PEFT with the ParameterDict that has the weight of each adapter; None:
            the weight is in no such dict.
        in_layer: the name of that dict.
    """

    layer: BaseTunerLayer | None = None
    in_layer: str = ""
    takes_steps: ClassVar[bool] = True
    lost: ClassVar[str] = "no buffers: they start anew, at the quantized values"

    @property
    def stats(self) -> Tensor:
        """Mean and deviation, [2]."""
        return self._beside(STATS)

    @property
    def codes(self) -> Tensor:
        """The number of each entry's code, uint8."""
        return self._beside(CODES)

    def _beside(self, suffix: str) -> Tensor:
        if self.layer is None:
            return getattr(self.owner, self.name + suffix)
        return getattr(self.layer, self.in_layer + suffix)[self.name]

    @property
    def sources(self) -> Sequence[Tensor]:
        """The tensors from which `value` is computed; and the buffer, of which it has no value."""
        return self.weight, self.codes, self.stats

    def value(self) -> Tensor:
        """The quantized value."""
        return self.values([self]).view(self.weight.shape)

    def values(self, alike: Sequence[Self]) -> Tensor:
        """The quantized values of L weights with this one's `group_key`, [L, N]."""
        buffer_LN, numbers_LN, stats_L2 = stacked(alike)
        return coded_each(buffer_LN, numbers_LN, stats_L2, self.bits)

    @torch.no_grad()
    def start(self) -> None:
        """Take codes, mean and deviation of the initial weight, and its quantized value."""
        weight = self.weight
        codes = torch.empty_like(weight, dtype=torch.uint8, requires_grad=False)
        stats = torch.empty(2, device=weight.device)
        if not weight.is_meta:
            numbers, found = numbers_of(weight, self.bits)
            # that of the first forward pass with straight-through gradients, to the bit
            codes.copy_(numbers.view(weight.shape))
            stats.copy_(found)
        parameter = nn.Parameter(stats, requires_grad=weight.requires_grad)
        if self.layer is None:
            self.owner.register_buffer(self.name + CODES, codes)
            self.owner.register_parameter(self.name + STATS, parameter)
        else:
            add_beside(self.layer, self.in_layer + CODES, self.name, codes)
            add_beside(self.layer, self.in_layer + STATS, self.name, parameter)
        if not weight.is_meta:
            weight.copy_(self.value())

    def beside(self, key: str) -> Sequence[str]:
        """Names in the model of codes and statistics, where the weight has the name `key`."""
        if self.layer is None:
            return key + CODES, key + STATS
        stem = key.removesuffix(f".{self.name}")
        return f"{stem}{CODES}.{self.name}", f"{stem}{STATS}.{self.name}"

    def encode(self, weight: Tensor) -> Packed:
        """Codes and statistics, for the file."""
        if self.packed is not None:
            return self.packed
        return pack(self.codes.flatten().long(), self.bits), self.stats.detach().float()

    def loaded(
        self, latent: Tensor | None, packed: Packed | None, *, trains: bool
    ) -> Mapping[str, Tensor]:
        """Take codes, statistics and buffer from a file; without a buffer, it has the values."""
        shape = self.weight.shape
        # with a buffer, it is no file for inference
        self.packed = None if trains or latent is not None else packed
        if packed is None:  # latent weights, trained straight-through
            assert latent is not None
            numbers, stats = numbers_of(latent, self.bits)
            packed, latent = (pack(numbers, self.bits), stats), None
        codes, stats = packed
        return {
            "": decode(codes, stats, shape, self.bits) if latent is None else latent,
            CODES: unpack(codes, shape.numel(), self.bits).to(torch.uint8).view(shape),
            STATS: stats,
        }


def stacked(weights: Sequence[CodedWeight]) -> tuple[Tensor, Tensor, Tensor]:
    """Buffers [L, N], numbers of codes [L, N] and statistics [L, 2] of weights of one shape."""
    return (
        torch.stack([weight.weight for weight in weights]).flatten(1),
        torch.stack([weight.codes for weight in weights]).flatten(1),
        torch.stack([weight.stats for weight in weights]),
    )


def coded_of(weights: Iterable[QuantizedWeight]) -> list[CodedWeight]:
    """Those of the weights that train with steps on their codes."""
    return [w for w in weights if isinstance(w, CodedWeight) and w.weight.requires_grad]


class Progress(NamedTuple):
    """What the last V step of an adapter did.

    Attributes:
        changed: the number of entries that it gave another code, 0-d.
        total: the number of all.
    """

    changed: Tensor
    total: int


@torch.no_grad()
def take_steps(weights: Iterable[CodedWeight], config: StepFields) -> Progress:
    """Take the V step of each weight, after the step of the optimizer.

    Args:
        weights: of one adapter.
        config: of the adapter.
    """
    changed, total = [], 0
    for _, group in groupby(sorted(weights, key=CodedWeight.group_key), CodedWeight.group_key):
        alike = list(group)
        # before the codes: all of them are those of these statistics
        for weight in alike:
            weight.stats[1].clamp_(min=LEAST_SIGMA)
        buffer_LN, numbers_LN, stats_L2 = stacked(alike)
        new_LN = pv_codes_each(
            *(numbers_LN, buffer_LN.float(), stats_L2.float(), alike[0].bits),
            fraction=config.pv_fraction,
            trust=config.pv_trust,
        )
        changed.append((new_LN != numbers_LN).sum())
        total += new_LN.numel()
        for weight, new in zip(alike, new_LN, strict=True):
            weight.codes.copy_(new.view(weight.codes.shape))
        if config.pv_decay:
            for weight, value in zip(alike, alike[0].values(alike), strict=True):
                weight.weight.lerp_(
                    value.view(weight.weight.shape).to(weight.weight), config.pv_decay
                )
    return Progress(torch.stack([each.to(changed[0].device) for each in changed]).sum(), total)


@torch.no_grad()
def distance(weights: Sequence[CodedWeight]) -> float:
    """The norm of the differences between buffers and quantized values, over that of the values."""
    # read seldom, for the log: what it costs stands in no step
    values = [weight.value() for weight in weights]
    apart = [(w.weight - value).norm() for w, value in zip(weights, values, strict=True)]
    norms = [value.norm() for value in values]
    first = values[0].device
    apart_L, norm_L = (torch.stack([n.to(first) for n in each]) for each in (apart, norms))
    return float(apart_L.norm() / norm_L.norm())


def optimizer_of(
    groups: Iterable[Group], coded: Iterable[tuple[StepFields, Sequence[CodedWeight]]]
) -> Optimizer:
    """Return AdamW over these groups: buffers in groups of their own, and statistics do not decay.

    Args:
        groups: of all parameters.
        coded: the config of each adapter, with its weights.
    """
    # of statistics None: they keep the rate of their group
    steps: dict[int, StepFields | None] = {}
    for config, weights in coded:
        for weight in weights:
            steps |= {id(weight.weight): config, id(weight.stats): None}
    parts = [part for group in groups for part in _parts(group, steps)]
    # few groups, as in `petl train`: one fused kernel for each and step
    tensors = [tensor for part in parts for tensor in part["params"]]
    # shapes alone have no fused kernel
    return AdamW(parts, fused=not any(tensor.is_meta for tensor in tensors))


def _parts(group: Group, steps: Mapping[int, StepFields | None]) -> Iterator[Group]:
    """Yield a group without its coded weights, then groups of these: statistics, buffers."""
    found: dict[tuple[float, ...] | None, list[Tensor]] = {}
    for parameter in group["params"]:
        key: tuple[float, ...] | None = None
        if (config := steps.get(id(parameter))) is not None:
            key = (config.pv_lr_ratio, *config.pv_betas)
        elif id(parameter) in steps and group.get("weight_decay") != 0:
            key = ()
        found.setdefault(key, []).append(parameter)
    for key, parameters in found.items():
        part = {**group, "params": parameters}
        if key is not None:
            part["weight_decay"] = 0.0
        if key:
            ratio, *betas = key
            # `initial_lr` is the peak of a schedule, where there is one
            rates = {name: group.get(name, LR) * ratio for name in ("lr", "initial_lr")}
            part |= rates if "initial_lr" in group else {"lr": rates["lr"]}
            part["betas"] = tuple(betas)
        yield part
