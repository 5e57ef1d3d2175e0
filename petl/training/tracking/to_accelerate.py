"""The trackers of Accelerate: MLflow, Comet, Trackio, Aim, ClearML, DVCLive, SwanLab, your own.

The id that the service gave the run is in tracker.json in the run's folder, so that a run resumed
from a checkpoint continues it, where the service allows it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from petl.core.types import Arguments, Groups, Record
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json, read_json_lines
from petl.system.settings.schema import flat
from petl.training.tracking.base import Tracker, TrackerConfig, TrackerTable, metrics_of, reason
from petl.training.tracking.services import SERVICES, ServiceRun, TrackerService, service_of

ID_FILE = "tracker.json"  # in the run's folder
METRICS = "metrics.jsonl"
logger = logging.getLogger(__name__)


class TrackerRecord(TypedDict):
    """The content of `ID_FILE`: the tracker, and its id of the run."""

    tracker: str
    id: str


@dataclass(frozen=True)
class ServiceConfig(TrackerConfig):
    """Settings of a tracker of Accelerate; see configs/tracker/mlflow.yaml."""

    project: str = "petl"
    run_name: str | None = None
    arguments: Arguments = field(default_factory=dict)
    save_adapter: bool = False

    def tracker(self) -> Tracker:
        """Return the tracker of Accelerate with these settings."""
        return ServiceTracker(self)


class ServiceTracker(Tracker):
    """Record a run by a tracker of Accelerate."""

    config: ServiceConfig

    def __init__(self, config: ServiceConfig) -> None:
        self.config, self.name = config, config.name
        self.service = service_of(config.name)
        self.step = 0
        self.sent: set[tuple[object, ...]] = set()  # records that the service has from before

    def begin(self, run: Path, config: Groups) -> None:
        """Start the run, or continue it.

        Raises:
            InputError: the service refuses it, for example without key or network.
        """
        self.folder, name = run, self.config.run_name or run.name
        known = known_id(run, self.config.name)
        # the user's own arguments win
        arguments = self.service.arguments(run, name, known) | self.config.arguments
        try:
            self.service.prepare(arguments)
            self.tracker = accelerates(self.service, self.config, run, arguments)
            self.tracker.start()
            try:
                given = self.service.began(self.tracker.tracker, name)
                if known is None:  # a service may refuse values that differ from those it has
                    self.tracker.store_init_configuration(flat(config))
            except BaseException:
                self.fail()
                raise
        except Exception as error:  # each service has errors of its own
            raise InputError(
                f"tracker={self.config.name} refuses the run: {reason(error)}; tracker=none "
                "records it in its folder only"
            ) from error
        # those behind the checkpoint too: training repeats their steps
        if known is not None and (run / METRICS).exists():
            self.sent = {key_of(record) for record in read_json_lines(run / METRICS, dict)}
        if given is not None:
            content = TrackerRecord(tracker=self.config.name, id=given)
            write_atomic(run / ID_FILE, as_json(content))

    def rewind(self, records: Sequence[Record]) -> None:
        """Log the records of earlier steps that the service does not have."""
        for record in records:
            self.log(record)

    def log(self, record: Record) -> None:
        """Log the metrics of a step, unless the service has them from before a resumption."""
        self.step = record["step"]
        if key_of(record) not in self.sent:
            self._send(lambda: self.tracker.log(metrics_of(record), step=self.step))

    def end(
        self,
        scores: Record,
        plots: Sequence[Path],
        adapter: Path,
        tables: Mapping[str, TrackerTable],
    ) -> None:
        """Log the scores, plots and tables, and the adapter if configured."""
        # Accelerate's trackers disagree about texts; scores.json has all
        numbers = {name: v for name, v in scores.items() if isinstance(v, int | float)}
        self._send(lambda: self.tracker.log(numbers, step=self.step))
        self._send(lambda: self._end(plots, adapter, tables))
        self._send(self.tracker.finish)

    def _end(
        self, plots: Sequence[Path], adapter: Path, tables: Mapping[str, TrackerTable]
    ) -> None:
        service, run = self.service, self.tracker.tracker
        results = {name: service.table(run, name, t, self.step) for name, t in tables.items()}
        results |= {path.name: service.picture(run, path, self.step) for path in plots}
        if self.config.save_adapter:
            results["the adapter"] = service.adapter(run, adapter)
        left_out = [name for name, taken in results.items() if taken is NotImplemented]
        if left_out:
            logger.info(
                "tracker=%s does not take %s, only in %s",
                self.config.name,
                ", ".join(left_out),
                self.folder,
            )

    def fail(self) -> None:
        """Mark the run as failed and close it."""
        self._send(lambda: self.service.failed(self.tracker.tracker))
        self._send(self.tracker.finish)

    def closing(self) -> str:
        """How to view the run."""
        return "" if self.lost else self.service.closing(self.config.project, self.folder)


def accelerates(
    service: TrackerService, config: ServiceConfig, run: Path, arguments: Arguments
) -> ServiceRun:
    """Build Accelerate's tracker of a run; arguments are those of its class."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_cls: ServiceRun = LOGGER_TYPE_TO_CLASS[service.key or config.name]
    place = {"logging_dir": str(run)} if tracker_cls.requires_logging_directory else {}
    return tracker_cls(config.project, **(place | arguments))


def key_of(record: Record) -> tuple[object, ...]:
    """What tells lines of metrics.jsonl apart: a step has one of training, one of validation."""
    return record["step"], *sorted(record)


def known_id(run: Path, name: str) -> str | None:
    """The id of the run with this tracker, if it had one before."""
    file = run / ID_FILE
    known = read_json(file, TrackerRecord) if file.exists() else None
    return known["id"] if known and known["tracker"] == name else None


def package_of(name: object) -> str | None:
    """The package of a tracker of Accelerate's; "" for one that the user's code registers.

    None for W&B and TensorBoard, which petl records itself, and for what is no tracker.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if not isinstance(name, str) or name in ("wandb", "tensorboard"):
        return None
    if name in SERVICES:
        return SERVICES[name].package
    return "" if name in LOGGER_TYPE_TO_CLASS else None
