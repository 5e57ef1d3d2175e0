"""The checked settings of a run, as `petl.training.runs.run_config.read_config` returns them."""

from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from petl.core.losses import LossConfig
from petl.core.registry import build_config, method
from petl.core.types import Fields, Groups, Settings
from petl.errors import InputError
from petl.system.settings.command_line import preset_of
from petl.system.settings.schema import plain
from petl.training.runs.settings import AUTO, TrainConfig

if TYPE_CHECKING:  # `petl show` reads the fields of a method, and no data
    from petl.data.base import Source
    from petl.data.models.sources import ModelSource
    from petl.training.distributed.launch import Launch
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
        float32: why `train.precision=auto` is float32 whatever the device; "": nothing needs it.
    """

    train: TrainConfig
    model: "ModelSource"
    data: "Source"
    method: Fields
    loss: LossConfig | None
    launch: "Launch"
    tracker: "TrackerConfig | None"
    resolved: Groups
    float32: str = ""

    @property
    def precision(self) -> str:
        """The autocast precision, "no" or "bf16".

        A bfloat16 model trains with a float32 adapter and head, which needs autocast. Auto is what
        suits this model on this machine.
        """
        if self.model.dtype == "bfloat16":
            return "bf16"
        if self.train.precision == AUTO:
            # with torch, which is not imported to check settings
            automatic = resolve_name("petl.training.distributed.precision:automatic")
            return automatic(self.model, self.float32)
        return self.train.precision

    def with_train(self, **values: object) -> "RunConfig":
        """Return these settings with others under `train`."""
        resolved = {**self.resolved, "train": {**self.resolved["train"], **values}}
        return replace(self, train=replace(self.train, **values), resolved=resolved)


def names_of(config: Settings) -> list[str]:
    """Return the parts of a run's name: recipe or method, ranks, extra loss, model, data."""
    named = {group: config[group]["name"] for group in NAMED if config.get(group)}
    folder = config.get("model", {}).get("path")
    if isinstance(folder, str) and named["model"] == "path":
        named["model"] = Path(folder).name
    if config.get("recipe"):
        named["method"] = config["recipe"]
    return [str(name) for name in named.values()]


# The fields of a run's method: its settings, and what only the run determines


def method_fields(cfg: DictConfig | Settings, task_type: str | None, total_steps: int) -> Fields:
    """Return the method's name and fields: the settings, and what only the run determines.

    Raises:
        InputError: a field that the method does not have, or a value that it does not allow.
    """
    fields: Fields = {"task_type": task_type, **with_inner(plain(cfg))}
    if "total_step" in fields and fields["total_step"] is None:
        fields["total_step"] = total_steps  # for methods with a schedule, such as AdaLoRA
        check_schedule(fields)
    build_config(**fields)
    return fields


def check_schedule(fields: Fields) -> None:
    """Check that a pruning schedule such as AdaLoRA's leaves steps to prune in.

    Raises:
        InputError: `tinit` and `tfinal` take all steps of the run.
    """
    first, last, total = (fields.get(name) for name in ("tinit", "tfinal", "total_step"))
    # others are absent, or refused when the config is built
    if not (isinstance(first, int) and isinstance(last, int) and isinstance(total, int)):
        return
    if first + last < total:
        return
    raise InputError(
        f"method.tinit={first} steps before pruning and method.tfinal={last} after it leave none "
        f"of the run's {total}: lower them, or train longer (train.steps, train.epochs)"
    )


def with_inner(settings: Settings) -> Fields:
    """Return the settings of a method, completed by those of the method that it wraps, if any.

    A field of the inner method that is not set has the default of the outer method, or else that of
    the inner method's YAML file, as if the inner method were trained alone.

    Raises:
        InputError: an unknown method or inner method.
    """
    entry = method(settings["name"]).variant(settings)
    if not entry.inner:
        return {**entry.inner_defaults, **settings}
    return {**preset_of(entry.inner), **entry.inner_defaults, **settings}
