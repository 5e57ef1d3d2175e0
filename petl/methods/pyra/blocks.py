"""The forms of blocks and of attention that token merging can run, and attention with its keys."""

from inspect import unwrap
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from petl.core.layers.class_swap import SwappedClass, original_class
from petl.errors import ModuleKindError

# What `forward` reads, in order of use (its code's co_names): a class with just these computes
# what `PyraAdapter.with_base` and `KeyedAttention.forward` compute.
BLOCK = ("layernorm_before", "attention", "dropout", "layernorm_after", "mlp")
ATTENTION = (
    "shape", "head_dim", "q_proj", "view", "transpose", "k_proj", "v_proj",
    "ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation",
    "eager_attention_forward", "training", "attention_dropout", "scaling", "reshape", "contiguous",
    "o_proj",
)  # fmt: skip
KEYS = "petl_keys"  # keyword of attention: a list to which it appends its keys


class KeyedAttention(SwappedClass):
    """Mixin for the class of an attention module that can return its keys."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        keys: list[Tensor] | None = kwargs.pop(KEYS, None)
        if keys is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys.append(key.detach().mean(-2))  # over heads
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,
            _forward_of(original_class(self)).__globals__["eager_attention_forward"],
        )
        output, weights = attend(
            self,
            *(part.transpose(1, 2) for part in (query, key, value)),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2).contiguous()), weights


def check_form(path: str, block: nn.Module) -> None:
    """Raise ModuleKindError for a block that does not compute what ViT's, DeiT's and AST's do."""
    cls = original_class(block)
    attention = getattr(block, "attention", None)
    for module, names in ((block, BLOCK), (attention, ATTENTION)):
        if module is None or not _has_form(original_class(module), names):
            raise ModuleKindError(
                f"{path} is {cls.__name__}, and pyra runs the parts of a block itself, in a form "
                "that it knows: those of ViT, DeiT and AST in transformers; use another method, or "
                "a model of these"
            )


def _has_form(cls: type, names: tuple[str, ...]) -> bool:
    code = getattr(_forward_of(cls), "__code__", None)
    return code is not None and code.co_names == names


def _forward_of(cls: type) -> Any:
    forward = getattr(cls, "forward", None)
    return None if forward is None else unwrap(forward)  # transformers wraps it, to checkpoint
