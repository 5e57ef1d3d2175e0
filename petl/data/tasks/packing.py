"""Packing: several texts in one row, without attention between them.

Positions start at 0 with each text. transformers (5.24) recognizes packed texts by these positions
and restricts attention to each text, but only in a call without attention mask and without cache;
with either it attends across texts silently. Methods read the mask, so batches have one, and
`isolate_packed_texts` removes it where the model's body is called. Before training,
`check_packed_texts_isolated` tests whether a model keeps the texts apart.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.types import Arguments
from petl.data.batch_sampler import best_fit
from petl.data.tasks.base import IGNORED, Pad, Row
from petl.errors import InputError

# Tolerances; assumptions, above rounding errors and below what attention across texts causes.
LEAK = 1e-4  # effect of a change on the next text, relative to its own text
APART = 0.05  # difference between a text packed and alone, relative to the outputs; for bfloat16


@dataclass
class PackedRow:
    """A row of complete texts and pieces of texts, concatenated.

    Attributes:
        ids: tokens.
        labels: the same, but IGNORED where a text begins: no context predicts its first token.
        positions: position of each token in its text, or in the piece of the text in this row.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]


def pack(texts: Iterable[Sequence[int]], length: int) -> list[PackedRow]:
    """Lay texts side by side in blocks of at most `length` tokens; only longer texts are cut.

    By best fit decreasing (Ding et al. 2024, Fewer Truncations Improve Language Modeling,
    arXiv:2404.10830).
    """
    pieces = [text[i : i + length] for text in texts for i in range(0, len(text), length)]
    blocks = best_fit([*map(len, pieces)], length)
    return [joined([pieces[i] for i in numbers]) for numbers in blocks]


def joined(pieces: Iterable[Sequence[int]]) -> PackedRow:
    """Return the block of texts and pieces of texts."""
    block = PackedRow([], [], [])
    for piece in pieces:
        block.labels += [IGNORED if block.ids else piece[0], *piece[1:]]
        block.ids += piece
        # from 0 also for the second piece of a text: the first is in another row
        block.positions += range(len(piece))
    return block


def batch_of_blocks(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, and `position_ids` if a row has several texts."""
    batch = {**pad.inputs(rows), "labels": pad.stack(rows, "labels", IGNORED)}
    if any(row["position_ids"][-1] + 1 < len(row["input_ids"]) for row in rows):
        batch["position_ids"] = pad.stack(rows, "position_ids", 0)  # each padding token is a text
    return batch


def isolate_packed_texts(model: PreTrainedModel) -> None:
    """Make a transformers model attend within each text of a batch with `position_ids`."""
    vars(model)["petl_packs"] = True
    # on the body, since a method may read the mask before it
    model.base_model.register_forward_pre_hook(by_positions, with_kwargs=True)


def by_positions(
    module: PreTrainedModel, args: tuple[object, ...], kwargs: Arguments
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """Forward pre-hook: remove the attention mask of packed batches, except in generation."""
    generates = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
    if generates or kwargs.get("position_ids") is None:
        return None
    arguments = {**kwargs, "attention_mask": None, "use_cache": False}
    # other implementations derive a block-diagonal mask from the positions
    if "flash" in str(module.config._attn_implementation):
        arguments |= text_boundaries(kwargs["position_ids"])
    return args, arguments


def text_boundaries(positions: Tensor) -> dict[str, object]:
    """Boundaries of texts in flattened positions [B, T], as arguments of flash attention.

    transformers derives them itself only for batches of one row.
    """
    starts = (positions.flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([positions.numel()])]).int()
    length = positions.shape[1]  # no text is longer
    names = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    return {**names, "max_length_q": length, "max_length_k": length}


@torch.no_grad()
def check_packed_texts_isolated(model: nn.Module, base: PreTrainedModel) -> None:
    """Raise InputError if the outputs for a text depend on the text packed before it.

    Args:
        model: the model, with or without adapters.
        base: the model in it for which `isolate_packed_texts` was called; may be `model` itself.
    """
    embedding = base.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    generator, device = torch.Generator().manual_seed(0), embedding.device
    before, text = (torch.randint(len(embedding), (2, 5), generator=generator) for _ in range(2))
    text = text[:1].expand(2, -1)  # the same text after two different ones
    positions = torch.arange(5).repeat(2, 2)
    was_training = model.training  # dropout would change the outputs
    model.eval()
    packed = logits(model, torch.cat([before, text], 1), positions, device)
    alone = logits(model, text[:1], positions[:1, :5], device)[0]
    model.train(was_training)
    # effect of another first text: on itself (5 tokens), and on the second, which must not change
    first, second = packed[0] - packed[1], packed[:, 5:]
    leak = first[5:].norm() / first[:5].norm().clamp(min=torch.finfo(first.dtype).tiny)
    apart = (second - alone).norm() / second.norm()
    # written so that NaN fails
    if not (leak <= LEAK and apart <= APART):
        raise InputError(
            f"{type(base).__name__} cannot train on packed texts: its outputs for a text depend on "
            f"the text before it (by {100 * apart:.1g} %); use data.pack=false"
        )


def logits(model: nn.Module, ids: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    """The logits of rows without padding, [B, T, V] float32."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    outputs = model(**{name: t.to(device) for name, t in batch.items()}).logits.float()
    return outputs[:, -ids.shape[1] :]  # without virtual tokens that a method prepends
