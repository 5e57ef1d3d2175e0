"""What a run distributes ranks over: the blocks with targets, their mean, the cost of a rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from petl.core.parameters import trainable
from petl.core.registry import on_shapes, without_data
from petl.core.spec.config import MethodConfig
from petl.core.spec.facts import facts_of
from petl.core.types import Fields
from petl.errors import InputError
from petl.system.values import field, integer, one_of, real
from petl.training.calibration import CalibrationData
from petl.training.ranks.allocation import check_bounds
from petl.training.ranks.importance import METRICS, blocks_of


@dataclass(frozen=True, kw_only=True)
class RanksConfig(CalibrationData):
    """How a run distributes ranks over blocks: `+ranks=cfsp`, see `petl.ranks.allocate`."""

    name: str = field("cfsp", one_of("cfsp"))
    metric: str = field("angular", one_of(*METRICS))
    least: int = field(1, integer(1))
    most: int | None = field(None, integer(1))
    power: float = field(1.0, real(0))
    # what is equal to that of equal ranks: their sum, or the parameters
    budget: str = field("sum", one_of("sum", "params"))
    num_samples: int = field(128, integer(1))
    seq_len: int = field(1024, integer(1))


@dataclass(frozen=True)
class RankTargets:
    """What ranks are distributed over.

    Attributes:
        mean: of the ranks.
        cost: of one rank of each block that has targets, by path.
    """

    mean: int
    cost: dict[str, int]


def rank_targets(
    settings: RanksConfig, build: Callable[[], PreTrainedModel], fields: Fields
) -> RankTargets:
    """Return the blocks that have targets, and the mean of their ranks; no weights are read.

    Args:
        settings: those under `ranks`.
        build: makes the base model on the meta device.
        fields: of the method, its name included, at the size of the run.

    Raises:
        InputError: no target is in a block, the mean is unknown or outside of `ranks.least` and
            `ranks.most`, or the parameters of a block do not grow with its rank.
    """

    def shaped(**changed: int) -> PeftModel:
        return on_shapes(build, without_data({**fields, **changed})[0])

    model = shaped()
    paths = blocks_with_targets(model)
    if not paths:
        raise InputError(
            f"ranks={settings.name}: no target of method {fields['name']!r} is in a block of "
            f"{type(model.get_base_model()).__name__}; change method.target_modules, or leave out "
            "ranks"
        )
    mean = mean_rank(model, paths)
    check_bounds(mean, settings.least, settings.most, settings.power)
    if settings.budget == "sum":
        return RankTargets(mean, dict.fromkeys(paths, 1))
    sizes, larger = (parameters_of(shaped(r=r), paths) for r in (mean, mean + 1))
    cost = {path: larger[path] - sizes[path] for path in paths}
    constant = [path for path in paths if cost[path] < 1]
    if constant:
        raise InputError(
            f"ranks.budget=params is not possible: {constant[0]} has {sizes[constant[0]]} "
            f"parameters at rank {mean} and {larger[constant[0]]} at rank {mean + 1}; use "
            "ranks.budget=sum"
        )
    return RankTargets(mean, cost)


def blocks_with_targets(model: PeftModel) -> list[str]:
    """Return the paths of the blocks in which the adapter of a model has targets."""
    tuner: Any = model.base_model
    names = [*tuner.targeted_module_names, *getattr(tuner, "targeted_parameter_names", ())]
    found = blocks_of(model.get_base_model())
    return [path for path in found if any(name.startswith(f"{path}.") for name in names)]


def mean_rank(model: PeftModel, paths: list[str]) -> int:
    """Return `r` of the adapter; if it is null, the rank that all modules of the blocks have.

    Raises:
        InputError: the modules have different ranks, or none.
    """
    config, tuner = model.active_peft_config, model.base_model
    ranks: set[Any] = {facts_of(config).r}
    if ranks == {None} and isinstance(config, MethodConfig):
        placed: Any = tuner.placed
        ranks = {
            config.rank_and_scaling(key, adapter.shape)[0]
            for adapters in placed.values()
            for key, adapter in adapters.items()
            if key.startswith(tuple(f"{path}." for path in paths))
        }
    if len(ranks) != 1 or None in ranks:
        raise InputError(
            "method.r=null has no mean for ranks by importance; set method.r, or train.budget"
        )
    return ranks.pop()


def parameters_of(model: PeftModel, paths: list[str]) -> dict[str, int]:
    """Return the number of adapter parameters in each block."""
    counts = dict.fromkeys(paths, 0)
    for name, parameter in trainable(model.get_base_model()):
        for path in paths:
            if name.startswith(f"{path}.") and "modules_to_save" not in name.split("."):
                counts[path] += parameter.numel()
    return counts
