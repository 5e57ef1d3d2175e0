"""Drift: how far the features of a model without a vocabulary have moved on other rows.

Features are what goes into the head that was trained, one vector a row, pooled as the model pools
them; never the outputs of the head. With u and v the features of base and adapted model, scaled to
length 1, the drift of a row is 1 - cos(u, v) = |u - v|^2 / 2. Linear CKA (Kornblith et al. 2019,
arXiv:1905.00414), which rotations and scales leave as it is, stands beside it.

Shapes: B rows of a batch, N rows, T tokens, H features.
"""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from petl.core.spec.facts import facts_of
from petl.core.types import Batch, Record, base_of
from petl.errors import UnsupportedError
from petl.training.linear_probe import find_head, one_vector
from petl.training.retain.measure import base_with, both_measured, interval_of, measuring, padded
from petl.training.retain.rows import (
    ALONE,
    Processes,
    Processor,
    RetainedRow,
    by_length,
    tokenizer_of,
)


@dataclass(frozen=True)
class DriftedRow:
    """One row: a line of retained.jsonl.

    Attributes:
        text: the text, or the name of the file.
    """

    text: str
    drift: float


@dataclass(frozen=True)
class Drift:
    """What a model that does not write has lost on retained rows.

    Attributes:
        rows: their number.
        drift: 1 - mean cosine of base's and adapted features.
        interval: of `drift`, 95 %; None for fewer than eight rows.
        cka: linear, of base's and adapted features; None where they are constant.
        texts: each with the columns of retained.jsonl.
    """

    rows: int
    drift: float
    interval: tuple[float, float] | None
    cka: float | None
    texts: tuple[DriftedRow, ...] = field(repr=False, default=())
    kind: str = "features"

    @property
    def change(self) -> float:
        """What `retain.limit` limits."""
        return self.drift

    def entry(self) -> Record:
        """Return the entry of scores.json, without the texts."""
        return {name: value for name, value in asdict(self).items() if name != "texts"}

    def __str__(self) -> str:
        limits = [round(limit, 3) + 0.0 for limit in self.interval or ()]
        around = " ({:.3f} to {:.3f})".format(*limits) if limits else ""
        text = f"on other examples: features drifted by {self.drift:.3f}{around}"
        return text if self.cka is None else f"{text}; CKA {self.cka:.3f}"


class BatchedRows(NamedTuple):
    """Rows that a model reads, in batches.

    Attributes:
        texts: of each row, or its name.
        batches: of this process: numbers of rows, and the inputs of the model on any device.
        processes: among which the rows are divided.
    """

    texts: Sequence[str]
    batches: Sequence[tuple[list[int], Callable[[], Batch]]]
    processes: Processes = ALONE


def of_texts(
    rows: Sequence[RetainedRow],
    tokenizer: PreTrainedTokenizerBase | Processor,
    batch_size: int,
    processes: Processes = ALONE,
) -> BatchedRows:
    """Return texts in batches."""
    pad = tokenizer_of(tokenizer).pad_token_id or 0

    def inputs(numbers: Sequence[int]) -> Batch:
        ids = [rows[number].ids for number in numbers]
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([[1] * len(each) for each in ids], 0),
        }

    parts = by_length([len(row.ids) for row in rows], batch_size, processes)
    batches = [(numbers, lambda numbers=numbers: inputs(numbers)) for numbers in parts]
    return BatchedRows([row.text for row in rows], batches, processes)


def compare(
    model: nn.Module,
    rows: BatchedRows,
    *,
    base: nn.Module | None = None,
    before: Tensor | None = None,
) -> Drift:
    """Measure the drift of a model.

    Args:
        base: the model to compare with; None: `model` without its adapters.
        before: features of the base [N, H], from before its weights were changed.

    Raises:
        InputError, UnsupportedError: as of `petl.retained`; or the model has no head that reads
            features.
    """
    other, as_base = base_with(model, base) if before is None else (model, nullcontext)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with both_measured(model, other) as passes:
        for numbers, batch in rows.batches:
            inputs = batch()
            after = _features(model, inputs)
            if before is None:
                with as_base(), passes.second():
                    start = _features(other, inputs)
            else:
                start = before[numbers]
            found |= zip(numbers, zip(start, after, strict=True), strict=True)
    # in the order of the rows, whatever that of the batches was
    every = rows.processes.all(found)
    pairs = [every[number] for number in range(len(rows.texts))]
    X, Y = (torch.stack(side) for side in zip(*pairs, strict=True))
    # not 1 - cos, which of equal vectors is not 0 to the bit
    drifts = ((F.normalize(X, dim=1) - F.normalize(Y, dim=1)).square().sum(1) / 2).tolist()
    mean = math.fsum(drifts) / len(drifts)
    return Drift(
        rows=len(drifts),
        drift=mean,
        interval=interval_of([(1, drift) for drift in drifts], mean),
        cka=linear_cka(X, Y),
        texts=tuple(map(DriftedRow, rows.texts, drifts)),
    )


def features_of(
    model: nn.Module, rows: BatchedRows, trained: Collection[str] | None = None
) -> Tensor:
    """Return the features of all rows, [N, H] float64, on the CPU.

    Args:
        trained: names of modules that are trained as a whole; None: those of the adapter.
    """
    found: dict[int, Tensor] = {}
    with measuring(model):
        for numbers, batch in rows.batches:
            found |= zip(numbers, _features(model, batch(), trained), strict=True)
    every = rows.processes.all(found)
    return torch.stack([every[number] for number in range(len(rows.texts))])


def linear_cka(X: Tensor, Y: Tensor) -> float | None:
    """Return |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of columns that are centered over the rows.

    None where the features of all rows are the same.
    """
    # without it, a common offset of all rows would count as similarity
    X, Y = X - X.mean(0), Y - Y.mean(0)
    # |Y'X|^2 = <XX', YY'>: matrices of rows, of which there are fewer than features
    K, L = X @ X.T, Y @ Y.T
    scale = float(K.norm() * L.norm())
    return float((K * L).sum()) / scale if scale else None


def _features(model: nn.Module, batch: Batch, trained: Collection[str] | None = None) -> Tensor:
    """Return what the head of a model reads of each row, [B, H] float64, on the CPU."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    # of several modules that are trained, the first one that runs is read
    read: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda own, given: read.append((own, given[0])))
        for module in _heads(model, trained)
    ]
    try:
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    mask = inputs.get("attention_mask")
    states = output.get("last_hidden_state")
    if (embedded := output.get("sentence_embedding")) is not None:
        # as the task pools
        vectors = embedded
    elif read:
        vectors = _pooled(*read[0], output.get("logits"), mask)
    elif states is not None:
        vectors = _mean(states, mask)
    else:
        raise UnsupportedError(
            f"{type(base_of(model)).__name__} has no head that is known, so what it reads is not"
        )
    # on the CPU: those of all rows are needed at once
    return vectors.flatten(1).cpu().double()


def _heads(model: nn.Module, trained: Collection[str] | None) -> list[nn.Module]:
    """Return the modules that are trained as a whole, and the head; the first to run reads it."""
    base = base_of(model)
    if trained is None and isinstance(model, PeftModel):
        trained = facts_of(model.active_peft_config).modules_to_save
    # a norm that trains in a block is no head; a pooler in the body is the first part of one
    found = [
        module
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in {each.rpartition(".")[2] for each in trained or ()}
        and ("." not in name or name.endswith("pooler"))
    ]
    head = find_head(base)
    return [*found, *([head] if head is not None and head not in found else [])]


def _pooled(head: nn.Module, read: Tensor, logits: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return one vector a row of the input of a head, [B, H] or [B, T, H]."""
    if read.dim() == 2:
        return read
    # the head scores each token, and the model takes one of them
    if logits is not None and logits.dim() == 2:
        return one_vector(head, read, logits, mask)
    return _mean(read, mask)


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over tokens of states [B, T, H], without padding."""
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    # padding is no part of a row
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
