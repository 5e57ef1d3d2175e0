"""What `train.cache_frozen` does in a planned run: the size of its store, and what it saves."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from petl.efficiency.frozen.cache import FOLDER, missing_rows
from petl.efficiency.frozen.prefix import (
    FrozenPrefix,
    PassEnd,
    PrefixPass,
    dropouts,
    reason_of_pass,
    watched_pass,
)
from petl.efficiency.frozen.rewrite import prefix_of
from petl.efficiency.frozen.store import OutputSpec, size_of, why_not
from petl.errors import UnsupportedError
from petl.experiments.planning.dry_run import Operations, PassMemory
from petl.experiments.planning.memory import heaviest_batch, megabytes
from petl.system.files.paths import cache_folder
from petl.training.dataloader import Splits, batched, row_lengths
from petl.training.runs.settings import TrainConfig


@dataclass(frozen=True)
class FrozenPlan:
    """The frozen blocks of a run below the first trained one.

    Attributes:
        k: how many there are.
        blocks: of the model, all of them.
        bytes: of their output for the train, validation and test rows, repeated rows included.
        missing: those of them that are in no store yet. A store counts if its blocks compute alike
            and its rows are these; the values of weights are not compared.
        unfilled: positions of the rows that are in no store yet: tokens, images or clips.
        saved: fraction of the operations of a step that their output saves.
        reason: why the run does not keep it; "" if it does.
        remedy: True if train.cache_frozen=true would.
    """

    k: int
    blocks: int
    bytes: int
    missing: int
    unfilled: int
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
        if not self.reason and not self.missing:
            return f"{self.which}, in a store on disk ({size}), if it is of these weights: {saved}"
        if not self.reason:
            new = f" ({megabytes(self.missing)} of it new)" if self.missing < self.bytes else ""
            return f"{self.which}, computed once (train.cache_frozen): {size} on disk{new}, {saved}"
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
    if settings.steps == 0 or measured is None or not splits.task.tensors_by_row:
        return None
    try:
        prefix = prefix_of(model)
    except UnsupportedError:
        return None
    batch = heaviest_batch(splits, settings)
    watched, operations = _passed(model, batch, device, prefix, bf16=bf16)
    form = OutputSpec.of(watched.output, by_token=splits.task.reads_text)
    if form is None:
        return None
    parts = splits.parts(settings)
    positions = [positions_of(rows, splits, form) for rows in parts]
    sizes = [size_of(form, *each) for each in positions]
    new = _missing(model, parts, splits, device, bf16=bf16)
    missing = sum(size for size, is_new in zip(sizes, new, strict=True) if is_new)
    # an image or clip counts once, as in the length of a run
    reads_text = splits.task.reads_text
    unfilled = sum(
        (tokens if reads_text else count)
        for (count, tokens), is_new in zip(positions, new, strict=True)
        if is_new
    )
    reason, remedy = _reason(splits, settings, prefix, watched, missing)
    # both are counts of the longest rows: the ratio is taken for that of any step (assumption)
    saved = operations / max(1, measured.operations)
    return FrozenPlan(
        prefix.k, len(prefix.blocks), sum(sizes), missing, unfilled, saved, reason, remedy
    )


def _missing(
    model: PeftModel, parts: list[Dataset], splits: Splits, device: torch.device, *, bf16: bool
) -> list[bool]:
    """Return, for each part of the rows, True if a run has to compute its store."""
    rows = [part.select_columns(batched(part)) for part in parts]
    try:
        with unset_fake_temporarily():  # rows are told apart by their values
            precision = "bfloat16" if bf16 else ""
            return missing_rows(
                model, prefix_of(model), rows, splits.collate, precision=precision, device=device
            )
    except (RuntimeError, NotImplementedError, TypeError, UnsupportedError):
        # what runs before the blocks needs weights, or rows cannot be told apart
        return [True] * len(parts)


def _passed(
    model: PeftModel,
    batch: Mapping[str, Tensor],
    device: torch.device,
    prefix: FrozenPrefix,
    *,
    bf16: bool,
) -> tuple[PrefixPass, int]:
    """Return what a pass shows of a prefix, and the operations up to its end."""
    inputs = {name: torch.empty_like(tensor, device=device) for name, tensor in batch.items()}
    counts = [0]
    with (
        Operations() as counter,
        watched_pass(prefix, lambda: counts.append(counter.total)) as watched,
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        suppress(PassEnd, RuntimeError, NotImplementedError, TypeError),  # what needs values
    ):
        model(**inputs)
    return watched, counts[-1]


def positions_of(rows: Dataset, splits: Splits, form: OutputSpec) -> tuple[int, int]:
    """Return the number of rows, and of their positions."""
    if splits.task.reads_text:
        return len(rows), int(row_lengths(splits.task, rows).sum())
    return len(rows), len(rows) * form.positions


def _reason(
    splits: Splits, settings: TrainConfig, prefix: FrozenPrefix, watched: PrefixPass, missing: int
) -> tuple[str, bool]:
    """Return why the output is not kept, and whether train.cache_frozen=true would keep it."""
    folder = cache_folder() / FOLDER
    reason = reason_of_pass(prefix, watched) or why_not(missing, folder, math.inf)
    if reason or settings.cache_frozen is True:
        return reason, False
    left_out = dropouts(watched.called.items())
    reason = why_not(missing, folder, splits.passes(settings))
    if left_out:
        reason = f"they have dropout, such as {left_out[0]}"
    return reason, bool(reason)
