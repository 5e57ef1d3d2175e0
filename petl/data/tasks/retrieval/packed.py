"""The texts of a batch side by side in rows: one pass, hardly any padding, no attention between.

N texts, T tokens of the longest one, R rows, W positions of a row.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from petl.core.layers.class_swap import original_class
from petl.data.batch_sampler import best_fit

# Positions of a row at least: a step of MiniLM with LoRA takes least time at 32 and 48 on a CPU,
# at 128 a quarter more, for attention that is masked.
WIDTH = 32
LONGEST = 128  # tokens of a text that is packed; the check is on a text of as many
# relative differences between states; assumptions, above rounding and below attention across texts
EQUAL, EQUAL_16 = 1e-4, 3e-2


class Layout(NamedTuple):
    """Rows of texts; each tensor is [R, W], and -1 where there is none.

    Attributes:
        source: the place of a token in the flattened padded batch, [N T].
        text: the number of its text.
        position: its place in its text.
    """

    source: Tensor
    text: Tensor
    position: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Layout":
        """Return rows of the texts of a padded batch.

        Args:
            mask: 1 for the tokens of a text and 0 for padding, on either side, [N, T].
        """
        lengths = mask.sum(1).tolist()
        rows = best_fit(lengths, max(WIDTH, *lengths))
        places = mask.flatten().nonzero().flatten().cpu().split(lengths)
        layout = torch.full((3, len(rows), max(WIDTH, *lengths)), -1)
        for number, texts in enumerate(rows):
            own = [
                torch.stack([places[i], torch.full((lengths[i],), i), torch.arange(lengths[i])])
                for i in texts
            ]
            tokens = torch.cat(own, 1)
            layout[:, number, : tokens.shape[1]] = tokens
        return cls(*layout.to(mask.device))

    def unpacked(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the states [R, W, D] of tokens as those of the padded batch, [N, T, D].

        Padding has those of some token.
        """
        index = torch.zeros_like(mask).flatten()
        there = (self.source >= 0).flatten()
        index[self.source.flatten()[there]] = there.nonzero().flatten()
        return states.flatten(0, 1)[index].unflatten(0, mask.shape)


@dataclass(frozen=True)
class Packing:
    """How a base model computes rows of texts.

    Attributes:
        first_position: the position id of the first token of a text.
    """

    first_position: int

    def arguments(
        self, base: PreTrainedModel, inputs: Mapping[str, Tensor], layout: Layout
    ) -> dict[str, Tensor]:
        """Return what a pass of `base` gets in place of a padded batch.

        Args:
            inputs: of the batch, each [N, T].
        """
        source = layout.source.clamp(min=0)
        found = {name: tensor.flatten()[source] for name, tensor in inputs.items()}
        found["position_ids"] = layout.position.clamp(min=0) + self.first_position
        # padding attends to padding: a row of attention without any key would be NaN
        mask = layout.text[:, None, :, None] == layout.text[:, None, None, :]
        if base.config._attn_implementation == "eager":  # which adds the mask
            added = torch.zeros_like(mask, dtype=base.dtype)
            mask = added.masked_fill(~mask, torch.finfo(base.dtype).min)
        return {**found, "attention_mask": mask}


def layout_of(mask: Tensor) -> Layout | None:
    """Return rows of the texts of a padded batch; None if they are too long, or save nothing."""
    if mask.shape[1] > LONGEST:
        return None
    layout = Layout.of(mask)
    return layout if layout.source.numel() < mask.numel() else None


@torch.no_grad()
def packing_of(
    base: PreTrainedModel, states_of: Callable[..., Tensor], max_length: int
) -> Packing | None:
    """Return how a base computes several texts in a row as it does each alone; None if it does not.

    Args:
        states_of: the states of a pass of `base`, [N, T, D].
        max_length: tokens of a text at most.
    """
    takes = inspect.signature(original_class(base).forward).parameters
    if base.config._attn_implementation not in ("sdpa", "eager") or "position_ids" not in takes:
        return None
    embedding = base.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    longest = min(LONGEST, max_length)
    lengths = torch.tensor([longest, longest // 2, longest - longest // 2])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(len(embedding), mask.shape, generator=torch.Generator().manual_seed(0))
    # some models count the positions of what is not the padding token
    padding = base.config.get_text_config().pad_token_id or 0
    ids = torch.where(ids == padding, (ids + 1) % len(embedding), ids)
    whole = {"input_ids": torch.where(mask > 0, ids, padding), "attention_mask": mask}
    inputs = {name: tensor.to(embedding.device) for name, tensor in whole.items()}
    was_training = base.training  # dropout would change the states
    base.eval()
    alone = states_of(**inputs)
    found = (Packing(first) for first in (0, padding + 1))
    packing = next((p for p in found if _is_equal(p, base, states_of, inputs, alone)), None)
    base.train(was_training)
    return packing


def _is_equal(
    packing: Packing,
    base: PreTrainedModel,
    states_of: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    alone: Tensor,
) -> bool:
    """Return True if texts in a row have the states that they have alone."""
    mask = inputs["attention_mask"]
    layout = Layout.of(mask)
    try:
        states = layout.unpacked(states_of(**packing.arguments(base, inputs, layout)), mask)
    except (RuntimeError, ValueError, IndexError):  # no mask of pairs, or no such position
        return False
    there = mask > 0
    difference = (states - alone)[there].norm() / alone[there].norm()
    # written so that NaN fails
    return bool(difference <= (EQUAL_16 if alone.dtype.itemsize == 2 else EQUAL))
