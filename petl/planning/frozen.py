"""What `train.cache_frozen` does in a planned run: the size of its store, and what it saves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from petl.core.dry_run import PassMemory, part_of_pass
from petl.errors import UnsupportedError
from petl.files.paths import cache_folder
from petl.frozen.cache import FOLDER, prefix_of
from petl.frozen.prefix import dropouts, layer_drop
from petl.frozen.store import MARGIN, Form, free_bytes, size_of
from petl.planning.cost import megabytes
from petl.planning.memory import heaviest_batch
from petl.runs.settings import TrainConfig
from petl.training.dataloader import Splits, row_lengths
from petl.training.frozen import PAYS, parts_of


@dataclass(frozen=True)
class FrozenPlan:
    """The frozen blocks of a run below the first trained one.

    Attributes:
        k: how many there are.
        blocks: of the model, all of them.
        bytes: of their output for the train, validation and test rows, repeated rows included.
        saved: fraction of the operations of a step that their output saves.
        reason: why the run does not keep it; "" if it does.
        remedy: True if train.cache_frozen=true would.
    """

    k: int
    blocks: int
    bytes: int
    saved: float
    reason: str
    remedy: bool

    @property
    def which(self) -> str:
        """The blocks in words."""
        blocks = "block 0" if self.k == 1 else f"blocks 0 to {self.k - 1}"
        return f"{blocks} of {self.blocks}"

    def __str__(self) -> str:
        size, saved = megabytes(self.bytes), f"{100 * self.saved:.0f} % fewer operations in a step"
        if not self.reason:
            return f"{self.which}, computed once (train.cache_frozen): {size} on disk, {saved}"
        return f"{self.which}, whose output ({size}) is not kept: {self.reason}"


def frozen_plan(
    model: PeftModel,
    splits: Splits,
    settings: TrainConfig,
    measured: PassMemory | None,
    device: torch.device,
    *,
    bf16: bool = False,
) -> FrozenPlan | None:
    """Return the plan of a run's frozen blocks; None if there are none or no pass can be planned.

    With train.cache_frozen=false, as with auto. Call it inside `without_values`.

    Args:
        measured: a training pass over the longest rows.
    """
    if settings.steps == 0 or measured is None:
        return None
    try:
        prefix = prefix_of(model)
    except UnsupportedError:
        return None
    batch = heaviest_batch(splits, settings)
    part = part_of_pass(model, batch, device, prefix.own[-1], bf16=bf16)
    if part is None:
        return None
    form = form_of(part.output)
    if form is None:
        return None
    sizes = [positions_of(rows, splits, form) for rows in parts_of(splits, settings)]
    rows, positions = (sum(column) for column in zip(*sizes, strict=True))
    size = size_of(form, rows, positions)
    reason, remedy = _reason(splits, settings, prefix, part.called, size)
    # both are counts of the longest rows: the ratio is taken for that of any step (assumption)
    saved = part.operations / max(1, measured.operations)
    return FrozenPlan(prefix.k, len(prefix.blocks), size, saved, reason, remedy)


def form_of(output: Any) -> Form | None:
    """Return the form of a block's output; None if it hands on more than hidden states."""
    others = output[1:] if isinstance(output, tuple) else ()
    states = output[0] if isinstance(output, tuple) else output
    if any(value is not None for value in others) or not isinstance(states, Tensor):
        return None
    dtype = str(states.dtype).removeprefix("torch.")
    return Form(dtype, list(states.shape[2:]), 0, states.shape[1])


def positions_of(rows: Dataset, splits: Splits, form: Form) -> tuple[int, int]:
    """Return the number of rows, and of their positions."""
    if splits.task.reads_text:
        return len(rows), int(row_lengths(splits.task, rows).sum())
    return len(rows), len(rows) * form.positions


def _reason(
    splits: Splits, settings: TrainConfig, prefix: Any, called: Any, size: int
) -> tuple[str, bool]:
    """Return why the output is not kept, and whether train.cache_frozen=true would keep it."""
    setting = layer_drop(prefix.body.config)
    if setting:
        return f"the model's config has {setting}", False
    # a store that is there is not known: its name needs weights, and a plan has no values
    if size + MARGIN > free_bytes(folder()):
        return f"the disk of {folder()} has {megabytes(free_bytes(folder()))} free", False
    if settings.cache_frozen is True:
        return "", False
    left_out = dropouts(iter(called.items()))
    if left_out:
        name = left_out[0].removeprefix("base_model.model.")
        return f"they have dropout, such as {name}", True
    sampler = splits.sampler(settings)
    passes = sampler.steps / sampler.steps_per_epoch
    if passes < PAYS:
        return f"the run reads its examples {passes:.2g} times", True
    return "", False


def folder() -> Path:
    """Return the folder of stores."""
    return cache_folder() / FOLDER
