"""Experiment trackers: Weights & Biases, TensorBoard, the others of Accelerate, or none.

The packages are extras: `tracking` has the first two, each of the others has the tracker's name.
They are imported when a run with such a tracker begins.
"""

from importlib import import_module
from pkgutil import resolve_name

from petl.core.types import Settings
from petl.errors import choose
from petl.system.imports.extras import need_extra
from petl.system.values import read_fields
from petl.training.tracking.base import Tracker, TrackerConfig

__all__ = ["Tracker", "TrackerConfig", "read_tracker"]

# by `tracker.name`, "module:class" of the settings, imported when it is chosen
TRACKERS = {
    "none": "petl.training.tracking.base:TrackerConfig",
    "wandb": "petl.training.tracking.to_wandb:WandbConfig",
    "tensorboard": "petl.training.tracking.to_tensorboard:TensorboardConfig",
}


def read_tracker(settings: Settings) -> TrackerConfig:
    """Read and check the settings of a configuration's `tracker`.

    Raises:
        InputError: the tracker or a setting is unknown, or its package is not installed.
    """
    name = settings.get("name")  # may be anything that YAML can express
    accelerates = import_module("petl.training.tracking.to_accelerate")  # for a run with a tracker
    package = accelerates.package_of(name)
    if package is not None:
        config_cls, extra = accelerates.ServiceConfig, str(name)
    else:
        # Accelerate's are suggested as well
        config_cls = resolve_name(choose(TRACKERS, name, "tracker", others=accelerates.SERVICES))
        # the package has the name of the tracker
        package, extra = "" if name == "none" else str(name), "tracking"
    config = read_fields(config_cls, settings, "tracker")
    if package:
        need_extra(extra, package, f"tracker={name}")
    return config
