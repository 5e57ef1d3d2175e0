"""The checked settings of a run, as `petl.training.runs.run_config.read_config` returns them."""

from dataclasses import dataclass, replace

from petl.core.spec.method import LossConfig
from petl.core.types import Fields, Groups, Settings
from petl.data.base import Source
from petl.data.models.sources import ModelSource
from petl.training.distributed.launch import Launch
from petl.training.runs.settings import TrainConfig
from petl.training.tracking import TrackerConfig

GROUPS = ("method", "model", "data", "train", "tracker")  # every configuration has these
NAMED = ("method", "ranks", "loss", "model", "data")  # groups whose names make the name of a run


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, checked.

    Attributes:
        train: the settings under `train`, the learning rate of the method filled in.
        model, data: where the base model and the data come from.
        method: the fields of the method and of its inner method, its name included.
        loss: an extra loss; None without one.
        launch: how several processes divide the work.
        tracker: where metrics go in addition to the run's folder; None: nowhere.
        resolved: the settings by group as nested plain values, as config.yaml stores them.
    """

    train: TrainConfig
    model: ModelSource
    data: Source
    method: Fields
    loss: LossConfig | None
    launch: Launch
    tracker: TrackerConfig | None
    resolved: Groups

    @property
    def precision(self) -> str:
        """The autocast precision, "no" or "bf16"."""
        return self.train.computes_in(self.model.dtype)

    def with_train(self, **values: object) -> "RunConfig":
        """Return these settings with others under `train`."""
        resolved = {**self.resolved, "train": {**self.resolved["train"], **values}}
        return replace(self, train=replace(self.train, **values), resolved=resolved)


def names_of(config: Settings) -> list[str]:
    """Return the parts of a run's name: recipe or method, ranks, extra loss, model, data."""
    named = {group: config[group]["name"] for group in NAMED if config.get(group)}
    if config.get("recipe"):
        named["method"] = config["recipe"]
    return [str(name) for name in named.values()]
