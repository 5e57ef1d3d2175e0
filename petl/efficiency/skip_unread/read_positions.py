"""Positions that nothing reads: a classifier reads one of its last block, a causal LM the labelled.

Which position a classifier reads is known for its class: the first ([CLS]), or the last token that
is no padding. Its last block computes no others (petl/efficiency/skip_unread/block_positions.py);
causal LMs are in petl/efficiency/skip_unread/labelled_positions.py.
"""

import inspect
import sys
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from petl.core.compat import BaseTunerLayer, ModulesToSaveWrapper
from petl.core.layers.class_swap import SwappedClass, original_class, swap_class
from petl.core.support import Capability
from petl.core.tuners.asking import computes_by_position
from petl.core.types import Arguments, base_of
from petl.efficiency.rewrite import Rewrite, Value
from petl.efficiency.skip_unread.block_positions import (
    Attention,
    Block,
    may_skip,
    prepare,
    read_at,
    refusal_of_block,
)
from petl.efficiency.skip_unread.labelled_positions import LabelReader, is_causal, read_labelled

# Classifiers that read the first position, with the module that picks it and its class; None: the
# model's own forward.
FIRST: dict[str, tuple[str, str] | None] = {
    "BertForSequenceClassification": ("bert.pooler", "BertPooler"),
    "RobertaForSequenceClassification": ("classifier", "RobertaClassificationHead"),
    "XLMRobertaForSequenceClassification": ("classifier", "XLMRobertaClassificationHead"),
    "CamembertForSequenceClassification": ("classifier", "CamembertClassificationHead"),
    "ElectraForSequenceClassification": ("classifier", "ElectraClassificationHead"),
    "DistilBertForSequenceClassification": None,
    "ViTForImageClassification": None,
    "DeiTForImageClassification": None,
}


def _predicts_tokens(base: nn.Module) -> bool:
    """Return True for a causal LM with logits over a vocabulary."""
    has_logits = isinstance(base, PreTrainedModel) and base.get_output_embeddings() is not None
    return has_logits and is_causal(base)


def _refusal_of_tuner(model: PeftModel) -> str:
    """Return why the adapters of a model may read all positions; "" if they do not."""
    if computes_by_position(model):
        return ""
    return f"{type(model.base_model).__name__} may read all positions"


def _refusal(base: nn.Module) -> str:
    """Return why the last block of a classifier cannot be computed at one position, or ""."""
    if not isinstance(base, PreTrainedModel) or _position(base) is None:
        return f"it is not known which positions the head of {type(base).__name__} reads"
    return refusal_of_block(base)


def _position(base: PreTrainedModel) -> str | None:
    """Return the position that a classifier reads, "first" or "last"; None if it is not known."""
    cls: type[PreTrainedModel] = original_class(base)
    if isinstance(base, GenericForSequenceClassification):
        own = inspect.unwrap(cls.forward) is inspect.unwrap(
            GenericForSequenceClassification.forward
        )
        return "last" if own and isinstance(_unwrapped(base.score), nn.Linear) else None
    if cls.__name__ not in FIRST or not cls.__module__.startswith("transformers.models."):
        return None
    reader = FIRST[cls.__name__]
    if reader is not None:
        path, name = reader
        module = _unwrapped(base.get_submodule(path))
        # a head of another class may read all tokens
        if type(module) is not getattr(sys.modules[cls.__module__], name, None):
            return None
    return "first"


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


class _Classifier(SwappedClass):
    """Mixin for a classifier whose last block is a `Block`.

    Attributes:
        last_block: path of that block.
    """

    last_block: str

    def forward(self: Any, *args: object, **kwargs: object) -> object:
        block = self.get_submodule(self.last_block)
        positions = _positions(self, kwargs) if may_skip(self, block, kwargs) else None
        if isinstance(positions, Tensor):  # a decoder, which would fill a cache that nothing reads
            kwargs = {"use_cache": False, **kwargs}
        with read_at(block, positions):
            return super().forward(*args, **kwargs)


def _positions(base: PreTrainedModel, kwargs: Arguments) -> Tensor | str | None:
    """Return the positions that are read, [B, P] int64, or "first"; None: they are not known."""
    if _position(base) == "first":
        return "first"
    ids, pad = kwargs.get("input_ids"), base.config.get_text_config().pad_token_id
    if ids is None:
        return None
    if pad is None:  # a single row; its last token
        return torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)
    # as the model: the rightmost token that is no padding, the first if all are
    order = torch.arange(ids.shape[1], device=ids.device)
    return (order * (ids != pad)).argmax(-1, keepdim=True)


class SkipUnread(Rewrite):
    """Leaves out positions that nothing reads.

    A classifier computes its last block at the position that its head reads, and at no others. A
    causal LM computes head and loss at the positions that have a label, and so does the last block
    of Llama and its kin; logits of a training pass with labels are then None.

    `petl train` does this with `train.skip_unread`. A pass runs as before if it asks for hidden
    states or attentions, has a cache or an unknown mask, if a part of the block has hooks, and
    under torch.compile. Gradients and checkpointing are as before.
    """

    capability = Capability.SKIP
    lacks = {Capability.EXTRA_LOSS: "an extra loss reads all positions"}
    saves = "positions that nothing reads are left out"
    tries = True
    mixins = (_Classifier, LabelReader, Block, Attention)

    def refusal(self, model: nn.Module, value: Value = True) -> str:
        """Return what may read all positions: adapters, an extra loss, or the model itself."""
        if not isinstance(model, PeftModel):
            return f"{type(model).__name__} is no PeftModel"
        base = base_of(model)
        excluded, reason = super().refusal(model, value), _refusal_of_tuner(model)
        if excluded:
            return excluded
        if not _predicts_tokens(base):
            return reason or _refusal(base)
        head = base.get_output_embeddings()
        # they may count tokens in the blocks, which the head in evaluation does not touch
        return reason if any(isinstance(m, BaseTunerLayer) for m in head.modules()) else ""

    def change(self, model: Any, value: Value = True) -> int:
        """Swap the classes of the model, and of its last block where that is possible."""
        base = base_of(model)
        if _predicts_tokens(base):
            read_labelled(base, by_position=not _refusal_of_tuner(model))
        else:
            swap_class(base, _Classifier)
            cast(_Classifier, base).last_block = prepare(base)
        return 1
