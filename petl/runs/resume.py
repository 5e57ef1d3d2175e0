"""Which checkpoint a run goes on from, and whether it is one of the same run."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from petl.config.schema import plain
from petl.core.lifecycle import Lifecycle
from petl.errors import InputError, JobSkipped
from petl.files.disk import MANIFEST
from petl.runs.checkpoint import checkpoints, verify
from petl.runs.lock import claim, release, try_claim
from petl.runs.settings import TrainConfig

# settings that leave the course of training as it is
FREE = {
    *("resume", "run", "output", "save_steps", "keep_checkpoints"),
    *("num_workers", "eval_batch_size", "frozen_head", "test"),
}
NOT_RESUMABLE = "the method changes while it trains, and PEFT holds how in memory only"
CHECKPOINTS, CONFIG, SCORES = "checkpoints", "config.yaml", "scores.json"
JOBS = ".jobs"  # in a folder of runs: which jobs of sweeps are being done
logger = logging.getLogger(__name__)


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint, by dotted name, as JSON gives it back."""
    entries = flat(config)
    free = {f"train.{name}" for name in FREE} | {
        "recipe",
        "imports",
    }  # a recipe's settings are all here
    for name in ("model.quantization", "data.labels", "train.quadratic", "train.batch_sizes"):
        if entries.get(name) is None:  # as where there was no such setting
            free.add(name)
    if not entries.get("train.find_lr"):  # as in runs from before there was such a test
        free |= {"train.find_lr", "train.find_lr_steps"}
    beside = ("tracker.", "launch.")  # as the number of processes, that is the machine's affair
    kept = {k: v for k, v in entries.items() if k not in free and not k.startswith(beside)}
    return json.loads(json.dumps(kept))


def identity_of(run: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder, or None if it holds no configuration."""
    file = run / CONFIG
    return identity(plain(OmegaConf.load(file))) if file.is_file() else None  # ty: ignore


def is_resumable(life: Lifecycle) -> bool:
    """Whether a checkpoint can hold all that the method changes while it trains."""
    kind = type(life.tuner)
    return not hasattr(kind, "update_and_allocate") or hasattr(kind, "training_state")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    entries: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            entries |= flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One clause for each setting that a checkpoint and this run do not share."""
    keys = [key for key in (*now, *then) if then.get(key) != now.get(key)]
    keys.sort(key=lambda key: not key.endswith(".name"))  # another method or model first
    return [f"{k}={then.get(k)!r} there, {now.get(k)!r} here" for k in dict.fromkeys(keys)]


def find_checkpoint(settings: TrainConfig, now: Mapping[str, Any], prefix: str) -> Path | None:
    """The checkpoint that `train.resume` means, checked, or None to start anew.

    `prefix` is how the names of this configuration's run folders begin. The run that it belongs to
    is claimed for this process.

    Raises:
        InputError: it is damaged or of another run, there is none, or another process is at it.
    """
    if settings.resume is None:
        return None
    if settings.resume == "auto":
        return newest(settings, now, prefix)
    path = Path(settings.resume)
    if not path.is_dir():
        raise InputError(f"train.resume={path} is no folder; name a run, a checkpoint, or auto")
    found = path if is_checkpoint(path) else newest_complete(path)
    if found is None:
        raise InputError(
            f"train.resume={path} holds no whole checkpoint; leave it out to start anew"
        )
    run = found.parent.parent
    refuse_finished(run)
    claim(run)
    try:
        others = differences(verify(found)["identity"], now)
    except InputError as error:
        raise InputError(
            f"{error}; name another checkpoint, or the run, which goes on from its newest whole one"
        ) from error
    if others:
        raise InputError(
            f"{found} is of another run: {', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}; give its settings, or leave out train.resume"
        )
    logger.info("going on from %s", found)
    return found


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).exists() or path.name.startswith("step-")


def newest(settings: TrainConfig, now: Mapping[str, Any], prefix: str) -> Path | None:
    """The newest whole checkpoint of an unfinished run of this very configuration."""
    if settings.run:
        refuse_finished(Path(settings.run))
        folders = [Path(settings.run)]
    else:
        folders = sorted(Path(settings.output).glob(f"{prefix}-*"), reverse=True)
    for folder in folders:
        if is_finished(folder) or identity_of(folder) != now:
            continue
        try:
            claim(folder)
        except InputError as error:
            if settings.run:
                raise
            logger.warning("passing over %s: %s", folder, error)
            continue
        found = newest_complete(folder)
        if found is not None:
            logger.info("going on from %s", found)
            return found
        release(folder)
    where = settings.run or settings.output
    logger.info("train.resume=auto: no unfinished run of these settings in %s; starts anew", where)
    return None


def newest_complete(run: Path) -> Path | None:
    """The last checkpoint of a run that passes verification; each that does not is named."""
    for path in reversed(checkpoints(run / CHECKPOINTS)):
        try:
            verify(path)
        except InputError as error:
            logger.warning("passing over %s: %s", path, error)
        else:
            return path
    return None


def is_finished(run: Path) -> bool:
    """Whether the run has been scored after training."""
    try:
        return "after" in json.loads((run / SCORES).read_text())
    except (OSError, ValueError):
        return False  # no scores yet


def objective_of(scores: Mapping[str, Any]) -> float:
    """What a sweep is to improve: the best validation score if there was one, else test's."""
    validation = scores["validation"]
    return scores["after"][scores["metric"]] if validation is None else validation


def finished_run(output: str, now: Mapping[str, Any]) -> Path | None:
    """The finished run with these settings in a folder of runs; None if there is none."""
    for file in sorted(Path(output).glob(f"*/{SCORES}")):
        if is_finished(file.parent) and identity_of(file.parent) == now:
            return file.parent
    return None


def take_job(output: str, now: Mapping[str, Any]) -> None:
    """Take a job of a sweep, which several workers may be at, until this one has ended.

    Args:
        output: the folder of runs.
        now: the job's identity.

    Raises:
        PassedOver: another worker has it, or it is finished.
    """
    job = Path(output) / JOBS / hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]
    job.mkdir(parents=True, exist_ok=True)
    worker = try_claim(job)
    if worker:
        raise JobSkipped(f"passed over: {worker}, is at this job")
    run = finished_run(output, now)
    if run is not None:
        reached = objective_of(json.loads((run / SCORES).read_text()))
        raise JobSkipped(f"{run} is finished already", reached)


def refuse_finished(run: Path) -> None:
    if is_finished(run):
        raise InputError(f"{run} is finished; its adapter is in {run / 'adapter'}")
