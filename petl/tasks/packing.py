"""Several texts in one row, each of which knows nothing of the others.

Positions start anew with each text. By that transformers (5.24) tells packed texts apart and keeps
attention inside them, but only in a call without attention mask and without a cache; with either it
attends across texts and does not say so. Methods look at the mask, so batches have one, and
`keep_texts_apart` takes it away where the model's body is called. What a model makes of it all is
tried out before training.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.errors import InputError
from petl.tasks.rows import IGNORED, Pad, Row

LEAK = 1e-4  # of what a change does to its own text: as much may reach another by rounding
APART = 0.05  # of the outputs' norm, by which a text may differ behind another, in bfloat16 too


@dataclass
class Block:
    """A row of whole texts and of pieces of texts, end to end.

    Attributes:
        ids: tokens.
        labels: the same, but IGNORED where a text begins: nothing is known that it follows from.
        positions: of each token in its text, or in the piece of it that is in this row.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]


def pack(texts: Iterable[Sequence[int]], length: int) -> Iterator[Block]:
    """The texts end to end, cut into blocks of `length` tokens, the last with what is left."""
    block = Block([], [], [])
    for text in texts:
        start = 0
        while start < len(text):
            piece = text[start : start + length - len(block.ids)]
            block.labels += [IGNORED if block.ids else piece[0], *piece[1:]]
            block.ids += piece
            block.positions += range(len(piece))
            start += len(piece)
            if len(block.ids) == length:
                yield block
                block = Block([], [], [])
    if block.ids:
        yield block


def batch_of_blocks(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, and if a row has several texts `position_ids`."""
    batch = {**pad.inputs(rows), "labels": pad.stack(rows, "labels", IGNORED)}
    if any(row["position_ids"][-1] + 1 < len(row["input_ids"]) for row in rows):
        batch["position_ids"] = pad.stack(rows, "position_ids", 0)  # padding: texts of one token
    return batch


def keep_texts_apart(model: Any) -> None:
    """Let a transformers model attend inside each text of a batch with `position_ids`."""
    model.petl_packs = True
    model.base_model.register_forward_pre_hook(by_positions, with_kwargs=True)


def by_positions(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook: texts are told apart by positions alone, except while it generates."""
    generates = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
    if generates or kwargs.get("position_ids") is None:
        return None
    given = {**kwargs, "attention_mask": None, "use_cache": False}
    if "flash" in str(module.config._attn_implementation):
        given |= borders(kwargs["position_ids"])
    return args, given


def borders(positions: Tensor) -> dict[str, Any]:
    """Where texts begin in [B, T] positions laid end to end, as flash attention takes it.

    transformers finds that out by itself only for batches of one row.
    """
    starts = (positions.flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([positions.numel()])]).int()
    length = positions.shape[1]  # no text is longer
    names = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    return {**names, "max_length_q": length, "max_length_k": length}


@torch.no_grad()
def check_texts_apart(model: nn.Module, base: PreTrainedModel) -> None:
    """Raise InputError if what `model` makes of a text depends on what is packed in front of it.

    `base` is the model that `keep_texts_apart` was told of, in `model` or itself.
    """
    embedding = base.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    draw, device = torch.Generator().manual_seed(0), embedding.device
    before, text = (torch.randint(len(embedding), (2, 5), generator=draw) for _ in range(2))
    text = text[:1].expand(2, -1)  # the same behind two others
    positions = torch.arange(5).repeat(2, 2)
    was_training = model.training
    model.eval()
    packed = logits(model, torch.cat([before, text], 1), positions, device)
    alone = logits(model, text[:1], positions[:1, :5], device)[0]
    model.train(was_training)
    first, second = packed[0] - packed[1], packed[:, 5:]
    leak = first[5:].norm() / first[:5].norm().clamp(min=torch.finfo(first.dtype).tiny)
    apart = (second - alone).norm() / second.norm()
    if not (leak <= LEAK and apart <= APART):
        raise InputError(
            f"texts cannot be packed: what {type(base).__name__} makes of a text depends on the "
            f"one in front of it (by {100 * apart:.1g} %); use data.pack=false"
        )


def logits(model: nn.Module, ids: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    """The outputs of rows without padding, [B, T, V] float32."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    found = model(**{name: t.to(device) for name, t in batch.items()}).logits.float()
    return found[:, -ids.shape[1] :]  # without virtual tokens in front
