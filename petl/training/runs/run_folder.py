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
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from peft import PeftModel

from petl.core.fingerprint import check_saved
from petl.core.lifecycle import lifecycle
from petl.core.parameters import adapter_parameters
from petl.core.spec.method import modifies_base_weights
from petl.data.models.loading import save_processor
from petl.data.models.sources import RandomInit
from petl.data.tasks.base import Task, write_labels, write_task
from petl.errors import InputError
from petl.system.collectives import on_main
from petl.system.files.disk import (
    append_to,
    as_json,
    atomic_folder,
    check_free_space,
    flush,
    stop_when_full,
    write_atomic,
)
from petl.system.processes import claim
from petl.training.distributed.launch import gathered, start
from petl.training.distributed.precision import described
from petl.training.ranks.file import RANKS, draw_ranks
from petl.training.runs.card_code import BASE
from petl.training.runs.checkpoint import TrainState, clean, room_for, save_adapter
from petl.training.runs.environment import PhaseTimer, describe_environment, peak_memory
from petl.training.runs.init_from import find_start
from petl.training.runs.model_card import README, Described, known_base, model_card
from petl.training.runs.prediction_tables import tables_of
from petl.training.runs.records import (
    ADAPTER,
    BEFORE,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SCORES,
    is_finished,
    read_log,
    read_scores,
)
from petl.training.runs.resume import (
    AUTO,
    CHECKPOINTS,
    choose_checkpoint,
    defaults_of,
    exists_already,
    identity,
    may_start_in,
    objective_of,
)
from petl.training.runs.run_config import RunConfig, names_of
from petl.training.runs.settings import TrainConfig
from petl.training.tracking import Tracker, make_tracker
from petl.training.tracking.base import named

START = "start"
logger = logging.getLogger(__name__)


class Scores(dict[str, Any]):
    """The content of scores.json, written at each change."""

    def __init__(self, run: Path, known: dict[str, Any], *, writes: bool) -> None:
        super().__init__(known)
        self.run, self.writes = run, writes

    def add(self, scores: dict[str, Any]) -> None:
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

    def __init__(self, run: Path, tracker: Tracker | None, *, writes: bool) -> None:
        self.file, self.tracker, self.writes = run / METRICS, tracker, writes

    def append(self, record: dict[str, Any]) -> None:
        """Append a line."""
        if self.writes:
            with stop_when_full(self.file.parent), append_to(self.file) as opened:
                opened.write(f"{json.dumps(record)}\n".encode())
        if self.tracker:
            self.tracker.log(record)

    def rewind(self, checkpoint: Path, step: int) -> None:
        """Cut the log back to `checkpoint`, written at `step`, for a run that resumes from it.

        The lines are those of the checkpoint's copy: the run may have resumed from an older
        checkpoint before, and have been stopped again. Checkpoints of version 0.1 may lack a copy.
        """
        if self.writes:
            copy = checkpoint / METRICS
            records = read_log(copy if copy.exists() else self.file)
            # without a copy, the log may go beyond the checkpoint
            kept = [record for record in records if record["step"] <= step]
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
        ranks: the content of ranks.json; None without +ranks, and in a resumed run.
        timer: time by phase.
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
        self.ranks: dict[str, Any] | None = None
        has_tracker = config.tracker is not None and accelerator.is_main_process
        self.tracker = make_tracker(config.tracker) if has_tracker else None
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

    def _choose(self) -> tuple[Path | None, bool, dict[str, Any]]:
        """Return the checkpoint, True if its run is finished and will be trained further, settings.

        The last are those under `train` that the run keeps from its beginning, and what auto is.
        """
        found = choose_checkpoint(self.config.train, self._asked, self.prefix)
        begun = {} if found is None else defaults_of(found, self._asked)
        if self.config.train.precision == AUTO:
            begun = {"precision": self.config.precision, **begun}
            logger.info("train.precision=auto: %s", described(begun["precision"]))
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

    def _begin(self, model: PeftModel) -> tuple[Path, dict[str, Any]]:
        settings = self.config.train
        if self.resume:
            check_saved(
                model,
                self.resume / ADAPTER,
                other_base="warn" if settings.other_base else "refuse",
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
            self.environment = describe_environment(self.accelerator, settings.seed)
            self.environment["resumed_from"] = str(self.resume) if self.resume else None
            # the resolved place: `init_from` may be a run's folder, whose adapter is inside
            initial = find_start(settings.init_from).place if settings.init_from else None
            self.environment["init_from"] = initial
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
        if self.ranks is not None:
            write_atomic(self.path / RANKS, as_json(self.ranks, in_order=True))
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

    def score(self, name: str, measure: Callable[[], Any], phase: str = "evaluation") -> None:
        """Add the result of `measure` on the test examples to the scores, as `measure` does.

        A score that a stopped run has measured already is kept.
        """
        # also with the value None, of a run with train.test=false
        if name not in self.scores:
            self.scores.add({name: self.measure(measure, phase)})

    def score_before(self, test: Callable[..., Any], task: Task) -> None:
        """Add the scores before training to the scores, unless `train.score_before=false`."""
        if self.config.train.score_before:
            # answers from before are kept too, to show what training has changed
            kept = self.path / BEFORE if task.generate else None
            self.score("before", partial(test, kept=kept))

    def measure(self, score: Callable[[], Any], phase: str = "evaluation") -> Any:
        """Return the timed result of `score` on the test examples; None with `train.test=false`."""
        self.timer.start()
        result = score() if self.config.train.test else None
        self.timer.mark(phase)
        return result

    def save(self, model: PeftModel, task: Task) -> None:
        """Write the trained adapter, labels, processor and the method's plots."""
        # all processes: parameters may be sharded, and each has a part
        with gathered(model):
            on_main(self.accelerator, lambda: self._save(model, task))

    def _save(self, model: PeftModel, task: Task) -> None:
        with stop_when_full(self.path):
            flush(self.path)  # `atomic_folder` would make a deleted folder again, with nothing else
        start = self.path / START if modifies_base_weights(model.active_peft_config) else None
        with atomic_folder(self.path / ADAPTER) as folder:
            save_adapter(model, folder, start=start)
            write_labels(folder, task.model_kwargs())
            write_task(folder, task)
            save_processor(self.config.model, task, folder)
            if isinstance(self.config.model, RandomInit):  # no hub or folder has its config
                base: Any = model.get_base_model()
                base.config.save_pretrained(folder / BASE)
        # after the adapter: a plot that fails must not cost the result
        lifecycle(model).plots(self.path)
        if (self.path / RANKS).exists():
            draw_ranks(self.path)
        if self.config.data.order is not None:
            # not imported by other runs
            from petl.training.runs.class_stream import draw_stages

            draw_stages(self.path)

    def finish(
        self,
        model: PeftModel,
        task: Task,
        settings: TrainConfig,
        state: TrainState,
        after: dict[str, float] | None,
    ) -> None:
        """Complete the adapter's README, scores.json and the tracker's run.

        Args:
            settings: those of the training, the learning rates of a range test included.
            state: of the training, at its end.
            after: scores after training; None with `train.test=false`.
        """
        file = self.path / ADAPTER / "adapter_model.safetensors"
        # the file is on the disk of the main process
        size = on_main(self.accelerator, lambda: file.stat().st_size)
        entries = {
            "after": after,  # the presence of this key marks a finished run
            "task": task.name,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "validation": state.best,
            "validation_scores": state.best_scores or None,
            "best_step": state.best_step,
            "steps": state.step,
            "lr": settings.lr,
            # no head trains under a method that takes its place
            "head_lr": None if has_no_head(model) else settings.head_lr,
            "tokens": state.tokens,
            "unit": task.unit,
            "padding": state.padding,
            "seconds": state.seconds,
            "cpu_seconds": state.cpu_seconds,
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "adapter_parameters": adapter_parameters(model),
            "adapter_bytes": size,
            "time_split": self.timer.totals(),
        }
        figures = lifecycle(model).figures()
        if figures:
            entries["method"] = figures
        if self.config.data.order is not None:
            # not imported by other runs
            from petl.training.runs.class_stream import read_stages, stream_scores

            stages = on_main(self.accelerator, lambda: read_stages(self.path, state.step))
            # none if train.steps ends the run within the first
            entries |= {"stream": stream_scores(stages)} if stages else {}
        # before the scores, which mark a finished run
        on_main(self.accelerator, lambda: self._write_card(model, task, entries))
        self.scores.add({**entries, **peak_memory(self.accelerator.device)})
        if self.was_finished and self.accelerator.is_main_process:
            with stop_when_full(self.path):
                self._describe()
        if self.tracker:
            pictures = sorted(self.path.glob("*.png"))
            scores = named({**self.scores, "objective": self.scores.objective})
            self.tracker.end(scores, pictures, self.path / ADAPTER, tables_of(self.path))

    def _write_card(self, model: PeftModel, task: Task, entries: dict[str, Any]) -> None:
        source, config = self.config.model, model.active_peft_config
        card = model_card(
            Described(
                task,
                source,
                config,
                known_base(source, config.revision),
                self.config.resolved,
                {**self.scores, **entries},
                self.environment,
                run_names=names_of(self.config.resolved),
            )
        )
        with stop_when_full(self.path):
            write_atomic(self.path / ADAPTER / README, card)


def has_no_head(model: PeftModel) -> bool:
    """Return True if the method takes the place of the task head, so that none is trained."""
    return getattr(model.active_peft_config, "replaces_head", False)


def new_folder(settings: TrainConfig, identity: dict[str, Any], prefix: str) -> Path:
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
