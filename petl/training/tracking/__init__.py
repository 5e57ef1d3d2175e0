"""Experiment trackers: Weights & Biases, TensorBoard, the others of Accelerate, or none.

The packages are extras: `tracking` has the first two, each of the others has the tracker's name.
They are imported when a run with such a tracker begins.
"""

from petl.core.types import Settings
from petl.errors import choose
from petl.system.imports.extras import need_extra
from petl.system.values import read_fields
from petl.training.tracking.base import Tracker, TrackerConfig, TrackerTable
from petl.training.tracking.services import SERVICES
from petl.training.tracking.to_accelerate import ServiceConfig, package_of
from petl.training.tracking.to_tensorboard import TensorboardConfig
from petl.training.tracking.to_wandb import WandbConfig

__all__ = ["Tracker", "TrackerConfig", "TrackerTable", "read_tracker"]

CONFIGS: dict[str, type[TrackerConfig]] = {
    "none": TrackerConfig,
    "wandb": WandbConfig,
    "tensorboard": TensorboardConfig,
}


def read_tracker(settings: Settings) -> TrackerConfig:
    """Read and check the settings of a configuration's `tracker`.

    Raises:
        InputError: the tracker or a setting is unknown, or its package is not installed.
    """
    name = settings.get("name")  # may be anything that YAML can express
    package = package_of(name)
    if package is not None:
        config_cls, extra = ServiceConfig, str(name)
    else:
        # Accelerate's are suggested as well
        config_cls = choose(CONFIGS, name, "tracker", others=SERVICES)
        # the package has the name of the tracker
        package, extra = "" if name == "none" else str(name), "tracking"
    config = read_fields(config_cls, settings, "tracker")
    if package:
        need_extra(extra, package, f"tracker={name}")
    return config
