"""The folder of a run: where it is and what is written there.

    config.yaml       the resolved configuration
    environment.json  versions, machine, processes, git revision, command
    metrics.jsonl     one line at each log point and evaluation
    checkpoints/      see petl/checkpoint.py
    adapter/          the result in PEFT's format, with a README that loads it
    scores.json       before, frozen_head, after; sizes and times
    *.png             what the method found out while training, if it draws that
    lr_range.*        of the search for a learning rate, with train.find_lr
    report.html       all of this on one page
    wandb/, wandb.json, tensorboard/   of the tracker, if there is one
    start/            the adapter's first state, of methods that change the base when they begin
    .lock             which process is at it, and the lock that it holds meanwhile

Only the main process writes. There is no folder before `begin`: bad input leaves nothing behind.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel

from petl.config.command_line import in_sweep
from petl.config.method_fields import with_inner
from petl.config.schema import plain
from petl.core.adapter_file import adapter_parameters
from petl.core.distributed import on_main
from petl.core.lifecycle import lifecycle
from petl.core.spec.method import modifies_base_weights
from petl.distributed.engine import whole
from petl.errors import InputError
from petl.files.disk import as_json, atomic_folder, need_room, probe, replace, stop_when_full
from petl.runs.checkpoint import METRICS, clean, room_for, save_adapter
from petl.runs.environment import PhaseTimer, describe_environment, peak_memory
from petl.runs.lock import LOCK, claim
from petl.runs.model_card import write_readme
from petl.runs.resume import (
    CHECKPOINTS,
    CONFIG,
    SCORES,
    find_checkpoint,
    identity,
    identity_of,
    objective_of,
    take_job,
)
from petl.runs.settings import TrainConfig, names_of
from petl.runs.state import TrainState
from petl.tasks.base import Task
from petl.tracking import Tracker, make_tracker, read_tracker
from petl.tracking.base import named

ADAPTER, START = "adapter", "start"
logger = logging.getLogger(__name__)


class Run:
    """One run's folder, and the checkpoint that the run goes on from.

    Attributes:
        resume: a verified checkpoint of this very configuration, or None.
        path: the folder, from `begin` on.
        scores: what scores.json holds.
        laps: where the time goes.
    """

    def __init__(self, cfg: DictConfig, settings: TrainConfig, accelerator: Accelerator) -> None:
        """Choose the folder and the checkpoint; nothing is written yet.

        Raises:
            InputError: the folder is taken, another process is at it, or it cannot be made; the
                checkpoint is damaged or not of this run.
            PassedOver: this is a job of a sweep, and done or being done.
        """
        self.config = settings_of_run(cfg, settings)
        self.settings, self.accelerator = settings, accelerator
        self.prefix = re.sub(r"[^\w.-]+", "-", "-".join(names_of(self.config)))
        self.identity = identity(self.config)
        self.path = Path(settings.run or settings.output)
        self.scores: dict[str, Any] = {}
        self.laps = PhaseTimer(accelerator.device)
        tracker = read_tracker(self.config["tracker"])
        self.tracker = make_tracker(tracker) if accelerator.is_main_process else Tracker()
        self.resume: Path | None = on_main(accelerator, self._choose)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def _choose(self) -> Path | None:
        settings = self.settings
        if settings.resume == "auto" and in_sweep():
            take_job(settings.output, self.identity)
        checkpoint = find_checkpoint(settings, self.identity, self.prefix)
        given = Path(settings.run) if settings.run else None
        if checkpoint is not None:
            run = checkpoint.parent.parent
            if given is not None and given.resolve() != run.resolve():
                raise InputError(
                    f"train.run={given} is not the folder of {checkpoint}; leave it out"
                )
            probe(run)
            return checkpoint
        if given is not None and given.exists() and not self._may_restart(given):
            raise exists_already(given)
        probe(self.path)
        return None

    def _may_restart(self, folder: Path) -> bool:
        """Whether a folder is empty, or of a run of these settings that had saved nothing yet."""
        if not folder.is_dir():
            return False
        if not any(path.name != LOCK for path in folder.iterdir()):
            return True
        return self.settings.resume == "auto" and identity_of(folder) == self.identity

    def begin(self, model: PeftModel) -> None:
        """Make the folder and write what is known before training.

        Raises:
            InputError: the disk has too little room.
        """
        self.path, self.scores = on_main(self.accelerator, lambda: self._begin(model))
        train, every = model.get_nb_trainable_parameters()
        logger.info("%s of %s parameters train", f"{train:,}", f"{every:,}")
        logger.info("the run is in %s", self.path)

    def _begin(self, model: PeftModel) -> tuple[Path, dict[str, Any]]:
        if self.resume:
            self.path = self.resume.parent.parent
        need_room(self.path, room_for(model, self.settings))
        with stop_when_full(self.path):
            if not self.resume:
                self._make_folder(model)
            clean(self.checkpoints)
            replace(self.path / CONFIG, OmegaConf.to_yaml(OmegaConf.create(self.config)))
            environment = describe_environment(self.accelerator, self.settings.seed)
            environment["resumed_from"] = str(self.resume) if self.resume else None
            replace(self.path / "environment.json", as_json(environment))
        self.tracker.begin(self.path, self.config)
        scores = self.path / SCORES
        known = self.resume is not None and scores.exists()
        return self.path, json.loads(scores.read_text()) if known else {}

    def _make_folder(self, model: PeftModel) -> None:
        self.path = self._new_path()
        self.checkpoints.mkdir(exist_ok=True)
        (self.path / METRICS).write_text("")
        if modifies_base_weights(model.active_peft_config):  # the result is saved relative to it
            with atomic_folder(self.path / START) as folder:
                save_adapter(model, folder)

    def _new_path(self) -> Path:
        if self.settings.run:
            self.path.mkdir(parents=True, exist_ok=True)
            claim(self.path)
            if not self._may_restart(self.path):  # another run has been there since `_choose`
                raise exists_already(self.path)
            return self.path
        name = f"{self.prefix}-{datetime.now():%Y%m%d-%H%M%S}"
        for number in range(1, 1000):
            path = Path(self.settings.output) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
                claim(path)
                return path
            except FileExistsError:
                continue
        raise InputError(f"a thousand runs began in this second in {self.settings.output}")

    # During the run

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.accelerator.is_main_process:
            with stop_when_full(self.path), (self.path / METRICS).open("a") as opened:
                opened.write(json.dumps(record) + "\n")
            self.tracker.log(record)

    def rewind(self, checkpoint: Path, step: int) -> None:
        """Let metrics.jsonl be the log up to `checkpoint`, of `step`, for a run that goes on there.

        It is the checkpoint's copy: the run may since have gone on from an older one, and have been
        stopped before it came as far again. Checkpoints of before there were copies have none.
        """
        if self.accelerator.is_main_process:
            file, copy = self.path / METRICS, checkpoint / METRICS
            lines = (copy if copy.exists() else file).read_text().splitlines()
            kept = [line for line in lines if step_of(line) <= step]
            replace(file, "".join(f"{line}\n" for line in kept))
            self.tracker.rewind([json.loads(line) for line in kept])

    @contextmanager
    def tracked(self) -> Generator[None]:
        """Let the tracker know if what happens within ends the run early."""
        try:
            yield
        except BaseException:
            self.tracker.fail()
            raise

    def score(self, name: str, measure: Callable[[], Any]) -> None:
        """Put what `measure` finds on the test rows into scores.json; None if they are left alone.

        What a stopped run has put there stays.
        """
        if name not in self.scores:
            lap = "head alone" if name == "frozen_head" else "evaluation"
            self.note({name: self.measure(measure, lap)})

    def measure(self, score: Callable[[], Any], lap: str = "evaluation") -> Any:
        """What `score` finds on the test rows, its time noted; None if they are left alone."""
        self.laps.start()
        found = score() if self.settings.test else None
        self.laps.lap(lap)
        return found

    def save(self, model: PeftModel, task: Task) -> None:
        """Write the trained adapter, how it is loaded, and the method's pictures."""
        with whole(model):
            on_main(self.accelerator, lambda: self._save(model, task))

    def _save(self, model: PeftModel, task: Task) -> None:
        start = self.path / START if modifies_base_weights(model.active_peft_config) else None
        with atomic_folder(self.path / ADAPTER) as folder:
            save_adapter(model, folder, start=start)
            write_readme(model, task, self.config, folder, self.path / ADAPTER)
        lifecycle(model).plots(self.path)

    def finish(
        self,
        model: PeftModel,
        task: Task,
        progress: TrainState,
        after: dict[str, float] | None,
    ) -> None:
        """Complete scores.json, with the scores after training; None if test was left alone."""
        file = self.path / ADAPTER / "adapter_model.safetensors"
        size = on_main(self.accelerator, lambda: file.stat().st_size)
        found = {
            "after": after,  # with which the run is finished
            "task": task.name,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "validation": progress.best,
            "best_step": progress.best_step,
            "steps": progress.step,
            "lr": self.settings.lr,
            "head_lr": self.settings.head_lr,
            "tokens": progress.tokens,
            "unit": task.unit,
            "padding": progress.padding,
            "seconds": progress.seconds,
            "cpu_seconds": progress.cpu_seconds,
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "adapter_parameters": adapter_parameters(model),
            "adapter_bytes": size,
        }
        found["time_split"] = self.laps.settle()
        self.note({**found, **peak_memory(self.accelerator.device)})
        told = named({**self.scores, "objective": self.objective})
        self.tracker.end(told, sorted(self.path.glob("*.png")), self.path / ADAPTER)

    @property
    def objective(self) -> float:
        """What a sweep is to improve."""
        return objective_of(self.scores)

    def note(self, scores: dict[str, Any]) -> None:
        """Add to scores.json."""
        self.scores |= scores
        if self.accelerator.is_main_process:
            with stop_when_full(self.path):
                # a task's own order of scores, the one that steers first
                replace(self.path / SCORES, as_json(self.scores, in_order=True))


def settings_of_run(cfg: DictConfig, settings: TrainConfig) -> dict[str, Any]:
    """All settings of a run, those that were left to the method or to a file included."""
    config = plain(cfg)
    config["method"] = with_inner(config["method"])
    config["train"]["lr"] = settings.lr
    config["train"]["batch_sizes"] = settings.batch_sizes  # not the file, which may change
    return config


def exists_already(folder: Path) -> InputError:
    return InputError(
        f"train.run={folder} exists already; choose another folder, "
        "or go on with it by train.resume=auto"
    )


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that a killed process cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
