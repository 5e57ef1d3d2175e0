"""Checkpoints: folders of safetensors and JSON that are whole or not there at all.

A checkpoint is written under a temporary name, flushed to the disk and then renamed, and its
manifest holds the size and SHA-256 of every file. Nothing in it is executed when it is read.

    adapter/               the adapter in PEFT's format
    optimizer.safetensors  tensors of the optimizer, `<parameter>.<key>`; the rest in optimizer.json
    lifecycle.safetensors  what the method keeps for training only
    rng-<rank>.safetensors random states of each process
    metrics.jsonl          the run's log up to here
    state.json             step, scores, and which run this is
    manifest.json
"""

import json
import logging
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from petl.core.adapter_file import WEIGHTS, trained_modules
from petl.core.parameters import trainable
from petl.errors import InputError
from petl.files.disk import MANIFEST, UNFINISHED, atomic_folder, sha256, write_json
from petl.runs.settings import TrainConfig

STATE, LIFECYCLE = "state.json", "lifecycle.safetensors"
METRICS = "metrics.jsonl"  # the log of a run, and its name in a checkpoint
logger = logging.getLogger(__name__)
RngState = tuple[dict[str, Tensor], dict[str, str]]  # tensors, and JSON by name


# Finding and checking


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first, whole or damaged."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def verify(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint, after every file was compared with the manifest.

    Raises:
        InputError: it is no checkpoint, or a file is missing, cut short or altered.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        written = [(name, int(file["bytes"]), file["sha256"]) for name, file in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint} is not a whole checkpoint: {MANIFEST} cannot be read ({error})"
        ) from error
    for name, size, digest in written:
        path = checkpoint / name
        if not path.is_file():
            raise InputError(f"{path} is missing from the checkpoint")
        found = path.stat().st_size
        if found != size:
            raise InputError(f"{path} has {found} bytes, not the {size} that were written")
        if sha256(path) != digest:
            raise InputError(f"{path} was altered after it was written (its SHA-256 differs)")
    return json.loads((checkpoint / STATE).read_text())


def prune(newest: Path, keep: int, best_step: int | None) -> None:
    """Delete checkpoints older than `newest`, all but the last `keep - 1` and the best one.

    Later ones stay as they are: the run went on from one before them, because they were damaged
    or because it was told to, and will come to their steps again.
    """
    every = checkpoints(newest.parent)
    for path in every[: max(0, every.index(newest) + 1 - keep)]:
        if best_step is None or path != step_folder(newest.parent, best_step):
            shutil.rmtree(path)


def clean(folder: Path) -> None:
    """Delete what a killed process left half written."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# Writing and reading


def write(
    target: Path,
    model: PeftModel,
    optimizer: Optimizer,
    lifecycle_state: dict[str, Tensor],
    rng: list[RngState],
    state: dict[str, Any],
    log: Path | None = None,
) -> None:
    """Write the checkpoint `target`; `rng` has one entry for each process, `log` is copied."""
    with atomic_folder(target, manifest=True) as folder:
        save_adapter(model, folder / "adapter")
        tensors, rest = flatten(optimizer, model)
        save_file(tensors, folder / "optimizer.safetensors")
        write_json(folder / "optimizer.json", rest)
        save_file(contiguous(lifecycle_state), folder / LIFECYCLE)
        for rank, (generators, others) in enumerate(rng):
            save_file(generators, folder / f"rng-{rank}.safetensors", metadata=others)
        write_json(folder / STATE, state)
        if log is not None:
            shutil.copyfile(log, folder / METRICS)


def save_adapter(model: PeftModel, folder: Path, *, start: Path | None = None) -> None:
    """The adapter in PEFT's format, without PEFT's template of a model card.

    `start` is where its first state was saved, for those that change the base weights when they
    begin: the file then holds the difference, which is right on the base as it was.
    """
    model.save_pretrained(
        str(folder),
        # the base's own embeddings stay out of the file, and PEFT does not ask the hub about them
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(start) if start else None,
    )
    if start:  # PEFT's difference leaves out the modules that are trained whole
        tensors = load_file(folder / WEIGHTS) | contiguous(trained_modules(model))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put a saved adapter's tensors into the model's adapter, exactly.

    Raises:
        InputError: a trainable tensor is missing from the file, or the file has others.
    """
    path = folder / "adapter_model.safetensors"
    config: Any = model.active_peft_config
    if hasattr(config, "rank_pattern"):  # AdaLoRA's is that of the moment, and PEFT loads by it
        saved = json.loads((folder / "adapter_config.json").read_text())
        if saved["peft_type"] == config.peft_type:  # else it was saved as another method
            config.rank_pattern = saved["rank_pattern"]
    result = set_peft_model_state_dict(model, load_file(path))
    missing = {name for name, _ in trainable(model)} & set(result.missing_keys)
    wrong = sorted(missing) or sorted(result.unexpected_keys)
    if wrong:
        which = "lacks" if missing else "has"
        raise InputError(f"{path} does not fit the model: it {which} {wrong[0]}")


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def flatten(optimizer: Optimizer, model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `<parameter>.<key>`, and the rest as JSON takes it."""
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
    """Take back what `flatten` gave, by the names of the parameters."""
    rest = json.loads((checkpoint / "optimizer.json").read_text())
    entries = {**load_file(checkpoint / "optimizer.safetensors"), **rest["scalars"]}
    names = [name for group in rest["groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    here = {id(parameter): name for name, parameter in trainable(model)}
    ours = [here[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if ours != names:
        raise InputError(
            f"the optimizer in {checkpoint} is about other parameters than this model's"
        )
    state: dict[int, dict[str, Any]] = {}
    for entry, value in entries.items():
        name, _, key = entry.rpartition(".")
        state.setdefault(number[name], {})[key] = value
    groups = []
    for group in rest["groups"]:
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in group.items()}
        groups.append({**options, "params": [number[name] for name in group["params"]]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state(device: torch.device) -> RngState:
    """The state of every generator that this process draws from."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors["device"] = torch.get_device_module(device).get_rng_state(device)
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    return tensors, {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, keys.tolist(), *rest]),
    }


def restore_rng(checkpoint: Path, rank: int, device: torch.device) -> None:
    """Take back what `rng_state` gave for this process."""
    with safe_open(checkpoint / f"rng-{rank}.safetensors", framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        set_rng((tensors, opened.metadata()), device)


def set_rng(state: RngState, device: torch.device) -> None:
    """Let every generator be as `rng_state` found it."""
    tensors, others = state
    torch.set_rng_state(tensors["cpu"])
    on_cpu = device.type == "cpu"
    if on_cpu == ("device" in tensors):
        logger.warning(
            "this was saved on another kind of device: on %s dropout is drawn anew, so that losses "
            "are not to the digit those of a run that was never stopped",
            device,
        )
    elif not on_cpu:
        torch.get_device_module(device).set_rng_state(tensors["device"], device)
    version, keys, gauss = json.loads(others["python"])
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = json.loads(others["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def room_for(model: PeftModel, settings: TrainConfig) -> int:
    """Bytes that adapter and checkpoints of a run take at most, about."""
    adapter = sum(4 * p.numel() for _, p in trainable(model))
    checkpoint = 3 * adapter  # the adapter and AdamW's two moments
    kept = settings.keep_checkpoints + 2  # the best one, and one that is being written
    return adapter + kept * checkpoint + 2**20
