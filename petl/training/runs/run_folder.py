"""One run: its folder, log, scores and timer, and the checkpoint that it resumes from.

    config.yaml       the resolved configuration
    environment.json  versions, machine, processes, git revision, command
    metrics.jsonl     one line per log point and evaluation
    checkpoints/      see petl/training/runs/checkpoint.py
    adapter/          the result in PEFT's format, with a README that shows how to load it
    scores.json       before, linear_probe, after; sizes and times
    predictions*.jsonl  of the test examples, after training; before it of tasks that generate
    heat_maps.json, *.png  what the method did, by layer
    ranks.json, ranks.png  importance and rank of each block, with +ranks
    lr_range.*        the learning rate range test, with train.find_lr
    report.html       all of this on one page
    wandb/, wandb.json, tensorboard/, tracker.json   files of the tracker, if there is one
    start/            the adapter's initial values, of methods that change the base when they begin
    .lock             the lock of the process that writes to the folder, and its name

Only the main process writes. The folder is made by `Run.begin`: bad input leaves nothing behind.
"""

import json
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from omegaconf import OmegaConf
from peft import PeftModel

from petl.core.fingerprint import check_saved
from petl.core.spec.facts import modifies_base_weights
from petl.core.types import Record
from petl.errors import InputError
from petl.system.collectives import on_main
from petl.system.files.disk import (
    CHECKPOINTS,
    append_to,
    as_json,
    atomic_folder,
    check_free_space,
    stop_when_full,
    write_atomic,
)
from petl.system.processes import claim
from petl.training.distributed.launch import start
from petl.training.runs.checkpoint import clean, read_state, room_for, save_adapter
from petl.training.runs.config import RunConfig, names_of
from petl.training.runs.environment import PhaseTimer, describe_environment
from petl.training.runs.records import (
    ADAPTER,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SCORES,
    is_finished,
    read_log,
    read_scores,
)
from petl.training.runs.resume import (
    PRECISION,
    choose_checkpoint,
    exists_already,
    identity,
    may_start_in,
    objective_of,
)
from petl.training.runs.settings import AUTO, TrainConfig

if TYPE_CHECKING:
    from petl.training.tracking import Tracker

START = "start"
logger = logging.getLogger(__name__)


class Scores(Record):
    """The content of scores.json, written at each change."""

    def __init__(self, run: Path, known: Record, *, writes: bool) -> None:
        super().__init__(known)
        self.run, self.writes = run, writes

    def add(self, scores: Record) -> None:
        """Add entries, and write the file if this is the main process."""
        # on all processes: each decides by it which scores are there already
        self.update(scores)
        if self.writes:
            with stop_when_full(self.run):
                # a task's scores keep their order: the first selects the best checkpoint
                write_atomic(self.run / SCORES, as_json(self, in_order=True))

    @property
    def objective(self) -> float:
        """The score that a sweep optimizes."""
        return objective_of(self)


class MetricsLog:
    """The lines of metrics.jsonl, which a tracker gets as well."""

    def __init__(self, run: Path, tracker: "Tracker | None", *, writes: bool) -> None:
        self.file, self.tracker, self.writes = run / METRICS, tracker, writes

    def append(self, record: Record) -> None:
        """Append a line."""
        if self.writes:
            with stop_when_full(self.file.parent), append_to(self.file) as opened:
                opened.write(f"{json.dumps(record)}\n".encode())
        if self.tracker:
            self.tracker.log(record)

    def rewind(self, checkpoint: Path) -> None:
        """Cut the log back to `checkpoint`, from which the run resumes.

        The lines are those of the checkpoint's copy: the run may have resumed from an older
        checkpoint before, and have been stopped again.
        """
        if self.writes:
            kept = read_log(checkpoint / METRICS)
            write_atomic(self.file, "".join(f"{json.dumps(record)}\n" for record in kept))
            if self.tracker:
                self.tracker.rewind(kept)


class Run:
    """One training run, from the choice of its folder to its last score.

    Attributes:
        config: its checked settings.
        identity: the settings that a run which resumes it must share.
        resume: the verified checkpoint that it resumes from, or None.
        was_finished: True if that is of a finished run: until this one is finished as well, the
            files of the folder remain those of the shorter run.
        path: its folder, from `begin` on.
        scores: the content of scores.json, from `begin` on.
        log: the lines of metrics.jsonl, from `begin` on.
        timer: time by phase.
        environment: the content of environment.json, which features add to before `begin`.
        tracker: the tracker of the main process; None without one.
    """

    scores: Scores
    log: MetricsLog

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        """Choose the folder and the checkpoint; nothing is written yet.

        Raises:
            InputError: as `choose_checkpoint`.
            JobSkipped: this is a job of a sweep, and finished or taken by another worker.
        """
        self.config, self.accelerator = config, accelerator
        # names may have a slash, as repositories on the Hub do
        self.prefix = re.sub(r"[^\w.-]+", "-", "-".join(names_of(config.resolved)))
        self.timer = PhaseTimer(accelerator.device)
        self.environment: Record = {}
        self.tracker: Tracker | None = None
        if config.tracker is not None and accelerator.is_main_process:
            self.tracker = config.tracker.tracker()
        # one process looks at the disk, the others get its result or its error
        self.resume: Path | None
        self._asked = identity(config.resolved)
        self.resume, self.was_finished, begun = on_main(accelerator, self._choose)
        self.config = config.with_train(**begun)
        if self.config.precision != config.precision:  # that of the run, not of this machine
            self.accelerator = start(config.train.seed, self.config.precision, config.launch)
        self.path = Path(config.train.run or config.train.output)
        self.identity = identity(self.config.resolved)
        if self.resume:
            # RUN/checkpoints/STEP
            self.path = self.resume.parent.parent

    def _choose(self) -> tuple[Path | None, bool, Record]:
        """Return the checkpoint, True if its run is finished and will be trained further, settings.

        The last are those under `train` that replace auto.
        """
        found = choose_checkpoint(self.config.train, self._asked)
        begun: dict[str, str] = {}
        if self.config.train.precision == AUTO:
            from petl.training.distributed.precision import described  # of auto

            # a resumed run keeps what auto was when it began
            kept = {} if found is None else read_state(found)["identity"]
            begun = {"precision": kept.get(PRECISION, self.config.precision)}
            said = described(begun["precision"], self.config.model, self.config.float32)
            as_before = "" if found is None else ", as this run began"
            logger.info("train.precision=auto: %s%s", said, as_before)
        return found, found is not None and is_finished(found.parent.parent), begun

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    def begin(self, model: PeftModel) -> None:
        """Make the folder and write what is known before training.

        Raises:
            InputError: the disk has too little room, or the base model is not that of the
                checkpoint.
        """
        self.path, known = on_main(self.accelerator, lambda: self._begin(model))
        writes = self.accelerator.is_main_process
        self.scores = Scores(self.path, known, writes=writes)
        self.log = MetricsLog(self.path, self.tracker, writes=writes)
        trained, total = model.get_nb_trainable_parameters()
        logger.info(
            "trainable parameters: %s of %s (%.2f %%)",
            f"{trained:,}",
            f"{total:,}",
            100 * trained / total,
        )
        logger.info("run folder: %s", self.path)

    def _begin(self, model: PeftModel) -> tuple[Path, Record]:
        settings = self.config.train
        if self.resume:
            check_saved(
                model,
                self.resume / ADAPTER,
                other_base=settings.other_base,
                action=f"resuming from {self.resume}",
                insist="train.other_base=true",
            )
        # before the folder exists: it looks at the nearest parent that does
        check_free_space(self.path, room_for(model, settings))
        with stop_when_full(self.path):
            if not self.resume:
                self.path = new_folder(settings, self._asked, self.prefix)
                self._write_start(model)
            clean(self.checkpoints)  # safe: this process holds the lock
            self.environment |= describe_environment(self.accelerator, settings.seed)
            self.environment["resumed_from"] = str(self.resume) if self.resume else None
            # otherwise `finish` writes them, with the scores of the longer run
            if not self.was_finished:
                self._describe()
        if self.tracker:
            self.tracker.begin(self.path, self.config.resolved)
        # a stopped run may have been scored before training: that is not repeated
        known = self.resume is not None and (self.path / SCORES).exists()
        return self.path, read_scores(self.path) if known else {}

    def _describe(self) -> None:
        """Write configuration and environment."""
        settings = OmegaConf.to_yaml(OmegaConf.create(self.config.resolved))
        write_atomic(self.path / CONFIG, settings)
        write_atomic(self.path / ENVIRONMENT, as_json(self.environment))

    def _write_start(self, model: PeftModel) -> None:
        self.checkpoints.mkdir(exist_ok=True)
        write_atomic(self.path / METRICS, "")
        # an adapter that changes the base weights is saved as the difference from this state
        if modifies_base_weights(model.active_peft_config):
            with atomic_folder(self.path / START) as folder:
                save_adapter(model, folder)

    # During the run

    @contextmanager
    def tracked(self) -> Generator[None]:
        """Tell the tracker if the block ends by an exception."""
        try:
            yield
        except BaseException:
            if self.tracker:
                self.tracker.fail()
            raise

    def end(self) -> None:
        """Write configuration and environment of a run that was trained further."""
        if self.was_finished and self.accelerator.is_main_process:
            with stop_when_full(self.path):
                self._describe()


def new_folder(settings: TrainConfig, identity: Record, prefix: str) -> Path:
    """Make and lock the folder of a new run: `train.run`, or a new name in `train.output`.

    Raises:
        InputError: another process has written to the folder since it was chosen.
    """
    if settings.run:
        folder = Path(settings.run)
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        # check again with the lock held
        if not may_start_in(folder, settings, identity):
            raise exists_already(folder)
        return folder
    name = f"{prefix}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, 1000):
        path = Path(settings.output) / (name if number == 1 else f"{name}-{number}")
        try:
            # without exist_ok: making the folder decides which of two processes has the name
            path.mkdir(parents=True)
            claim(path)
            return path
        except FileExistsError:  # another run began in the same second
            continue
    raise InputError(f"a thousand runs began in this second in {settings.output}: start again")
