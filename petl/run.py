"""The folder of a run: where it is and what is written there.

    config.yaml       the resolved configuration
    environment.json  versions, machine, processes, git revision, command
    metrics.jsonl     one line at each log point and evaluation
    checkpoints/      see petl/checkpoint.py
    adapter/          the result in PEFT's format, with a README that loads it
    scores.json       before, frozen_head, after; sizes and times
    *.png             what the method found out while training, if it draws that
    start/            the adapter's first state, of methods that change the base when they begin

Only the main process writes. There is no folder before `begin`: bad input leaves nothing behind.
"""

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel

from petl.budget import adapter_parameters
from petl.checkpoint import as_json, cannot_write, clean, replace, save_adapter, whole_folder
from petl.core.lifecycle import lifecycle
from petl.core.starts import rewrites_base
from petl.environment import describe_environment, peak_memory
from petl.errors import InputError
from petl.fields import plain
from petl.optim import trainable
from petl.processes import on_main
from petl.progress import Progress
from petl.readme import adapter_readme
from petl.resume import CHECKPOINTS, CONFIG, SCORES, find_checkpoint, identity, identity_of
from petl.settings import TrainConfig
from petl.tasks import Task
from petl.training_mode import check_model

METRICS, ADAPTER, START = "metrics.jsonl", "adapter", "start"
logger = logging.getLogger(__name__)


class Run:
    """One run's folder, and the checkpoint that the run goes on from.

    Attributes:
        resume: a verified checkpoint of this very configuration, or None.
        path: the folder, from `begin` on.
        scores: what scores.json holds.
    """

    def __init__(self, cfg: DictConfig, settings: TrainConfig, accelerator: Accelerator) -> None:
        """Choose the folder and the checkpoint; nothing is written yet.

        Raises:
            InputError: the folder is taken or cannot be made; the checkpoint is damaged or not of
                this run.
        """
        self.config = plain(cfg)
        self.settings, self.accelerator = settings, accelerator
        groups = [g for g in ("method", "loss", "model", "data") if self.config.get(g)]
        names = [str(self.config[group]["name"]) for group in groups]
        self.prefix = re.sub(r"[^\w.-]+", "-", "-".join(names))
        self.identity = identity(self.config)
        self.path = Path(settings.run or settings.output)
        self.scores: dict[str, Any] = {}
        self.resume: Path | None = on_main(accelerator, self._choose)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def _choose(self) -> Path | None:
        settings = self.settings
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
            raise InputError(
                f"train.run={given} exists already; choose another folder, "
                "or go on with it by train.resume=auto"
            )
        probe(self.path)
        return None

    def _may_restart(self, folder: Path) -> bool:
        """Whether a folder is empty, or of a run of these settings that had saved nothing yet."""
        if not folder.is_dir():
            return False
        if not any(folder.iterdir()):
            return True
        return self.settings.resume == "auto" and identity_of(folder) == self.identity

    def begin(self, model: PeftModel) -> None:
        """Make the folder and write what is known before training.

        Raises:
            InputError: the model cannot train as the settings say, or the disk has too little room.
        """
        check_model(model, self.settings)
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
        scores = self.path / SCORES
        known = self.resume is not None and scores.exists()
        return self.path, json.loads(scores.read_text()) if known else {}

    def _make_folder(self, model: PeftModel) -> None:
        self.path = self._new_path()
        self.checkpoints.mkdir(exist_ok=True)
        (self.path / METRICS).write_text("")
        if rewrites_base(model.active_peft_config):  # the result is saved relative to it
            with whole_folder(self.path / START) as folder:
                save_adapter(model, folder)

    def _new_path(self) -> Path:
        if self.settings.run:
            self.path.mkdir(parents=True, exist_ok=True)
            return self.path
        name = f"{self.prefix}-{datetime.now():%Y%m%d-%H%M%S}"
        for number in range(1, 1000):
            path = Path(self.settings.output) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
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

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after `step`: a resumed run writes them again."""
        if self.accelerator.is_main_process:
            file = self.path / METRICS
            kept = [line for line in file.read_text().splitlines() if step_of(line) <= step]
            replace(file, "".join(f"{line}\n" for line in kept))

    def score(self, name: str, measure: Callable[[], Any]) -> None:
        """Put what `measure` finds on the test rows into scores.json; None if they are left alone.

        What a stopped run has put there stays.
        """
        if name not in self.scores:
            self._note({name: measure() if self.settings.test else None})

    def save(self, model: PeftModel, task: Task) -> None:
        """Write the trained adapter, how it is loaded, and the method's pictures."""
        on_main(self.accelerator, lambda: self._save(model, task))

    def _save(self, model: PeftModel, task: Task) -> None:
        start = self.path / START if rewrites_base(model.active_peft_config) else None
        with whole_folder(self.path / ADAPTER) as folder:
            save_adapter(model, folder, start=start)
            text = adapter_readme(model, task, self.config, self.path / ADAPTER)
            (folder / "README.md").write_text(text)
        lifecycle(model).pictures(self.path)

    def finish(
        self,
        model: PeftModel,
        task: Task,
        progress: Progress,
        measure: Callable[[], dict[str, float]],
    ) -> None:
        """Complete scores.json; with the scores after training in it, the run is finished."""
        file = self.path / ADAPTER / "adapter_model.safetensors"
        size = on_main(self.accelerator, lambda: file.stat().st_size)
        found = {
            "task": task.name,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "validation": progress.best,
            "best_step": progress.best_step,
            "steps": progress.step,
            "tokens": progress.tokens,
            "padding": progress.padding,
            "seconds": progress.seconds,
            "cpu_seconds": progress.cpu_seconds,
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "adapter_parameters": adapter_parameters(model),
            "adapter_bytes": size,
        }
        after = measure() if self.settings.test else None
        self._note({"after": after, **found, **peak_memory(self.accelerator.device)})

    @property
    def objective(self) -> float:
        """What a sweep is to improve: the best validation score if there was one, else test's."""
        validation = self.scores["validation"]
        return self.scores["after"][self.scores["metric"]] if validation is None else validation

    def _note(self, scores: dict[str, Any]) -> None:
        self.scores |= scores
        if self.accelerator.is_main_process:
            with stop_when_full(self.path):
                replace(self.path / SCORES, as_json(self.scores))


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that a killed process cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def probe(folder: Path) -> None:
    """Raise InputError unless something can be written where `folder` is, or is to be."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".probe-") as made:
            (Path(made) / "file").write_text("petl can write here\n")
    except OSError as error:
        raise InputError(
            f"nothing can be written in {place} ({error.strerror}); "
            "choose a folder for the run with train.output=FOLDER"
        ) from error


def room_for(model: PeftModel, settings: TrainConfig) -> int:
    """Bytes that adapter and checkpoints of a run take at most, about."""
    adapter = sum(4 * p.numel() for _, p in trainable(model))
    checkpoint = 3 * adapter  # the adapter and AdamW's two moments
    kept = settings.keep_checkpoints + 2  # the best one, and one that is being written
    return adapter + kept * checkpoint + 2**20


def need_room(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of `folder` has less than `needed` bytes left."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place} has {free / 1e6:.0f} MB left, and the run may need {needed / 1e6:.0f}; "
            "make room, or choose another disk with train.output=FOLDER"
        )


@contextmanager
def stop_when_full(folder: Path) -> Generator[None]:
    """Turn a failing write into the end of the run."""
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error) from error
