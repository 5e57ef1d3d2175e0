"""Batches of several adapters side by side, and the loss of each of them.

Shapes: K adapters, N rows of each, T tokens: the most of any batch.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import LOSS_MAPPING

from petl.core.layers.context import is_encoder_decoder
from petl.core.layers.task_rows import ARGUMENT
from petl.core.types import Arguments, CausalModel, base_of
from petl.errors import InputError, UnsupportedError

Batch = Mapping[str, Any]
# what a loss reads and not the model itself
LABELS = ("labels", "start_positions", "end_positions", "shift_labels", "num_items_in_batch")
MASKS = ("attention_mask", "decoder_attention_mask")
# tensors [rows, tokens] that can be padded with 0; ids get the model's padding
PADDED = (*MASKS, "token_type_ids", "position_ids", "input_ids", "decoder_input_ids")
TOKENS = 512  # tokens of a pass from which on more adapters gain nothing; measured on a CPU


class GroupedBatch(NamedTuple):
    """Inputs of the model for the rows of all adapters, without labels.

    Attributes:
        inputs: tensors [K N, ...]; a batch with fewer rows repeats its first one.
        rows: N.
    """

    inputs: Arguments
    rows: int


def joined(model: CausalModel, batches: Sequence[Batch]) -> GroupedBatch:
    """Return the batches side by side, padded on the right to the longest.

    Raises:
        InputError: they have other inputs, or one that cannot be padded.
    """
    inputs = [with_decoder_inputs(model, batch) for batch in batches]
    if {"input_ids", "pixel_values"} <= inputs[0].keys():
        raise UnsupportedError(
            "batches of texts with images cannot be put side by side: which image belongs to "
            "which row depends on the model; train these adapters one after the other"
        )
    # the last batch of an epoch may have fewer
    rows = max(rows_of(batch) for batch in inputs)
    ids = [batch["input_ids"] for batch in inputs if "input_ids" in batch]
    if len({each.shape[1] for each in ids}) > 1:  # padding has to be told apart
        inputs = [
            {"attention_mask": torch.ones_like(batch["input_ids"]), **batch} for batch in inputs
        ]
    names = {frozenset(batch) for batch in inputs}
    if len(names) > 1:
        differing = sorted(frozenset.union(*names) - frozenset.intersection(*names))
        raise InputError(
            f"batches of adapters that train together have the same inputs, and {differing} are "
            "not in all of them"
        )
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    side_by_side = {
        name: _joined(name, [batch[name] for batch in inputs], rows, pad) for name in inputs[0]
    }
    return GroupedBatch(side_by_side, rows)


def with_decoder_inputs(model: CausalModel, batch: Batch) -> Arguments:
    """Return the batch without labels; of an encoder-decoder, with the inputs that they make."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    if is_encoder_decoder(model) and "decoder_input_ids" not in inputs and "labels" in batch:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise UnsupportedError(
                f"{type(model).__name__} does not say how labels become decoder_input_ids: add "
                "them to the batches"
            )
        inputs["decoder_input_ids"] = shift(labels=batch["labels"])
    return inputs


def rows_of(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def _joined(name: str, values: Sequence[Any], rows: int, pad: int) -> object:
    first = values[0]
    if not isinstance(first, Tensor):
        if any(value != first for value in values):
            raise InputError(
                f"{name} differs between the batches of adapters that train together, and is no "
                "tensor"
            )
        return first
    widths = {value.shape[1:] for value in values}
    if len(widths) > 1:
        if name not in PADDED or first.dim() != 2:
            raise InputError(
                f"{name} has another shape in each batch, {sorted(map(tuple, widths))}, and cannot "
                "be padded: give adapters that train together inputs of one shape"
            )
        width, fill = max(shape[0] for shape in widths), pad if name.endswith("input_ids") else 0
        # on the right, whatever the side of the tokenizer: positions of the rest stay as they are
        values = [F.pad(value, (0, width - value.shape[1]), value=fill) for value in values]
    # a real row: one that is all padding could give NaN in the softmax of attention
    filled = [torch.cat([v, v[:1].expand(rows - len(v), *v.shape[1:])]) for v in values]
    return torch.cat(filled)


def room_for(batches: Sequence[Batch]) -> int:
    """Return how many adapters with such batches have about `TOKENS` tokens in a pass."""
    mean = sum(map(tokens_of, batches)) / len(batches)
    return max(1, int(TOKENS // max(1.0, mean)))


def tokens_of(batch: Batch) -> int:
    """Return the tokens of a batch, padding included; the patches of an image are not known."""
    ids = batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else TOKENS


def part(output: Mapping[str, object], k: int, rows: int, batch: Batch) -> dict[str, Tensor]:
    """Return adapter k's part of an output, of the shapes that its batch alone would give.

    Args:
        output: of the model for the joined inputs.
        k: number of the adapter.
        rows: N of the joined inputs.
        batch: of this adapter.
    """
    count, labels = rows_of(batch), batch.get("labels")
    wide = labels if isinstance(labels, Tensor) and labels.dim() == 2 else batch.get("input_ids")
    found = {}
    for name, value in output.items():
        if not isinstance(value, Tensor) or not name.endswith("logits"):
            continue
        own = value[k * rows : k * rows + count]
        # [rows, tokens, labels], or [rows, tokens] of question answering
        per_token = own.dim() == 3 or name in ("start_logits", "end_logits")
        if per_token and wide is not None and own.shape[1] > wide.shape[1]:
            own = own[:, : wide.shape[1]].contiguous()
        found[name] = own
    return found


def loss_of(model: CausalModel, output: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Return the loss that a model of transformers computes from these logits, 0-d.

    Args:
        model: the base model of an adapter.
        output: its logits by name, from `part`.
        batch: with labels.
    """
    labels = {name: batch[name] for name in LABELS if name in batch}
    if is_encoder_decoder(model) and "logits" in output and output["logits"].dim() == 3:
        # such models compute it inline; labels are not shifted
        logits = output["logits"]
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels["labels"].reshape(-1))
    # of transformers, by the class of the model; it takes some of these by name
    function = model.loss_function
    given = {**output, **labels, "config": model.config}
    if "logits" in output:
        given |= {"pooled_logits": output["logits"], "vocab_size": output["logits"].shape[-1]}
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in given.items() if name in taken})


@torch.no_grad()
def check_loss(model: PeftModel, batch: Batch) -> None:
    """Raise UnsupportedError unless `loss_of` is the loss that the model itself computes.

    Also for batches whose rows cannot be padded or told apart by the model alone.

    Args:
        model: a PeftModel, which is called in evaluation mode.
        batch: with labels.
    """
    if "position_ids" in batch and "attention_mask" not in batch:
        raise UnsupportedError(
            f"{sorted(batch)}: rows of packed texts have no mask that could be padded, so train "
            "such adapters one by one"
        )
    if ARGUMENT in batch:
        raise UnsupportedError(
            f"{ARGUMENT} of a batch are not passed on to several adapters: train them one by one"
        )
    base = base_of(model)
    kind = getattr(base, "loss_type", None)
    is_own = vars(base).get("_loss_function") is None  # not that of a task
    is_known = is_own and (is_encoder_decoder(base) or kind in LOSS_MAPPING)
    training = model.training
    model.eval()
    try:
        output = model(**batch)
    finally:
        model.train(training)
    # compared on logits of the same pass, so that dropout has no part in it
    own = output.get("loss")
    if own is not None and is_known:
        found = part(output, 0, rows_of(batch), batch)
        if found and torch.allclose(loss_of(base, found, batch), own, rtol=1e-4, atol=1e-5):
            return
    raise UnsupportedError(
        f"the loss of {type(base).__name__} is not one that is known from its logits, so the rows "
        "of several adapters cannot be told apart in it: train its adapters one by one"
    )
