"""From demonstrations to directions: one forward pass per text, one decomposition.

Shapes: N demonstrations, B rows of a batch, T tokens, L blocks, H width of the stream.
"""

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.masks import positions_in
from petl.core.model.modes import calibration_pass
from petl.core.model.structure import blocks
from petl.core.spec.config import require
from petl.core.types import Arguments
from petl.errors import InputError
from petl.methods.icv.config import IcvConfig
from petl.methods.icv.steering import direction
from petl.system import collectives as distributed

KEYS = tuple(
    f"{side}_{name}" for side in ("source", "target") for name in ("input_ids", "attention_mask")
)


def directions(model: nn.Module, config: IcvConfig, batches: Iterable[object]) -> Tensor:
    """Return v of all blocks, [L, H] float32 on the CPU, the same on all processes.

    Args:
        model: the base model, or one whose adapters are disabled; left as it was.
        config: for `rank`.
        batches: dicts of `source_input_ids`, `source_attention_mask`, `target_input_ids` and
            `target_attention_mask`, [B, T] each, row i of both being a demonstration. Process p of
            P has demonstrations p, p + P, ...

    Raises:
        InputError: no demonstration, a batch of another form, hidden states that are not finite;
            on all processes, if it is one's.
    """
    own: Tensor | InputError
    try:
        own = differences(model, batches, config.blocks)
    except InputError as error:
        own = error  # the other processes wait for this one
    parts: list[Tensor] = []
    for part in distributed.gathered(own):
        if isinstance(part, InputError):
            raise part
        parts.append(part)
    # in the order of the data, of which the processes have taken turns
    turns = range(max(map(len, parts)))
    rows = [part[turn] for turn in turns for part in parts if turn < len(part)]
    if not rows:
        raise InputError("calibration has no demonstrations; pass at least one batch")
    d = torch.stack(rows)
    return direction(d.flatten(1), config.rank).view_as(d[0])


def differences(model: nn.Module, batches: Iterable[Any], given: str | None = None) -> Tensor:
    """Return d_i of this process's demonstrations, [N, L, H] float32 on the CPU; N may be 0."""
    if callable(batches) or isinstance(batches, str | Mapping):
        raise InputError(
            f"icv takes batches of demonstrations as calibration, and got "
            f"{type(batches).__name__}: pass a list of dicts of {', '.join(KEYS)}"
        )
    found = [torch.empty(0)]
    for batch in batches:
        _check_batch(batch)
        source, target = (
            last_states(model, batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], given)
            for side in ("source", "target")
        )
        found.append(target - source)
    return torch.cat(found[1:]) if found[1:] else found[0]


def _check_batch(batch: object) -> None:
    """Raise InputError unless a batch has the four tensors, of as many rows each."""
    given = batch if isinstance(batch, Mapping) else {}
    missing = [key for key in KEYS if not isinstance(given.get(key), Tensor)]
    if missing:
        has = ", ".join(map(str, given)) or type(batch).__name__
        raise InputError(
            f"a batch of demonstrations has no tensor {', '.join(missing)} (it has {has}); source "
            "and target of row i are the two texts of a demonstration"
        )
    rows = {key: given[key].shape[0] if given[key].dim() == 2 else -1 for key in KEYS}
    if len(set(rows.values())) > 1 or -1 in rows.values():
        shapes = ", ".join(f"{key} {list(given[key].shape)}" for key in KEYS)
        raise InputError(f"a batch of demonstrations needs [rows, tokens] of equal rows: {shapes}")
    for side in ("source", "target"):
        ids, mask = given[f"{side}_input_ids"], given[f"{side}_attention_mask"]
        require(
            ids.shape == mask.shape,
            f"{side}_input_ids {list(ids.shape)} and {side}_attention_mask {list(mask.shape)} "
            "differ in shape",
        )
        require(
            bool((mask != 0).any(1).all()),
            f"a {side} of the demonstrations is empty: its attention mask has no token",
        )


def last_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, given: str | None = None
) -> Tensor:
    """Return the last token's hidden state behind each block, [B, L, H] float32 on the CPU.

    Rows may be padded on either side.

    Args:
        given: path of the list of blocks; None: that with attention.

    Raises:
        InputError: a state is not finite.
    """
    backbone = model.base_model if isinstance(model, PreTrainedModel) else model
    device = next(model.parameters()).device
    mask = (attention_mask != 0).long().to(device)
    last = (mask * torch.arange(mask.shape[1], device=device)).argmax(1)
    options: Arguments = {"use_cache": False}
    if not mask[:, 0].all():
        # padded on the left: from the first token; else as the model counts, from 2 in RoBERTa
        options["position_ids"] = positions_in(mask)
    known = signature(backbone.forward).parameters
    states: list[Tensor] = []

    def keep(block: nn.Module, args: object, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        rows = torch.arange(len(state), device=state.device)
        states.append(state[rows, last.to(state.device)].float().cpu())

    hooks = [block.register_forward_hook(keep) for _, block in blocks(model, given)]
    with calibration_pass(model, hooks):
        backbone(
            input_ids=input_ids.to(device),
            attention_mask=mask,
            **{name: value for name, value in options.items() if name in known},
        )
    found = torch.stack(states, dim=1)
    if not found.isfinite().all():
        block = int((~found.isfinite()).any(2).any(0).nonzero()[0])
        raise InputError(
            f"hidden states of the demonstrations behind block {block} are not finite; check the "
            "model's weights and dtype"
        )
    return found
