"""What is tuned and when it is revised: the budget of weights and the schedule of selections."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.config import MethodConfig, about, require
from petl.core.layer import LayerShape
from petl.errors import InputError

Shapes = Mapping[str, LayerShape]


@dataclass
class SparseConfig(MethodConfig):
    """See the package's docstring; R is `reselection_steps`, A `selection_accumulation_steps`."""

    density: float = about("share of all base parameters to tune, in (0, 1]", 0.01)
    r: int | None = about("as many weights as LoRA of this rank has; overrides density", None)
    num_tunable_weights: int | None = about("how many weights; overrides r and density", None)
    num_deltas: dict[str, int] | None = about(
        "how many weights by module path; filled in and saved, overrides all others", None
    )
    selection_algorithm: str = about(
        "rigl: grow where gradients are large, sm3: by the optimizer's accumulators, none: the "
        "weights stay those drawn at random",
        "rigl",
    )
    reselection_steps: int = about("optimizer steps from one selection to the next", 20)
    selection_accumulation_steps: int = about(
        "optimizer steps over which gradients of candidates are added up before a selection", 5
    )
    reselection_rate_policy: str = about("how the share exchanged falls: linear, cosine", "linear")
    initial_reselection_rate: float = about("share exchanged at the start, in [0, 1]", 0.2)
    full_first_reselection: bool | None = about(
        "the first selection may exchange all; null: if the policy is linear", None
    )
    total_step: int | None = about("optimizer steps of the run; none is exchanged after it", None)
    init_seed: int = about("seed of the random start", 0)
    fan_in_fan_out: bool = about("PEFT's name; Conv1D layers are recognised by themselves", False)

    def check(self) -> None:
        require(0 < self.density <= 1, f"density must be in (0, 1], got {self.density}")
        for name in ("r", "num_tunable_weights", "total_step"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} is not at least 1")
        require(
            self.selection_algorithm in ("rigl", "sm3", "none"),
            f"selection_algorithm must be rigl, sm3 or none, got {self.selection_algorithm!r}",
        )
        steps, observed = self.reselection_steps, self.selection_accumulation_steps
        require(observed >= 1, f"selection_accumulation_steps={observed} is not at least 1")
        require(
            observed < steps,
            "selection_accumulation_steps must be smaller than reselection_steps, "
            f"got {observed} and {steps}",
        )
        require(
            self.reselection_rate_policy in ("linear", "cosine"),
            f"reselection_rate_policy={self.reselection_rate_policy!r} is not linear or cosine",
        )
        rate = self.initial_reselection_rate
        require(0 <= rate <= 1, f"initial_reselection_rate={rate} is not in [0, 1]")

    # The schedule; steps are completed optimizer steps, from 1

    @property
    def reselects(self) -> bool:
        """Whether the weights are revised at all."""
        return self.selection_algorithm != "none"

    def check_total(self) -> None:
        """Raise InputError if weights are revised and nobody said for how long."""
        require(
            not self.reselects or self.total_step is not None,
            "total_step must be set when weights are reselected: the optimizer steps of the run; "
            "selection_algorithm='none' does without",
        )

    def observes(self, step: int) -> bool:
        """Whether the gradients of update `step` are watched, for a selection that will happen."""
        since = (step - 1) % self.reselection_steps
        selection = step - 1 - since + self.selection_accumulation_steps
        watches = self.selection_algorithm == "rigl" and since < self.selection_accumulation_steps
        return watches and (self.total_step is None or selection <= self.total_step)

    def selects(self, step: int) -> bool:
        """Whether weights are exchanged after update `step`."""
        due = step % self.reselection_steps == self.selection_accumulation_steps
        return self.reselects and due and self.total_step is not None and step <= self.total_step

    def share(self, step: int) -> float:
        """Which share of the weights the selection after update `step` may exchange."""
        assert self.total_step is not None
        linear, progress = self.reselection_rate_policy == "linear", step / self.total_step
        full = linear if self.full_first_reselection is None else self.full_first_reselection
        if full and step == self.selection_accumulation_steps:
            return 1.0
        left = 1 - progress if linear else (1 + math.cos(math.pi * progress)) / 2
        return self.initial_reselection_rate * left


# The budget


def deltas_by_module(config: SparseConfig, model: nn.Module, shapes: Shapes) -> dict[str, int]:
    """How many weights of each target are tuned: the same share of each, rounded down.

    Raises:
        InputError: more than there are, or `num_deltas` is about other modules.
    """
    sizes = {key: shape.in_features * shape.out_features for key, shape in shapes.items()}
    if config.num_deltas is not None:
        return _given(config.num_deltas, sizes)
    number, total = _number(config, model, shapes), sum(sizes.values())
    require(
        number <= total,
        f"number of tunable weights {number} exceeds the {total} weights of the target modules",
    )
    return {key: number * size // total for key, size in sizes.items()}


def _number(config: SparseConfig, model: nn.Module, shapes: Shapes) -> int:
    if config.num_tunable_weights is not None:
        return config.num_tunable_weights
    if config.r is not None:
        return config.r * sum(shape.in_features + shape.out_features for shape in shapes.values())
    return int(config.density * base_size(model, set()))


def _given(deltas: dict[str, int], sizes: dict[str, int]) -> dict[str, int]:
    strange = sorted(set(deltas) ^ set(sizes))
    if strange:
        raise InputError(
            f"num_deltas and target_modules name different modules ({strange[0]} is in one only); "
            "set num_deltas to null to share the weights out anew"
        )
    for key, count in deltas.items():
        most = sizes[key]
        require(0 <= count <= most, f"num_deltas of {key} is {count}, not in 0..{most}")
    return {key: deltas[key] for key in sizes}


def base_size(module: nn.Module, seen: set[int]) -> int:
    """Parameters of a base model, tied ones once; a packed weight counts as what it stands for."""
    if isinstance(module, BaseTunerLayer):
        return base_size(module.get_base_layer(), seen)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return base_size(module.original_module, seen)
    size = sum(base_size(child, seen) for child in module.children())
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            size += _unpacked_size(module) if name == "weight" else parameter.numel()
    return size


def _unpacked_size(module: Any) -> int:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    return module.weight.numel()
