"""A finished adapter below the one that a run trains (model.adapter), merged as the base loads."""

from petl.data.models.finished_adapter import checked_config
from petl.training.features import RunFeature
from petl.training.runs.config import RunConfig


class AdapterBelow(RunFeature):
    """Checks the finished adapter before anything is loaded."""

    def check(self, config: RunConfig) -> None:
        """Raise InputError for an adapter that is missing or cannot be merged."""
        checked_config(self.settings)
