"""Checkpoints: folders of safetensors and JSON that are complete or absent, and the best of them.

A checkpoint is written under a temporary name, flushed to disk and then renamed; its manifest holds
the size and SHA-256 of every file. Reading one executes nothing.

    adapter/               the adapter in PEFT's format, with the base model's fingerprint
    optimizer.safetensors  tensors of the optimizer, `<parameter>.<key>`; scalars in optimizer.json
    lifecycle.safetensors  what the method keeps for training only
    rng-<rank>.safetensors random states of each process
    metrics.jsonl          the run's log up to here
    state.json             `TrainState`, and which run this is
    manifest.json
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from petl.core.adapter_file import WEIGHTS, trained_modules
from petl.core.adapter_folder import Folder, read_weights
from petl.core.parameters import trainable
from petl.core.types import Record
from petl.data.tasks.base import Task
from petl.errors import InputError, first_line
from petl.system.files.disk import (
    MANIFEST,
    UNFINISHED,
    atomic_folder,
    copy_file,
    remove,
    sha256,
    write_json,
)
from petl.system.files.paths import why_impossible
from petl.system.files.read import parse_json, read_json
from petl.system.random_states import RandomStates, restore, states
from petl.system.values import type_problem
from petl.training.runs.records import METRICS, read_log
from petl.training.runs.settings import TrainConfig

STATE, LIFECYCLE = "state.json", "lifecycle.safetensors"
logger = logging.getLogger(__name__)
OPTIONS = {int: float, float: float, tuple: list[float]}  # of an optimizer, to shapes in JSON
RngState = tuple[dict[str, Tensor], dict[str, str]]  # tensors, and JSON by name


@dataclass
class TrainState:
    """Progress of a training run: what a checkpoint keeps besides tensors.

    The names of the fields are those in state.json, so they must not change.

    Attributes:
        step: optimizer steps done.
        tokens: tokens seen, without padding.
        positions: the same with padding, and with the batches of processes without an own example.
        seconds: spent in the loop.
        cpu_seconds: processor time that this process spent there, over all its threads.
        spent: seconds by phase, in the main process.
        window: loss, auxiliary loss and gradient norm of each step since the last log line.
        best: the best validation score; of evaluations that share it, the one with the lowest loss
            was that of `best_step` and gave `best_scores`.
        stale: evaluations since the score rose; a lower loss at the same score is no rise.
        excess: by how much the model of `best_step` exceeds the limits of features.
        schedule_from: steps done when the schedule of the learning rate began.
        group_step: steps of the group that the run trains in, see petl/training/together/runs.py.
    """

    step: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    window: list[list[float]] = field(default_factory=list)
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    schedule_from: int = 0
    group_step: int = 0
    excess: float = 0.0

    def note(self, scores: dict[str, float], task: Task, excess: float = 0.0) -> bool:
        """Record an evaluation on the validation examples; return True if it is the best so far.

        Args:
            excess: by how much the model exceeds a limit: of two, the one that does by less is
                better, and of equal ones the one with the better score.
        """
        # the first one has nothing to be better than
        earlier = excess if self.best_step is None else self.excess
        # (-excess, score, -loss): Python compares the first ones first
        new = (-excess, *task.quality(scores))
        best = (-earlier, *task.quality(self.best_scores))
        self.stale = 0 if new[:2] > best[:2] else self.stale + 1
        if new <= best:
            return False
        self.best, self.best_step, self.best_scores = scores[task.metric], self.step, scores
        self.excess = excess
        return True

    @property
    def padding(self) -> float:
        """The fraction of computed positions that held no token."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


class State(TypedDict):
    """The content of state.json that a resumed run needs."""

    identity: Record
    processes: int
    rows: str
    progress: TrainState


class WrittenFile(TypedDict):
    """Size and SHA-256 of a file in a manifest."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """The content of manifest.json."""

    files: dict[str, WrittenFile]


class ParameterGroup(TypedDict):
    """A group of parameters in optimizer.json, besides its options."""

    params: list[str]


class OptimizerState(TypedDict):
    """The content of optimizer.json."""

    groups: list[ParameterGroup]
    scalars: Record


# Finding and checking


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step in a folder of checkpoints."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest step first, complete or damaged."""
    # six digits at least: a run of a million steps has more
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def verify(checkpoint: Path) -> Record:
    """Return the content of state.json, after comparing every file with the manifest.

    Raises:
        InputError: it is no checkpoint, or a file is missing, cut short or altered.
    """
    try:
        files = read_json(checkpoint / MANIFEST, Manifest)["files"]
    except InputError as error:
        raise InputError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    for name, file in files.items():
        path, size, digest = checkpoint / name, file["bytes"], file["sha256"]
        # the manifest may come from a stranger: no file outside is read
        reason = why_impossible(str(path))
        if reason:
            raise InputError(f"{checkpoint / MANIFEST} names a file that cannot be: {reason}")
        if not path.resolve().is_relative_to(checkpoint.resolve()):
            raise InputError(f"{checkpoint / MANIFEST} names {path}, which is outside the folder")
        if not path.is_file():
            raise InputError(f"{path} is missing from the checkpoint")
        present = path.stat().st_size
        # before the hash: quick, and a message that a truncated file explains
        if present != size:
            raise InputError(f"{path} has {present} bytes, not the {size} that were written")
        if sha256(path) != digest:
            raise InputError(f"{path} was altered after it was written (its SHA-256 differs)")
    return read_json(checkpoint / STATE, Record)


def read_state(checkpoint: Path) -> Record:
    """Return the content of state.json of a checkpoint from which training can resume.

    Raises:
        InputError: as `verify`; or the state is not that of a run.
    """
    state = verify(checkpoint)
    problem = type_problem(state, State)
    if problem:
        raise InputError(f"{checkpoint / STATE} cannot be used: {problem}")
    return state


def is_complete(checkpoints: Path, step: int) -> bool:
    """Return True if the checkpoint of a step passes `verify`."""
    try:
        verify(step_folder(checkpoints, step))
    except InputError:
        return False
    return True


def prune(newest: Path, keep: int, best_step: int | None) -> None:
    """Delete checkpoints before `newest`, except the last `keep - 1` and the best one.

    Later checkpoints stay: the run resumed from one before them, because they were damaged or the
    user chose so, and will overwrite them.
    """
    every = checkpoints(newest.parent)
    # max: a negative end would count from the end of the list
    for path in every[: max(0, every.index(newest) + 1 - keep)]:
        if best_step is None or path != step_folder(newest.parent, best_step):
            remove(path)


def clean(folder: Path) -> None:
    """Delete incomplete files and folders that a killed process left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        remove(path)


# The best one


def verify_best(state: TrainState, checkpoints: Path, log: Path, task: Task) -> TrainState:
    """Return `state` with a best step whose checkpoint is complete, or which is the present step.

    A damaged best checkpoint is dropped with a warning. The best of the remaining ones, by the
    scores in metrics.jsonl (`log`), replaces it; without any, the next evaluation is the best.
    """
    step = state.best_step
    if step is None or state.best is None:
        return state
    lines = [line for line in read_log(log) if "validation" in line and line["step"] <= state.step]
    scores = {line["step"]: line["validation"] for line in lines}
    if step == state.step:
        return state
    try:
        verify(step_folder(checkpoints, step))
    except InputError as error:
        logger.warning("dropping the best checkpoint: %s", error)
    else:
        return state
    left = {s: v for s, v in scores.items() if s == state.step or is_complete(checkpoints, s)}
    beyond = {line["step"]: line.get("excess", 0.0) for line in lines}
    state.best_step = best_of(left, task, beyond)
    state.excess = beyond.get(state.best_step or 0, 0.0)
    state.best_scores = left.get(state.best_step, {})
    state.best = state.best_scores.get(task.metric)
    # a tie of scores does not make a new best, so patience counts from the first
    reached = min((s for s in left if left[s].get(task.metric) == state.best), default=state.step)
    state.stale = sum(s > reached for s in scores)
    if state.best is None:
        logger.warning("no earlier evaluation has a complete checkpoint: the next one is the best")
    else:
        logger.warning(
            "the best evaluation is now that of step %d%s: %s %.4f",
            state.best_step,
            ", the last one" if state.best_step == state.step else "",
            task.metric,
            state.best,
        )
    return state


def best_of(
    evaluations: Mapping[int, Mapping[str, float]],
    task: Task,
    beyond: Mapping[int, float] | None = None,
) -> int | None:
    """Return the first step with the best evaluation, or None if there are none.

    Args:
        beyond: by step, how much a limit is exceeded.
    """
    beyond = beyond or {}
    return max(
        evaluations,
        key=lambda step: (-beyond.get(step, 0.0), task.quality(evaluations[step]), -step),
        default=None,
    )


# Writing and reading


def write(
    target: Path,
    model: PeftModel,
    optimizer: Optimizer,
    lifecycle_state: dict[str, Tensor],
    rng: list[RngState],
    state: Record,
    log: Path | None = None,
) -> None:
    """Write the checkpoint `target`; `rng` has one entry for each process, `log` is copied."""
    with atomic_folder(target, manifest=True) as folder:
        save_adapter(model, folder / "adapter")
        tensors, scalars = flatten(optimizer, model)
        save_file(tensors, folder / "optimizer.safetensors")
        write_json(folder / "optimizer.json", scalars)
        save_file(contiguous(lifecycle_state), folder / LIFECYCLE)
        for rank, (generators, others) in enumerate(rng):
            save_file(generators, folder / f"rng-{rank}.safetensors", metadata=others)
        write_json(folder / STATE, state)
        if log is not None:
            copy_file(log, folder / METRICS)


def save_adapter(model: PeftModel, folder: Path, *, start: Path | None = None) -> None:
    """Save the adapter in PEFT's format, without PEFT's template of a model card.

    Args:
        start: where its initial values were saved, for an adapter that changed the base weights
            when it began: the file then holds the difference, which fits the original base.
    """
    model.save_pretrained(
        str(folder),
        # keep the base's own embeddings out of the file; "auto" makes PEFT ask the hub about them
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(start) if start else None,
    )
    if start:  # PEFT's difference leaves out fully trained modules
        tensors = load_file(folder / WEIGHTS) | contiguous(trained_modules(model))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # the run writes its own model card at the end
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(model: PeftModel, folder: Path, left_out: tuple[str, ...] = ()) -> None:
    """Load a saved adapter's tensors into the model's adapter, strictly.

    Args:
        left_out: prefixes of names of tensors of fully trained modules that keep their values,
            whether or not the file has them.

    Raises:
        InputError: a trainable tensor is missing from the file, the file has others, or tensors
            differ in shape or have values that are not finite.
    """
    path = folder / WEIGHTS
    kept = {k: v for k, v in trained_modules(model).items() if k.startswith(left_out)}
    tensors = {k: v for k, v in read_weights(path).items() if not k.startswith(left_out)} | kept
    config: Any = model.active_peft_config
    if hasattr(config, "rank_pattern"):  # AdaLoRA's, which changes; PEFT loads tensors by it
        saved: Any = Folder(folder).config
        if saved.peft_type == config.peft_type:  # else it was saved as another method
            config.rank_pattern = saved.rank_pattern
    try:
        result = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, KeyError) as error:  # PEFT's and torch's messages list every tensor
        raise InputError(f"{path} does not fit the model: {first_line(error)}") from error
    missing = without_values(model, set(result.missing_keys))
    wrong = sorted(missing) or sorted(result.unexpected_keys)
    if wrong:
        which = "lacks" if missing else "has"
        raise InputError(f"{path} does not fit the model: it {which} {wrong[0]}")


def without_values(model: PeftModel, missing: set[str]) -> set[str]:
    """Return the trainable tensors that got no value, of the names that a file lacks."""
    # a tensor that several modules share has one name in the file
    everything = model.named_parameters(remove_duplicate=False)
    loaded = {id(tensor) for name, tensor in everything if name not in missing}
    return missing & {name for name, tensor in trainable(model) if id(tensor) not in loaded}


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detached contiguous copies on the CPU, as safetensors needs them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def flatten(optimizer: Optimizer, model: PeftModel) -> tuple[dict[str, Tensor], Record]:
    """Return an optimizer's tensors by `<parameter>.<key>`, and its other state for JSON."""
    # optimizer states are keyed by the parameter object, which no file can name
    names = {id(parameter): name for name, parameter in trainable(model)}
    tensors, scalars = {}, {}
    for parameter, entries in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            else:
                scalars[f"{name}.{key}"] = value
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return contiguous(tensors), {"groups": groups, "scalars": scalars}


def restore_optimizer(checkpoint: Path, optimizer: Optimizer, model: PeftModel) -> None:
    """Restore what `flatten` returned, by the names of the parameters.

    Raises:
        InputError: the optimizer in the checkpoint has other parameters, or its files cannot be
            used.
    """
    file = checkpoint / "optimizer.json"
    stored = read_json(file, OptimizerState)
    entries = {**read_weights(checkpoint / "optimizer.safetensors"), **stored["scalars"]}
    names = [group["params"] for group in stored["groups"]]
    # torch's state dict numbers parameters through all groups
    number = {name: i for i, name in enumerate(chain(*names))}
    present = {id(parameter): name for name, parameter in trainable(model)}
    ours = [[present[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if ours != names or not {name.rpartition(".")[0] for name in entries} <= number.keys():
        raise InputError(
            f"cannot resume from {checkpoint}: its optimizer has other parameters than this model"
        )
    state: dict[int, Record] = {}
    for entry, value in entries.items():
        name, _, key = entry.rpartition(".")
        state.setdefault(number[name], {})[key] = value
    groups = []
    for group, fresh in zip(stored["groups"], optimizer.param_groups, strict=True):
        # of the type that the new optimizer has for each option
        kinds = {key: OPTIONS.get(type(fresh.get(key)), Any) for key in group}
        problems = [type_problem(group[key], kind, key) for key, kind in kinds.items()]
        if any(problems):
            raise InputError(f"{file} cannot be used: {max(problems)}")
        # JSON turned the tuple of betas into a list
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in group.items()}
        groups.append({**options, "params": [number[name] for name in group["params"]]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state(device: torch.device) -> RngState:
    """Return the state of every generator that this process draws from, as a checkpoint has it."""
    current = states(device)
    tensors = {"cpu": current.cpu}
    if device.type != "cpu":
        tensors["device"] = current.device
    kind, keys, *others = current.numpy
    return tensors, {
        "python": json.dumps(current.python),
        "numpy": json.dumps([kind, keys.tolist(), *others]),
    }


def restore_rng(checkpoint: Path, rank: int, device: torch.device) -> None:
    """Restore the random states that a checkpoint holds for the process `rank`."""
    file = checkpoint / f"rng-{rank}.safetensors"
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            _set_rng((tensors, opened.metadata()), device)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{file} holds no random states: {first_line(error)}") from error


def _set_rng(state: RngState, device: torch.device) -> None:
    """Set every generator to a state from `rng_state`."""
    tensors, others = state
    if (device.type == "cpu") == ("device" in tensors):
        logger.warning(
            "the random states were saved on another type of device: on %s dropout draws other "
            "masks, so losses differ from those of an uninterrupted run",
            device,
        )
        device = torch.device("cpu")  # those of the device stay as they are
    own = tensors["cpu" if device.type == "cpu" else "device"]
    # gauss: a second normal number that random.gauss keeps for its next call
    version, keys, gauss = parse_json(others["python"])
    # values: position in the keys, and numpy's kept normal number
    kind, words, *values = parse_json(others["numpy"])
    of_numpy = kind, np.array(words, dtype=np.uint32), *values
    restore(RandomStates(tensors["cpu"], own, of_numpy, (version, tuple(keys), gauss)), device)


def room_for(model: PeftModel, settings: TrainConfig) -> int:
    """Estimate the bytes that adapter and checkpoints of a run take at most."""
    # float32: adapters train in it, on bfloat16 bases as well
    adapter = sum(4 * p.numel() for _, p in trainable(model))
    checkpoint = (1 + settings.optimizer_state[0]) * adapter
    kept = settings.keep_checkpoints + 2  # the best one, and one that is being written
    return adapter + kept * checkpoint + 2**20  # assumption: 1 MiB for all small files
