"""The labelled positions of a causal LM: head, loss and last block compute no others.

Training on answers labels a part of the tokens. The head gets the hidden states of the positions
that predict a labelled token, and the loss is the model's own over them. In Llama and its kin, the
last block computes queries, output projection and MLP at these positions
(petl/efficiency/skip_unread/block_positions.py). Loss and gradients are the model's own up to
rounding.

The number of these positions is the shape of what is computed, so the host has to know it: on a GPU
a pass waits, before its first block, for the labels that it was given and for the step before. The
collator knows the number too, but the loss, segmented or the model's own, gets labels alone, from
any loop: what is chosen beforehand would have to pass through model, PEFT and DDP unchanged.

Shapes: B rows, T tokens, H width of the hidden states, N labelled positions of the batch, P of the
row that has most, V entries of the vocabulary.
"""

import inspect
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from petl.core.layers.class_swap import (
    SwappedClass,
    original_class,
    swap_class,
    with_signature,
)
from petl.core.types import Arguments, CausalModel
from petl.efficiency.segment_loss import (
    decoder_of,
    is_segmented,
    is_training,
    refusal_of_loss,
    signature_of,
)
from petl.efficiency.skip_unread.block_positions import (
    is_observed,
    may_skip,
    prepare,
    read_at,
    refusal_of_block,
)
from petl.ops import IGNORED
from petl.ops.segmented_loss import shifted

# above this share of the positions, gathering them costs what they save (assumption)
MOST = 0.75
# what a decoder may call after its blocks, and a causal LM after its decoder
DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
OUTSIDE = {"model", "lm_head"}


def is_causal(base: nn.Module) -> bool:
    """Return True if a model computes the loss of next tokens from logits at each position."""
    if refusal_of_loss(base):
        return False
    # labels of the positions that count are passed on to the loss
    arguments = signature_of(base).parameters.values()
    return any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments)


def read_labelled(base: CausalModel, *, by_position: bool) -> None:
    """Compute head and loss, and where possible the last block, at labelled positions.

    Args:
        base: a causal LM.
        by_position: False: its adapters may read all positions, but not in the head.
    """
    swap_class(base, LabelReader)
    reader = cast(LabelReader, base)
    reader.reads_labels = by_position
    may_prepare = by_position and _is_by_position(base) and not refusal_of_block(base)
    reader.last_block = prepare(base) if may_prepare else None


def _is_by_position(base: CausalModel) -> bool:
    """Return True if all that follows the last block of a model computes single positions."""
    decoder = decoder_of(base)
    known = original_class(base).__module__.startswith("transformers.models.")
    if decoder is None:
        return False
    inside, outside = ({name for name, _ in m.named_children()} for m in (decoder, base))
    return known and inside <= DECODER and outside <= OUTSIDE


class LabelReader(SwappedClass):
    """Mixin for a causal LM.

    Attributes:
        last_block: path of a last block that can compute single positions; None: it cannot.
        reads_labels: True if a training pass may compute the labelled positions alone.
        wanted: positions whose logits `logits_at` asks for, [B, T] bool.
    """

    last_block: str | None
    reads_labels: bool
    wanted: Tensor | None = None

    @classmethod
    def extra_methods(cls, original: type[Any]) -> Arguments:
        """Forward, with the arguments of the model's own."""
        return {"forward": with_signature(cls.forward, original.forward)}

    def forward(self: Any, *args: object, **kwargs: Any) -> object:
        own, trains = super().forward, self.reads_labels and is_training(self, kwargs)
        if self.wanted is None and not trains:
            return own(*args, **kwargs)
        if trains:
            given = kwargs.get("shift_labels")
            targets = shifted(kwargs["labels"]) if given is None else given
            wanted = targets != kwargs.get("ignore_index", IGNORED)
            # a segmented loss leaves out the other positions itself, and reads no logits
            narrows = not (is_segmented(self, kwargs) or _head_is_observed(self))
            if narrows:
                kwargs["shift_labels"] = targets[wanted][None]
        else:
            wanted, narrows = self.wanted, True
        with ExitStack() as inside:
            if narrows:
                inside.enter_context(_narrowed(self, wanted))
            block = None if self.last_block is None else self.get_submodule(self.last_block)
            if block is not None and may_skip(self, block, kwargs):
                positions = positions_of(wanted)
                if positions is not None:
                    inside.enter_context(read_at(block, positions))
                    # no cache of keys and values, which nothing would read
                    kwargs = {"use_cache": False, **kwargs}
            output = own(*args, **kwargs)
        if trains:
            output["logits"] = None  # those of some positions could be taken for those of all
        return output

    @contextmanager
    def logits_at(self: Any, labels: Tensor) -> Generator[Tensor | None]:
        """In the block, passes without labels compute logits at the positions that predict a label.

        Args:
            labels: of the batch, [B, T]; -100: none.

        Yields:
            These positions, [B, T] bool, of which the logits are [1, N, V]; None: of all, as ever.
        """
        if _head_is_observed(self):
            yield None
            return
        self.wanted = shifted(labels) != IGNORED
        try:
            yield self.wanted
        finally:
            self.wanted = None


def positions_of(wanted: Tensor) -> Tensor | None:
    """Return the positions to compute, [B, P] int64; None: all.

    Rows with fewer labels than P also compute others, each position once.

    Args:
        wanted: [B, T] bool.
    """
    count = int(wanted.sum(1).max())
    if not 0 < count <= MOST * wanted.shape[1]:
        return None
    # stable: wanted positions first, both kinds in the order of the text
    return (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def _head_is_observed(base: CausalModel) -> bool:
    """Return True if a hook reads what the head gets: PEFT's of rows with adapters, or yours."""
    return any(map(is_observed, base.get_output_embeddings().modules()))


@contextmanager
def _narrowed(base: CausalModel, wanted: Tensor) -> Generator[None]:
    """In the block, the head gets the wanted positions alone: [1, N, H] of [B, T, H]."""

    def narrow(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # virtual tokens of a prompt come before those that may have labels
        hidden = args[0][:, -wanted.shape[1] :]
        return (hidden[wanted][None], *args[1:])

    hook = base.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
