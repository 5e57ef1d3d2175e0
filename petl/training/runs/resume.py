"""Which checkpoint a run resumes from, and whether it belongs to the same run."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petl.errors import InputError, JobSkipped
from petl.system.files.disk import MANIFEST, check_writable
from petl.system.processes import LOCK, claim, release, try_claim
from petl.system.settings.command_line import in_sweep, is_given
from petl.system.settings.schema import flat
from petl.training.runs.checkpoint import checkpoints, read_state
from petl.training.runs.records import (
    ADAPTER,
    CONFIG,
    SCORES,
    is_finished,
    read_results,
    read_stored,
)
from petl.training.runs.settings import TrainConfig

# settings that do not change the course of training
FREE = {
    *("resume", "other_base", "run", "output", "save_steps", "keep_checkpoints"),
    *("num_workers", "eval_batch_size", "linear_probe", "score_before", "test", "log_steps"),
    *("resume_schedule", "init_head"),
    *("loss_segment", "skip_unread", "together"),  # up to rounding, and to dropout's draws
}
# settings in which a run that is trained further may differ from its earlier part
LENGTH = {"train.steps", "train.epochs", "train.early_stopping"}
# settings that were added later: null counts as absent, as in the configurations of older runs
ADDED_LATER = (
    *("model.quantization", "data.labels", "train.quadratic", "train.batch_sizes"),
    *("data.format", "data.system", "train.init_from", "method.rank_pattern"),
    *("data.order", "data.stream_repeats", "model.adapter"),
)
# settings that came later, with the values by which runs compute as older ones did
LATER_FIELDS = {
    "data.allow_overlap": False,
    "method.router_layers": 1,
    "method.router_heads": 2,
    "method.router_embedding": "projected",
    "method.router_lookahead": 0,
    "method.gate": "none",
    "method.gate_rank": None,
    "method.identity_gate": True,
    "loss.ppl_sparsity": True,
}
# settings under `train` with another default than in older runs: that of now, and theirs
OLDER_DEFAULTS = {"buckets": ("auto", None)}
PRECISION, AUTO = "train.precision", "auto"
# before the name of a setting of one of several data sets, which is that of a single one
SET = re.compile(r"^data\.sets\..+\.")
NOT_RESUMABLE = "the method changes while it trains, and PEFT keeps these changes in memory only"
CHECKPOINTS = "checkpoints"  # in the folder of a run
JOBS = ".jobs"  # in a folder of runs: locks of the jobs of sweeps
logger = logging.getLogger(__name__)


# Identity


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a resumed run must share with its checkpoint, by dotted name.

    The values are as JSON gives them back, so that they equal those read from a checkpoint.
    """
    entries = flat(config)
    free = {f"train.{name}" for name in FREE} | {
        "recipe",
        "imports",
    }  # a recipe's settings are all in here
    free |= {k for k, v in entries.items() if v is None and SET.sub("data.", k) in ADDED_LATER}
    free |= {k for k, v in LATER_FIELDS.items() if k in entries and entries[k] == v}
    if entries.get("train.cache_frozen") is not True:  # up to rounding; true leaves out dropout
        free.add("train.cache_frozen")
    if not entries.get("train.find_lr"):  # runs from before there was a range test lack both
        free |= {"train.find_lr", "train.find_lr_steps"}
    if entries.get("train.optimizer") == "adamw":  # as older runs, which lack them
        free |= {"train.optimizer", "train.delta_decay", "train.delta_norm"}
    if not (entries.get("data.tasks") or entries.get("method.tasks")):  # likewise
        free |= {"data.tasks", "data.task_column"}
    # a run may resume with another tracker, and on another number of processes
    groups = ("tracker.", "launch.")
    kept = {k: v for k, v in entries.items() if k not in free and not k.startswith(groups)}
    return json.loads(json.dumps(kept))


def identity_of(run: Path) -> dict[str, Any] | None:
    """Return the identity of the run in a folder, or None if the folder has no configuration.

    Raises:
        InputError: the configuration is damaged.
    """
    file = run / CONFIG
    return identity(read_stored(file)) if file.exists() else None


def stored_identity(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity in the state.json of a checkpoint."""
    return {k: v for k, v in state["identity"].items() if k.removeprefix("train.") not in FREE}


def as_begun(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity `now` with the defaults that were in effect when the run `then` began.

    These stay if the command names another value, and in a sweep, whose runs are compared.
    """
    begun = as_chosen(then, now)
    for name, (default, older) in OLDER_DEFAULTS.items():
        key = f"train.{name}"
        is_default = now.get(key) == default and not (in_sweep() or is_given(key))
        if is_default and then.get(key) == older:
            # absent, as in runs from before the setting, is not the same as null
            del begun[key]
            begun |= {key: older} if key in then else {}
    return begun


def as_chosen(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity `now` with what `train.precision=auto` was for the run `then`.

    So a run or a job of a sweep is the same on a machine for which auto is another precision.
    """
    if now.get(PRECISION) == AUTO and PRECISION in then:
        return {**now, PRECISION: then[PRECISION]}
    return dict(now)


def is_same(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Return True if a run (`then`) is one with these settings (`now`), defaults as it began."""
    return then is not None and then == as_begun(then, now)


def defaults_of(checkpoint: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under `train` that a run which resumes from a checkpoint keeps from it.

    They are those whose default was another one when the run began, and what auto was for it.
    """
    begun = as_begun(stored_identity(read_state(checkpoint)), now)
    kept = {
        name: older
        for name, (_, older) in OLDER_DEFAULTS.items()
        if begun.get(f"train.{name}") != now.get(f"train.{name}")
    }
    for name, value in kept.items():
        logger.info("train.%s=%s, the default when the run of %s began", name, value, checkpoint)
    if now.get(PRECISION) == AUTO:
        kept["precision"] = begun[PRECISION]
    return kept


def lengthens(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return True if a run (`now`) is an earlier one (`then`) of another length."""
    return bool(changed := _changed(then, now)) and changed <= LENGTH


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    return {key for key in (*now, *then) if then.get(key) != now.get(key)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each setting that differs between a checkpoint (`then`) and this run (`now`)."""
    changed = _changed(then, now)
    keys = [key for key in dict.fromkeys((*now, *then)) if key in changed]
    keys.sort(key=lambda key: not key.endswith(".name"))  # another method or model first
    return [f"{k}={then.get(k)!r} there, {now.get(k)!r} here" for k in keys]


# The checkpoint


def choose_checkpoint(settings: TrainConfig, now: Mapping[str, Any], prefix: str) -> Path | None:
    """Return the checkpoint that the run resumes from, or None if it starts from step 0.

    Nothing is written. The folder of a run that is resumed is locked for this process.

    Args:
        now: the identity of the run.
        prefix: how the names of run folders of this configuration begin.

    Raises:
        InputError: the folder is taken, another process writes to it, or nothing can be written
            there; the checkpoint is damaged or belongs to another run.
        JobSkipped: this is a job of a sweep, and finished or taken by another worker.
    """
    # workers of a sweep share its jobs through locks in the folder of runs
    if settings.resume == "auto" and in_sweep():
        take_job(settings.output, now)
    checkpoint = find_checkpoint(settings, now, prefix)
    given = Path(settings.run) if settings.run else None
    if checkpoint is not None:
        run = checkpoint.parent.parent
        if given is not None and given.resolve() != run.resolve():
            raise InputError(f"train.run={given} is not the folder of {checkpoint}; leave it out")
        check_writable(run)
        return checkpoint
    if given is not None and given.exists() and not may_start_in(given, settings, now):
        raise exists_already(given, settings.resume)
    check_writable(given or Path(settings.output))
    return None


def may_start_in(folder: Path, settings: TrainConfig, now: Mapping[str, Any]) -> bool:
    """Return True if a folder is empty or, with `resume=auto`, is of the same run.

    Such a run was stopped before it wrote a checkpoint.
    """
    if not folder.is_dir():
        return False
    if not any(path.name != LOCK for path in folder.iterdir()):
        return True
    return settings.resume == "auto" and is_same(identity_of(folder), now)


def exists_already(folder: Path, resume: str | None = None) -> InputError:
    """Return the error for a `train.run` folder that is not empty."""
    if resume == "auto":
        is_run = (folder / CONFIG).exists()
        other = f", or train.resume={folder}, which tells what differs" if is_run else ""
        return InputError(
            f"train.run={folder} exists already; choose another folder{other}: it has no run with "
            "these settings"
        )
    return InputError(
        f"train.run={folder} exists already; choose another folder, "
        "or resume its run with train.resume=auto"
    )


def find_checkpoint(settings: TrainConfig, now: Mapping[str, Any], prefix: str) -> Path | None:
    """Return the verified checkpoint that `train.resume` names, or None to start from step 0.

    The run that it belongs to is locked for this process.

    Raises:
        InputError: it is damaged or of another run, there is none, or another process writes to it.
    """
    if settings.resume is None:
        return None
    if settings.resume == "auto":
        return latest(settings, now, prefix)
    path = Path(settings.resume)
    # the run of a checkpoint is found by its parents, which a path such as ../step-000100 lacks
    if path.is_symlink() or (is_checkpoint(path) and path.parent.name != CHECKPOINTS):
        path = path.resolve()
    if not path.is_dir():
        raise InputError(
            f"train.resume={path} is not a directory; name a run, a checkpoint, or auto"
        )
    found = path if is_checkpoint(path) else latest_complete(path)
    if found == path and path.parent.name != CHECKPOINTS:
        raise InputError(
            f"train.resume={path} is a checkpoint outside of RUN/{CHECKPOINTS}, and a run that "
            f"resumes writes to RUN: put it there, or start from train.init_from={path / ADAPTER}"
        )
    if found is None:
        raise InputError(
            f"train.resume={path} has no complete checkpoint; leave it out to start from step 0, "
            f"or start a new run from its adapter with train.init_from={path}"
        )
    run = found.parent.parent  # of RUN/checkpoints/STEP
    refuse_finished(run, now)
    claim(run)
    try:
        stored = stored_identity(read_state(found))
    except InputError as error:
        raise InputError(
            f"{error}; name another checkpoint, or the run, which resumes from its latest "
            "complete one"
        ) from error
    now = as_begun(stored, now)
    others = differences(stored, now)
    if others and not lengthens(stored, now):
        raise InputError(
            f"{found} is of another run: {', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}; use its settings, or leave out train.resume"
        )
    logger.info("resuming from %s", found)
    return found


def is_checkpoint(path: Path) -> bool:
    """Return True if a folder is a checkpoint, complete or damaged, and not a run."""
    if (path / CHECKPOINTS).is_dir():  # a run, whatever its name
        return False
    return (path / MANIFEST).exists() or path.name.startswith("step-")


def latest(settings: TrainConfig, now: Mapping[str, Any], prefix: str) -> Path | None:
    """Return the latest complete checkpoint of an unfinished run with exactly these settings."""
    if settings.run:
        run = Path(settings.run)
        # a job that is queued again has not failed
        if finished_with(run, now):
            raise JobSkipped(f"{run} is finished already", objective_of(read_results(run)))
        folders = [run]
    else:
        # names end with the time, so the latest run comes first
        folders = sorted(Path(settings.output).glob(f"{prefix}-*"), reverse=True)
    for folder in folders:
        try:
            if not is_unfinished(folder, now, is_named=settings.run is not None):
                continue
            claim(folder)
        except InputError as error:
            if settings.run:
                raise
            logger.warning("skipping %s: %s", folder, error)
            continue
        found = latest_complete(folder)
        if found is not None:
            logger.info("resuming from %s", found)
            return found
        release(folder)  # a run without checkpoint is left as it is
    where = settings.run or settings.output
    logger.info(
        "train.resume=auto: no unfinished run with these settings in %s; starting from step 0",
        where,
    )
    return None


def is_unfinished(run: Path, now: Mapping[str, Any], *, is_named: bool = False) -> bool:
    """Return True if a run with these settings was begun in a folder, and is not finished.

    A finished run that is trained further keeps its configuration and its scores until the end of
    the longer run: checkpoints tell whether that was begun.

    Args:
        is_named: the longer run may begin here, in a finished one that `train.run` names.
    """
    config = identity_of(run)
    if config is None or not is_finished(run):
        return is_same(config, now)
    newest = latest_complete(run) if lengthens(config, as_begun(config, now)) else None
    if newest is None:
        return False
    return is_named or is_same(stored_identity(read_state(newest)), now)


def latest_complete(run: Path) -> Path | None:
    """Return the latest checkpoint of a run that passes verification; log those that do not."""
    for path in reversed(checkpoints(run / CHECKPOINTS)):
        try:
            read_state(path)
        except InputError as error:
            logger.warning("skipping %s: %s", path, error)
        else:
            return path
    return None


# Finished runs, and jobs of sweeps


def objective_of(scores: Mapping[str, Any]) -> float:
    """Return what a sweep optimizes: the best validation score if there is one, else the test's."""
    validation = scores["validation"]
    return scores["after"][scores["metric"]] if validation is None else validation


def finished_run(output: str, now: Mapping[str, Any]) -> Path | None:
    """Return the finished run with these settings in a folder of runs; None if there is none.

    Of several, the one whose name is last: names end with the time.
    """
    for file in sorted(Path(output).glob(f"*/{SCORES}"), reverse=True):
        try:
            then = identity_of(file.parent) if is_finished(file.parent) else None
            if then is not None and then == as_chosen(then, now):
                return file.parent
        except InputError as error:
            logger.warning("skipping %s: %s", file.parent, error)
    return None


def take_job(output: str, now: Mapping[str, Any]) -> None:
    """Claim a job of a sweep, which may have several workers, until this process releases it.

    Args:
        output: the folder of runs.
        now: the job's identity.

    Raises:
        JobSkipped: another worker has it, or it is finished.
    """
    # the lock file of a job is found by the hash of its settings
    job = Path(output) / JOBS / hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]
    job.mkdir(parents=True, exist_ok=True)
    worker = try_claim(job)
    if worker:
        raise JobSkipped(f"skipped: {worker}, works on this job")
    # checked with the lock held: another worker may have finished it just now
    run = finished_run(output, now)
    if run is not None:
        raise JobSkipped(f"{run} is finished already", objective_of(read_results(run)))


def finished_with(run: Path, now: Mapping[str, Any]) -> bool:
    """Return True if the run with these settings is finished.

    Args:
        now: the identity of the run that would resume it.

    Raises:
        InputError: its scores are damaged.
    """
    try:
        return is_finished(run) and is_same(identity_of(run), now)
    except InputError as error:
        raise InputError(
            f"{error}; if the run was not finished, delete the file: its scores are computed again"
        ) from error


def refuse_finished(run: Path, now: Mapping[str, Any]) -> None:
    """Raise InputError if the run with these settings is finished, or its scores are damaged."""
    if finished_with(run, now):
        raise InputError(
            f"{run} is finished, so it cannot be resumed; its adapter is in {run / ADAPTER}; to "
            "train it further, set a larger train.steps or train.epochs"
        )
