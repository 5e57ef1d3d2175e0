"""A run on Weights & Biases, or kept for it in the run's folder when there is no key or network.

The run's id stands in wandb.json there, so that a run that goes on from a checkpoint goes on under
the same id. Offline, W&B cannot go on with a run: it begins a second file under the id. That file
gets the whole history anew, from metrics.jsonl, and is then the only one to send.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petl.errors import InputError
from petl.tracking.base import Tracker, TrackerConfig, figures

NOTE = "wandb.json"  # in the run's folder: the id
MODES = ("online", "offline", "disabled", "shared")
PATIENCE = 5.0  # seconds until a network counts as absent
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbConfig(TrackerConfig):
    """What W&B is told of a run; see configs/tracker/wandb.yaml."""

    project: str = "petl"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    run_name: str | None = None
    mode: str | None = None
    save_adapter: bool = False
    finish_timeout: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.finish_timeout < math.inf:
            raise InputError(
                f"tracker.finish_timeout={self.finish_timeout} is not a number of seconds above 0"
            )
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"tracker.mode={self.mode!r} is not one of {', '.join(MODES)}, null")


class WandbTracker(Tracker):
    """A W&B run of this process."""

    def __init__(self, config: WandbConfig) -> None:
        self.config = config

    def begin(self, run: Path, config: Mapping[str, Any]) -> None:
        """Begin the W&B run, or go on with it.

        Raises:
            InputError: W&B refuses it, because of the key or the project, say.
        """
        import wandb

        from petl.files.disk import as_json, replace  # which imports the settings, and they this

        mode, reason = choose_mode(self.config)
        note, mine = run / NOTE, self.config
        known = json.loads(note.read_text())["id"] if note.is_file() else None
        try:
            self.run = wandb.init(
                project=mine.project,
                entity=mine.entity,
                group=mine.group,
                tags=mine.tags,
                name=mine.run_name or run.name,
                config=dict(config),
                dir=run,
                id=known,  # None: a new one, or that which an agent of a sweep has given
                resume="allow",
                mode=mode,
                reinit="create_new",  # several runs of a sweep may be made by one process
                settings=wandb.Settings(
                    silent=True,
                    finish_timeout=mine.finish_timeout,
                    finish_timeout_raises=True,
                ),
            )
        except (wandb.Error, TimeoutError) as error:
            raise InputError(
                f"W&B does not take the run: {' '.join(str(error).split())}; "
                "tracker.mode=offline keeps it here"
            ) from error
        self.is_sent = not self.run.offline
        replace(note, as_json({"id": self.run.id, "project": mine.project}))
        if self.run.offline:
            logger.info("W&B: %s, so the run is kept offline", reason)
        elif self.run.url:
            logger.info("W&B: %s", self.run.url)

    def rewind(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:  # what W&B has of them is passed over
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        if record["step"] >= self.run.step:  # a resumed run repeats steps that W&B has seen
            self.run.log(figures(record), step=record["step"])

    def end(self, scores: Mapping[str, Any], pictures: Sequence[Path], adapter: Path) -> None:
        import wandb

        images = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures}
        self.run.log({"objective": scores["objective"], **images}, step=self.run.step)
        self.run.summary.update(dict(scores))
        if self.config.save_adapter:
            name = re.sub(r"[^\w.-]+", "-", adapter.parent.name)
            artifact = wandb.Artifact(name, type="model", metadata=dict(scores))
            artifact.add_dir(str(adapter))
            self.run.log_artifact(artifact)
        self._finish(0)

    def fail(self) -> None:
        self._finish(1)
        if self.closing():
            logger.info("%s", self.closing())

    def _finish(self, status: int) -> None:
        try:
            self.run.finish(exit_code=status)
        except TimeoutError:  # what was not sent is on the disk
            self.is_sent = False
            seconds = self.config.finish_timeout
            logger.warning("W&B did not take all of the run within %g s", seconds)

    def closing(self) -> str:
        if not self.is_sent:
            return f"send it to W&B later: wandb sync {Path(self.run.dir).parent}"
        return f"on W&B: {self.run.url}" if self.run.url else ""


def choose_mode(config: WandbConfig) -> tuple[Any, str]:
    """One of `MODES`, and why: as asked for, else online if that is possible.

    Raises:
        InputError: the environment asks for what W&B does not know.
    """
    import wandb

    if config.mode is not None:
        return config.mode, f"tracker.mode={config.mode}"
    asked = os.environ.get("WANDB_MODE")
    if asked and asked not in MODES:
        raise InputError(f"WANDB_MODE={asked!r} is not one of {', '.join(MODES)}")
    if asked:
        return asked, f"WANDB_MODE={asked}"
    if not wandb.login(prompt=False, verify=False):
        return "offline", "there is no key (wandb login, or WANDB_API_KEY)"
    host = wandb.setup().settings.base_url
    if not is_reachable(host):
        return "offline", f"{host} cannot be reached"
    return "online", "there are a key and a network"


def is_reachable(address: str) -> bool:
    """Whether anything answers there, whatever it says."""
    import requests  # W&B itself needs it

    try:
        requests.head(address, timeout=PATIENCE)
    except requests.RequestException:
        return False
    return True
