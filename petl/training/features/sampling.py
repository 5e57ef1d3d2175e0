"""Which rows an epoch visits: of sets at a temperature or by share, or of classes equally many.

`temperature` and `shares` are for rows of several sets, `balanced` for rows with one class each.
"""

import math

from petl.core.support import Capability, Part
from petl.data.base import BALANCED, Stream, stream_refused
from petl.data.task_mixture import TaskMixture
from petl.data.tasks import IDS, SET
from petl.data.tasks.classification import SingleLabelTask
from petl.errors import InputError
from petl.training.dataloader import TrainingRows
from petl.training.features import RunFeature


class RowSampling(RunFeature):
    """Draws rows of small sets or classes more often than once an epoch, others less often."""

    repeats = {Capability.BUCKETS: "it repeats rows, and buckets take each row once an epoch"}

    @property
    def part(self) -> Part:
        """The feature; sampling by size visits each row once."""
        return Part(f"{self.setting}={self.settings}", (), {} if self.by_size else self.repeats)

    @property
    def by_size(self) -> bool:
        """True if an epoch visits each row once."""
        return self.settings == "size"

    def order(self, rows: TrainingRows) -> TrainingRows:
        """Return the rows with their mixture.

        Raises:
            InputError: `balanced` rows have no class each, or are read during training.
        """
        if self.by_size:
            return rows
        data = self.groups["data"]
        if self.settings != BALANCED:
            assert not isinstance(rows.train, Stream), "sets are no streams"
            ids = rows.train[SET if SET in rows.train.column_names else IDS]
            if self.settings == "shares":
                shares = [float(data["shares"][name]) for name in data["sets"]]
                return rows._replace(mixture=TaskMixture.of_shares(ids, shares))
            number, temperature = len(data["sets"]), float(data["temperature"])
            return rows._replace(mixture=TaskMixture.of_temperature(ids, number, temperature))
        given = f"data.sampling={BALANCED}"
        if isinstance(rows.train, Stream):
            raise stream_refused(given)
        if not isinstance(rows.task, SingleLabelTask):
            raise InputError(
                f"{given} needs rows with one class each, and data.task={rows.task.name} has none: "
                "leave data.sampling out; train.class_weights is for other tasks with classes"
            )
        labels, number = rows.train["labels"], len(rows.task.classes)
        return rows._replace(mixture=TaskMixture.of_temperature(labels, number, math.inf))
