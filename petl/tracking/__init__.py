"""Experiment trackers: Weights & Biases, TensorBoard, or none.

The packages are the extra `tracking`. They are imported when a run with such a tracker begins.
"""

from collections.abc import Mapping
from typing import Any

from petl.config.schema import read_fields
from petl.errors import choose
from petl.imports.extras import need_extra
from petl.tracking.base import Tracker, TrackerConfig
from petl.tracking.to_tensorboard import TensorboardConfig, TensorboardTracker
from petl.tracking.to_wandb import WandbConfig, WandbTracker

__all__ = ["Tracker", "TrackerConfig", "make_tracker", "read_tracker"]

CONFIGS: dict[str, type[TrackerConfig]] = {
    "none": TrackerConfig,
    "wandb": WandbConfig,
    "tensorboard": TensorboardConfig,
}


def read_tracker(settings: Mapping[str, Any]) -> TrackerConfig:
    """Read and check the settings of a configuration's `tracker`.

    Raises:
        InputError: the tracker or a setting is unknown, or its package is not installed.
    """
    config = read_fields(choose(CONFIGS, settings.get("name"), "tracker"), settings, "tracker")
    name = config.name
    if name != "none":
        # the package has the name of the tracker
        need_extra("tracking", name, f"tracker={name}")
    return config


def make_tracker(config: TrackerConfig) -> Tracker | None:
    """Return a tracker with these settings; None for `tracker=none`."""
    if isinstance(config, WandbConfig):
        return WandbTracker(config)
    return TensorboardTracker() if isinstance(config, TensorboardConfig) else None
