"""Weights & Biases: records a run online, or offline in its folder without key or network.

The id of the W&B run is in wandb.json in the run's folder, so that a run resumed from a checkpoint
keeps its id. Offline, W&B cannot resume a run: it starts a second file with the same id. That file
gets the complete history again, from metrics.jsonl, and is then the only one to synchronize.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from petl.core.types import Groups, Record
from petl.errors import InputError, first_line
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.system.values import check_rules, field, one_of, real
from petl.training.runs.config import names_of
from petl.training.tracking.base import Tracker, TrackerConfig, TrackerTable, metrics_of

ID_FILE = "wandb.json"  # in the run's folder
Mode = Any  # one of `MODES`, a Literal of W&B
MODES = ("online", "offline", "disabled", "shared")
LONGEST_TAG = 64  # characters, W&B's limit
TIMEOUT = 5.0  # seconds until a network counts as absent; assumption
logger = logging.getLogger(__name__)


class Id(TypedDict):
    """The content of `ID_FILE` that is used here."""

    id: str


@dataclass(frozen=True)
class WandbConfig(TrackerConfig):
    """Settings of W&B; see configs/tracker/wandb.yaml."""

    project: str = "petl"
    entity: str | None = None
    group: str | None = None  # None: the method
    job_type: str = "train"
    tags: list[str] = field([])  # none: method, ranks, loss, model and data
    run_name: str | None = None
    mode: str | None = field(None, one_of(*MODES))
    save_adapter: bool = False
    finish_timeout: float = field(600.0, real(0, above=True))  # seconds

    def __post_init__(self) -> None:
        check_rules(self, "tracker")

    def tracker(self) -> Tracker:
        """Return the tracker of W&B with these settings."""
        return WandbTracker(self)


class WandbTracker(Tracker):
    """Record a run on W&B."""

    config: WandbConfig

    def __init__(self, config: WandbConfig) -> None:
        self.config, self.name = config, config.name

    def begin(self, run: Path, config: Groups) -> None:
        """Start or resume the W&B run.

        Raises:
            InputError: W&B refuses the run, for example because of the key or the project; or
                wandb.json is damaged.
        """
        import wandb

        id_file, settings, self.folder = run / ID_FILE, self.config, run
        known = read_json(id_file, Id)["id"] if id_file.exists() else None
        try:
            mode, reason = choose_mode(settings)
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group or " ".join(names_of(config)[:1]) or None,
                job_type=settings.job_type,
                tags=settings.tags or [name[:LONGEST_TAG] for name in names_of(config)],
                name=settings.run_name or run.name,
                config=dict(config),
                dir=run,
                id=known,  # None: a new one, or the one that the agent of a sweep has set
                resume="allow",
                mode=mode,
                reinit="create_new",  # one process may run several jobs of a sweep
                settings=wandb.Settings(
                    silent=True,
                    finish_timeout=settings.finish_timeout,
                    finish_timeout_raises=True,
                ),
            )
        except (wandb.Error, TimeoutError) as error:
            raise InputError(
                f"W&B refuses the run: {' '.join(str(error).split())}; "
                "tracker.mode=offline records it in the run's folder"
            ) from error
        # False if `finish` times out
        self.is_sent = not self.run.offline
        write_atomic(id_file, as_json({"id": self.run.id, "project": settings.project}))
        if self.run.offline:
            logger.info("W&B: the run is recorded offline (%s)", reason)
        elif self.run.url:
            logger.info("W&B: %s", self.run.url)

    def rewind(self, records: Sequence[Record]) -> None:
        """Log the records of earlier steps that W&B does not have."""
        for record in records:  # `log` skips steps that W&B has
            self.log(record)

    def log(self, record: Record) -> None:
        """Log the metrics of a step, unless W&B has a later one."""
        self._send(lambda: self._log(record))

    def _log(self, record: Record) -> None:
        if record["step"] >= self.run.step:  # a resumed run repeats steps that W&B has recorded
            self.run.log(metrics_of(record), step=record["step"])

    def end(
        self,
        scores: Record,
        plots: Sequence[Path],
        adapter: Path,
        tables: Mapping[str, TrackerTable],
    ) -> None:
        """Log plots, scores and tables, and the adapter if configured."""
        self._send(lambda: self._log_results(scores, plots, adapter, tables))
        self._finish(0)

    def _log_results(
        self,
        scores: Record,
        plots: Sequence[Path],
        adapter: Path,
        tables: Mapping[str, TrackerTable],
    ) -> None:
        import wandb

        images = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in plots}
        self.run.log({"objective": scores["objective"], **images}, step=self.run.step)
        self.run.summary.update(dict(scores))
        self._log_tables(tables)
        if self.config.save_adapter:
            # W&B allows only these characters in names of artifacts
            name = re.sub(r"[^\w.-]+", "-", adapter.parent.name)
            artifact = wandb.Artifact(name, type="model", metadata=dict(scores))
            artifact.add_dir(str(adapter))
            self.run.log_artifact(artifact)

    def _log_tables(self, tables: Mapping[str, TrackerTable]) -> None:
        import wandb

        shown = {name: wandb.Table(dataframe=table.frame()) for name, table in tables.items()}
        try:
            if shown:
                self.run.log(shown, step=self.run.step)
        # tables are artifacts, for which W&B asks its server; a run must not end if that is gone
        except Exception as error:
            logger.warning("W&B did not take the tables of predictions (%s)", first_line(error))

    def fail(self) -> None:
        """Mark the run as failed."""
        self._finish(1)
        if self.closing():
            logger.info("%s", self.closing())

    def _finish(self, status: int) -> None:
        try:
            self.run.finish(exit_code=status)
        except TimeoutError:  # what was not uploaded is on disk
            self.is_sent = False
            seconds = self.config.finish_timeout
            logger.warning("W&B did not receive the complete run within %g s", seconds)
        except Exception as error:  # its process was killed
            self.is_sent = False
            if not self.lost:
                self._lose(error)

    def closing(self) -> str:
        """The address of the run, or the command that uploads it."""
        if not self.is_sent:
            return f"to upload the run to W&B: wandb sync {Path(self.run.dir).parent}"
        return f"on W&B: {self.run.url}" if self.run.url else ""


def choose_mode(config: WandbConfig) -> tuple[Mode, str]:
    """One of `MODES`, and the reason: the one that is set, else online if that is possible.

    Raises:
        InputError: WANDB_MODE is not one of `MODES`.
    """
    import wandb

    if config.mode is not None:
        return config.mode, f"tracker.mode={config.mode}"
    variable = os.environ.get("WANDB_MODE")
    if variable and variable not in MODES:
        raise InputError(f"WANDB_MODE={variable!r} is not one of {', '.join(MODES)}")
    if variable:
        return variable, f"WANDB_MODE={variable}"
    # True if there is a key; verify=False makes no request
    if not wandb.login(prompt=False, verify=False):
        return "offline", "no key: run wandb login, or set WANDB_API_KEY"
    host = wandb.setup().settings.base_url
    if not is_reachable(host):
        return "offline", f"{host} is not reachable"
    return "online", "key and network are available"


def is_reachable(address: str) -> bool:
    """True if a server answers at the address, with any status."""
    import requests  # a dependency of W&B

    try:
        requests.head(address, timeout=TIMEOUT)
    except requests.RequestException:
        return False
    return True
