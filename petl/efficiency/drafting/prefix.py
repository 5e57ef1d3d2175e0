"""The prefix layer of draft heads: one decoder layer over the states of all tokens so far.

It is the Hydra++ variant of Ankner et al. 2024 (arXiv:2402.05109). Shapes: N tokens, S tokens in
its cache, H width.
"""

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from petl.core.layers.class_swap import original_class
from petl.core.model.structure import blocks, is_causal
from petl.core.types import Arguments, CausalModel
from petl.efficiency.drafting.tree import tree_mask
from petl.efficiency.in_place_cache import cache_argument, write_in_place
from petl.errors import UnsupportedError

CLOSING = ("o_proj", "down_proj")  # the last linear layers of attention and MLP


def prefix_layer(model: CausalModel) -> nn.Module:
    """Build a decoder layer of the model's own shape in float32, which returns its input at first.

    Raises:
        UnsupportedError: its blocks are not like those of Llama.
    """
    block = next((module for _, module in blocks(model) if is_causal(module)), None)
    kind: Any = None if block is None else original_class(block)
    accepted = {} if kind is None else inspect.signature(kind.forward).parameters
    if "position_embeddings" not in accepted or not hasattr(model.base_model, "rotary_emb"):
        raise UnsupportedError(
            f"prefix=True builds a decoder layer as Llama has them, with rotary positions, and "
            f"{type(model).__name__} has others; leave prefix=False"
        )
    config = copy.deepcopy(model.config.get_text_config())
    config._attn_implementation = "sdpa"  # takes the mask of `Prefix`
    layer = kind(config, layer_idx=0).float()
    layer.apply(model._init_weights)
    closing = [m for name, m in layer.named_modules() if name.rpartition(".")[2] in CLOSING]
    if len(closing) != len(CLOSING):
        raise UnsupportedError(
            f"prefix=True needs blocks with {' and '.join(CLOSING)}, and those of "
            f"{type(model).__name__} have {len(closing)} such layers; leave prefix=False"
        )
    for module in closing:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    return layer


class Prefix:
    """The layer at work: it reads states of new tokens behind those in its cache.

    Attributes:
        known: the number of tokens up to the last one that it has read.
    """

    def __init__(self, layer: nn.Module, model: CausalModel) -> None:
        self.layer, self.rotary = layer, cast(nn.Module, model.base_model.rotary_emb)
        self.cache_name = cache_argument(layer)
        self.clear()

    def clear(self) -> None:
        """Forget the text."""
        self.cache = write_in_place(DynamicCache())
        self.known = 0

    def read(self, states: Tensor, first: int) -> Tensor:
        """Read states of the tokens from number `first` on, and return its outputs, [N, H]."""
        past = self.cache.get_seq_length()
        found = self._run(states, first, past, {self.cache_name: self.cache, "use_cache": True})
        self.known = first + len(states)
        return found

    def whole(self, states: Tensor) -> Tensor:
        """Return its outputs for the states of a whole text, [N, H]."""
        return self._run(states, 0, 0, {self.cache_name: None})

    def _run(self, states: Tensor, first: int, past: int, more: Arguments) -> Tensor:
        places = torch.arange(first, first + len(states), device=states.device)[None]
        mask = tree_mask(range(len(states) - 1), past, states.dtype, states.device)
        found = self.layer(
            states[None],
            attention_mask=mask,
            position_ids=places,
            position_embeddings=self.rotary(states[None], places),
            **more,
        )
        return (found[0] if isinstance(found, tuple) else found)[0]
