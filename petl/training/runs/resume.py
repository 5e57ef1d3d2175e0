"""Which checkpoint a run resumes from, and whether it belongs to the same run."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from petl.core.adapter_folder import Folder
from petl.core.types import Settings
from petl.errors import InputError, JobSkipped
from petl.system.files.disk import CHECKPOINTS, MANIFEST, check_writable, refuse_inside
from petl.system.processes import LOCK, claim, release, try_claim
from petl.system.settings.command_line import in_sweep
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
from petl.training.runs.settings import AUTO, TrainConfig

# settings by which a run may differ from its earlier part: they do not change its course, or up to
# rounding and to dropout's draws only
FREE = {
    *(
        "recipe",
        "imports",
        "data.allow_overlap",
        "data.near_duplicates",
    ),  # a recipe's settings are all in the identity
    *(
        f"train.{name}"
        for name in (
            *("resume", "other_base", "run", "output", "save_steps", "keep_checkpoints"),
            *("num_workers", "eval_batch_size", "linear_probe", "score_before", "test"),
            *(
                "log_steps",
                "resume_schedule",
                "init_head",
                "loss_segment",
                "skip_unread",
                "fast_dropout",
                "cast_once",
            ),
            "together",
        )
    ),
}
FREE_GROUPS = ("tracker.", "launch.")  # another tracker, another number of processes
# with retain.mix or retain.limit, texts are trained on, or choose the checkpoint; else they are
# measured alone
CHANGES_TRAINING = (("retain.mix", 0), ("retain.limit", None))
# settings in which a run that is trained further may differ from its earlier part
LENGTH = {"train.steps", "train.epochs", "train.early_stopping"}
PRECISION = "train.precision"
NOT_RESUMABLE = "the method changes while it trains, and PEFT keeps these changes in memory only"
MOST_SHOWN = 3  # differences of settings, in a message
JOBS = ".jobs"  # in a folder of runs: locks of the jobs of sweeps
Identity = Mapping[str, object]  # settings by dotted name
logger = logging.getLogger(__name__)


# Identity


def identity(config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that a resumed run must share with its checkpoint, by dotted name.

    The values are as JSON gives them back, so that they equal those read from a checkpoint.
    """
    entries = flat(config)
    free = FREE
    if entries.get("train.cache_frozen") is not True:  # up to rounding; true leaves out dropout
        free = FREE | {"train.cache_frozen"}
    groups = FREE_GROUPS
    if all(entries.get(name) in (usual, None) for name, usual in CHANGES_TRAINING):
        groups = (*FREE_GROUPS, "retain.")
    kept = {k: v for k, v in entries.items() if k not in free and not k.startswith(groups)}
    return json.loads(json.dumps(kept))


def identity_of(run: Path) -> dict[str, object] | None:
    """Return the identity of the run in a folder, or None if the folder has no configuration.

    Raises:
        InputError: the configuration is damaged.
    """
    file = run / CONFIG
    return identity(read_stored(file)) if file.exists() else None


def as_begun(then: Identity, now: Identity) -> Identity:
    """Return the identity `now` with what `train.precision=auto` was for the run `then`.

    So a run or a job of a sweep is the same on a machine for which auto is another precision.
    """
    if now.get(PRECISION) == AUTO and PRECISION in then:
        return {**now, PRECISION: then[PRECISION]}
    return now


def is_same(then: Identity | None, now: Identity) -> bool:
    """Return True if a run (`then`) is one with these settings (`now`)."""
    # a setting that was not there yet is null now
    return then is not None and not _changed(then, as_begun(then, now))


def lengthens(then: Identity, now: Identity) -> bool:
    """Return True if a run (`now`) is an earlier one (`then`) of another length."""
    return bool(changed := _changed(then, now)) and changed <= LENGTH


def _changed(then: Identity, now: Identity) -> set[str]:
    return {key for key in (*now, *then) if then.get(key) != now.get(key)}


def differences(then: Identity, now: Identity) -> list[str]:
    """Describe each setting that differs between a checkpoint (`then`) and this run (`now`)."""
    changed = _changed(then, now)
    keys = [key for key in dict.fromkeys((*now, *then)) if key in changed]
    keys.sort(key=lambda key: not key.endswith(".name"))  # another method or model first
    return [f"{k}={_shown(then.get(k))} there, {_shown(now.get(k))} here" for k in keys]


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)


def summary(others: Sequence[str]) -> str:
    """Return what `differences` found for a message: the first, and how many more there are."""
    more = f", and {len(others) - MOST_SHOWN} more" if len(others) > MOST_SHOWN else ""
    return f"{', '.join(others[:MOST_SHOWN])}{more}"


# The checkpoint


def choose_checkpoint(settings: TrainConfig, now: Identity) -> Path | None:
    """Return the checkpoint that the run resumes from, or None if it starts from step 0.

    Nothing is written. The folder of a run that is resumed is locked for this process.

    Args:
        now: the identity of the run.

    Raises:
        InputError: the folder is taken, inside of an adapter or model, written to by another
            process, or not writable; the checkpoint is damaged or belongs to another run.
        JobSkipped: this is a job of a sweep, and finished or taken by another worker.
    """
    # workers of a sweep share its jobs through locks in the folder of runs
    if settings.resume == "auto" and in_sweep():
        take_job(settings.output, now)
    checkpoint = find_checkpoint(settings, now)
    given = Path(settings.run) if settings.run else None
    if checkpoint is not None:
        run = checkpoint.parent.parent
        if given is not None and given.resolve() != run.resolve():
            raise InputError(f"train.run={given} is not the folder of {checkpoint}; leave it out")
        check_writable(run)
        return checkpoint
    if given is not None and given.exists() and not may_start_in(given, settings, now):
        raise exists_already(given, settings.resume)
    refuse_inside(given or Path(settings.output) / JOBS)  # of the latter, what it will hold
    check_writable(given or Path(settings.output))
    return None


def may_start_in(folder: Path, settings: TrainConfig, now: Identity) -> bool:
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


def find_checkpoint(settings: TrainConfig, now: Identity) -> Path | None:
    """Return the verified checkpoint that `train.resume` names, or None to start from step 0.

    The run that it belongs to is locked for this process.

    Raises:
        InputError: it is damaged or of another run, there is none, or another process writes to it.
    """
    if settings.resume is None:
        return None
    if settings.resume == "auto":
        return latest(settings, now)
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
    if finished_with(run, now):
        raise InputError(
            f"{run} is finished, so it cannot be resumed; its adapter is in {run / ADAPTER}; to "
            "train it further, set a larger train.steps or train.epochs"
        )
    claim(run)
    try:
        stored = read_state(found)["identity"]
    except InputError as error:
        raise InputError(
            f"{error}; name another checkpoint, or the run, which resumes from its latest "
            "complete one"
        ) from error
    now = as_begun(stored, now)
    others = differences(stored, now)
    if others and not lengthens(stored, now):
        raise InputError(
            f"{found} is of another run: {summary(others)}; use its settings, or leave out "
            "train.resume"
        )
    say_damage(run)
    logger.info("resuming from %s", found)
    return found


def is_checkpoint(path: Path) -> bool:
    """Return True if a folder is a checkpoint, complete or damaged, and not a run."""
    if (path / CHECKPOINTS).is_dir():  # a run, whatever its name
        return False
    return (path / MANIFEST).exists() or path.name.startswith("step-")


def latest(settings: TrainConfig, now: Identity) -> Path | None:
    """Return the latest complete checkpoint of an unfinished run with exactly these settings.

    A finished run whose adapter is gone or damaged counts as unfinished.

    Raises:
        InputError: of such a run, which `train.run` names, there is no complete checkpoint.
        JobSkipped: there is no unfinished run, and a finished one.
    """
    if settings.run:
        run = Path(settings.run)
        skip_finished(run if finished_with(run, now) else None)

    def claimed(folder: Path) -> Path | None:
        if not is_unfinished(folder, now, is_named=settings.run is not None):
            return None
        claim(folder)
        found = latest_of(folder, is_named=settings.run is not None)
        if found is None:
            release(folder)  # a run without checkpoint is left as it is
        return found

    def skip(folder: Path, error: InputError) -> None:
        if settings.run:
            raise error
        logger.warning("skipping %s: %s", folder, error)

    found = _first(settings, claimed, skip)
    if found is not None:
        logger.info("resuming from %s", found)
        return found
    if not settings.run:
        skip_finished(finished_run(settings.output, now, with_adapter=True))
    logger.info(
        "train.resume=auto: no run with these settings in %s; starting from step 0",
        settings.run or settings.output,
    )
    return None


def _first(
    settings: TrainConfig,
    look: Callable[[Path], Path | None],
    failed: Callable[[Path, InputError], None],
) -> Path | None:
    """The first checkpoint that `look` finds in the folders of `train.resume=auto`, or None."""
    # whatever they are called; of alike names, which end with the time, the latest comes first
    found_runs = sorted(Path(settings.output).glob(f"*/{CONFIG}"), reverse=True)
    for folder in [Path(settings.run)] if settings.run else [file.parent for file in found_runs]:
        try:
            found = look(folder)
        except InputError as error:
            failed(folder, error)
        else:
            if found is not None:
                return found
    return None


def begun_precision(settings: TrainConfig, now: Identity) -> str | None:
    """Return what `train.precision=auto` was for the run that `train.resume=auto` goes on with.

    Nothing is locked. None: such a run begins now, or the settings name its precision.
    """
    if now.get(PRECISION) != AUTO or settings.resume != AUTO:
        return None

    def same(folder: Path) -> Path | None:
        return latest_complete(folder) if is_same(identity_of(folder), now) else None

    found = _first(settings, same, lambda *_: None)  # the run will say what is damaged
    return None if found is None else str(read_state(found)["identity"].get(PRECISION, "no"))


def is_unfinished(run: Path, now: Identity, *, is_named: bool = False) -> bool:
    """Return True if a run with these settings was begun in a folder, and is not finished.

    A finished run that is trained further keeps its configuration and its scores until the end of
    the longer run: checkpoints tell whether that was begun.

    Args:
        is_named: the longer run may begin here, in a finished one that `train.run` names.
    """
    config = identity_of(run)
    if config is None or not is_finished(run):
        return is_same(config, now)
    if is_same(config, now):
        return not is_whole(run)
    newest = latest_complete(run) if lengthens(config, as_begun(config, now)) else None
    if newest is None:
        return False
    return is_named or is_same(read_state(newest)["identity"], now)


def latest_of(run: Path, *, is_named: bool) -> Path | None:
    """Return the latest complete checkpoint of an unfinished run, or of one without its adapter.

    Raises:
        InputError: of the latter, which `train.run` names, there is none: a training from step 0
            would replace its scores.
    """
    found = latest_complete(run)
    damage = say_damage(run)
    if damage and is_named and found is None:
        raise InputError(
            f"{damage}; no checkpoint is left that would restore it: put a copy into "
            f"{run / ADAPTER}, or delete {run} to train it again"
        )
    return found


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


def objective_of(scores: Settings) -> float:
    """Return what a sweep optimizes: the best validation score if there is one, else the test's."""
    validation = scores["validation"]
    return scores["after"][scores["metric"]] if validation is None else validation


def is_whole(run: Path) -> bool:
    """Return True if a run is finished and its adapter is there.

    Raises:
        InputError: its scores are damaged.
    """
    return is_finished(run) and not damage_of(run)


def damage_of(run: Path) -> str:
    """Return what is damaged in the adapter of a finished run; "" if nothing is, or not finished.

    Values of tensors are not read: what uses them compares their digest.

    Raises:
        InputError: its scores are damaged.
    """
    if not is_finished(run):
        return ""
    said = f"{run} is finished, and its adapter"
    if not (run / ADAPTER).is_dir():  # which would be asked for on the Hub
        return f"{said} is missing"
    adapter = Folder(run / ADAPTER)
    try:
        _ = adapter.config, adapter.base, adapter.shapes
    except InputError as error:
        return f"{said} cannot be used: {error}"
    return ""


def say_damage(run: Path) -> str:
    """Log what `damage_of` returns, if anything, and return it."""
    damage = damage_of(run)
    if damage:
        logger.warning("%s", damage)
    return damage


def finished_run(output: str, now: Identity, *, with_adapter: bool = False) -> Path | None:
    """Return the finished run with these settings in a folder of runs; None if there is none.

    Of several, the one whose name is last: names end with the time.

    Args:
        with_adapter: pass over those whose adapter is gone or damaged.
    """
    for file in sorted(Path(output).glob(f"*/{SCORES}"), reverse=True):
        try:
            then = identity_of(file.parent) if is_finished(file.parent) else None
            if is_same(then, now) and not (with_adapter and say_damage(file.parent)):
                return file.parent
        except InputError as error:
            logger.warning("skipping %s: %s", file.parent, error)
    return None


def take_job(output: str, now: Identity) -> None:
    """Claim a job of a sweep, which may have several workers, until this process releases it.

    Args:
        output: the folder of runs.
        now: the job's identity.

    Raises:
        InputError: the folder is inside of an adapter or model.
        JobSkipped: another worker has it, or it is finished.
    """
    # the lock file of a job is found by the hash of its settings
    job = Path(output) / JOBS / hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]
    refuse_inside(job)
    job.mkdir(parents=True, exist_ok=True)
    worker = try_claim(job)
    if worker:
        raise JobSkipped(f"skipped: {worker}, works on this job")
    # checked with the lock held: another worker may have finished it just now
    skip_finished(finished_run(output, now, with_adapter=True))


def skip_finished(run: Path | None) -> None:
    """End with the score of a finished run, if there is one: a job queued again has not failed.

    Raises:
        JobSkipped: there is one; the message names its folder.
    """
    if run is not None:
        again = "for another run of these settings, leave out train.resume"
        raise JobSkipped(f"{run} is finished already; {again}", objective_of(read_results(run)))


def finished_with(run: Path, now: Identity) -> bool:
    """Return True if the run with these settings is finished and has its adapter.

    Args:
        now: the identity of the run that would resume it.

    Raises:
        InputError: its scores are damaged.
    """
    try:
        return is_finished(run) and is_same(identity_of(run), now) and is_whole(run)
    except InputError as error:
        raise InputError(
            f"{error}; if the run was not finished, delete the file: its scores are computed again"
        ) from error
