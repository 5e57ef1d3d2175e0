"""The last block of a model at some positions: it computes what is read, and nothing else.

Queries, output projection and MLP of the block run at these positions alone; keys and values run at
all. The block's own forward is called with the hidden states of these positions, and its attention,
whose formula is repeated here, takes keys and values from all of them. At the other positions the
output of the block is zero.

Blocks are recognized by the names in their code; others are left alone. Outputs and gradients are
the model's own up to rounding. Dropout in that block draws masks for the positions that are
computed: of the same distribution, but other draws.

Shapes: B rows, T tokens, H width of the hidden states, P positions that are read, D width of an
attention head.
"""

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.layers.class_swap import SwappedClass, forward_code, original_class, swap_class
from petl.core.masks import CACHES
from petl.core.types import Arguments
from petl.ops.low_rank import has_no_hooks, hooks_of

ATTENTIONS = ("sdpa", "eager")  # implementations that take a mask of [B, 1, P, T]


class Form(NamedTuple):
    """A kind of block, recognized by its code.

    Attributes:
        attention: path of its self-attention.
        norm: name of the norm before the attention; None: it reads the block's input.
        projections: names of the layers of queries, keys and values.
        output: name of the attention's own output projection; None: it has none.
        names: by path of a part, the names that its forward reads, separated by spaces.
    """

    attention: str
    norm: str | None
    projections: tuple[str, str, str]
    output: str | None
    names: Mapping[str, str]


# names that have no part in a pass without a cache, and of the window that the mask has as well
UNUSED = (
    "update layer_idx isinstance EncoderDecoderCache self_attention_cache sliding_window getattr"
)
ATTEND = (
    "shape view transpose ALL_ATTENTION_FUNCTIONS get_interface config _attn_implementation "
    "eager_attention_forward training scaling reshape contiguous"
)
BERT_OUTPUT = "dense dropout LayerNorm"
QKV = ("q_proj", "k_proj", "v_proj")
HEADS = "q_proj k_proj v_proj o_proj head_dim attention_dropout"
FORMS = (
    # BERT, RoBERTa, ELECTRA
    Form(
        "attention.self",
        None,
        ("query", "key", "value"),
        None,
        {
            "": (
                "attention is_decoder hasattr ValueError crossattention apply_chunking_to_forward "
                "feed_forward_chunk chunk_size_feed_forward seq_len_dim"
            ),
            "attention": "is_cross_attention self output",
            "attention.self": f"{ATTEND} query key value attention_head_size dropout p",
            "attention.output": BERT_OUTPUT,
            "intermediate": "dense intermediate_act_fn",
            "output": BERT_OUTPUT,
        },
    ),
    # DistilBERT
    Form(
        "attention",
        None,
        ("q_lin", "k_lin", "v_lin"),
        "out_lin",
        {
            "": "attention sa_layer_norm ffn output_layer_norm",
            "attention": f"{ATTEND} q_lin k_lin v_lin out_lin attention_head_size dropout p",
            "ffn": "apply_chunking_to_forward ff_chunk chunk_size_feed_forward seq_len_dim",
        },
    ),
    # ViT, DeiT
    Form(
        "attention",
        "layernorm_before",
        QKV,
        "o_proj",
        {
            "": "layernorm_before attention dropout layernorm_after mlp",
            "attention": f"{ATTEND} {HEADS}",
            "mlp": "fc1 activation_fn fc2",
        },
    ),
    # Llama, Mistral, Qwen2, Gemma
    Form(
        "self_attn",
        "input_layernorm",
        QKV,
        "o_proj",
        {
            "": "input_layernorm self_attn post_attention_layernorm mlp",
            "self_attn": f"{ATTEND} {HEADS} apply_rotary_pos_emb",
            "mlp": "down_proj act_fn gate_proj up_proj",
        },
    ),
)


def refusal_of_block(base: PreTrainedModel) -> str:
    """Return why the last block of a model cannot compute single positions; "" if it can."""
    if base.config._attn_implementation not in ATTENTIONS:
        return f"attention is {base.config._attn_implementation}, not {' or '.join(ATTENTIONS)}"
    if len(_last_blocks(base)) != 1:
        return f"{type(base).__name__} has no stack of blocks of a known form"
    return ""


def prepare(base: nn.Module) -> str:
    """Let the last block of a model compute single positions; return its path.

    `refusal_of_block` has no reason.
    """
    path = next(iter(_last_blocks(base)))
    block: Any = base.get_submodule(path)
    form = next(form for form in FORMS if _has_form(block, form))
    block.form = form  # kept: FSDP2 puts a class of its own before the others
    swap_class(block.get_submodule(form.attention), Attention)
    swap_class(block, Block)
    return path


def _last_blocks(base: nn.Module) -> list[str]:
    """Return the path of the last block of each stack of blocks of a known form."""
    stacks = {path: m for path, m in base.named_modules() if isinstance(m, nn.ModuleList) and m}
    return [
        f"{path}.{len(m) - 1}"
        for path, m in stacks.items()
        if any(_has_form(m[-1], form) for form in FORMS)
    ]


def _has_form(block: nn.Module, form: Form) -> bool:
    # at other than all positions, a block of a decoder with cross-attention, or chunks, would fail
    if getattr(block, "is_decoder", False) or getattr(block, "chunk_size_feed_forward", 0):
        return False
    if getattr(getattr(block, "ffn", None), "chunk_size_feed_forward", 0):
        return False
    for path, names in form.names.items():
        try:
            code = forward_code(block.get_submodule(path))
        except AttributeError:  # no such part
            return False
        # equal, not a subset: a family that reads one more name does what is not repeated here
        if code is None or set(code.co_names) - set(UNUSED.split()) != set(names.split()):
            return False
    return True


def may_skip(base: PreTrainedModel, block: nn.Module, kwargs: Arguments) -> bool:
    """Return True if nothing in a pass reads other positions of the block or of its parts."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    for name in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(base.config, name, False)):
            return False
    return not any(is_observed(module) for module in block.modules())


def is_observed(module: nn.Module) -> bool:
    """Return True if a call of a module runs more than its class's `forward`, FSDP2's hooks aside.

    Those gather and free weights, at whatever positions the module computes.
    """
    if has_no_hooks(module):
        return False
    hooks = hooks_of(module)
    own = [hook for hook in hooks if not hook.__module__.startswith("torch.distributed.fsdp")]
    return bool(own) or "forward" in module.__dict__ or not hooks


@contextmanager
def read_at(block: Any, positions: Tensor | str | None) -> Generator[None]:
    """Compute a block at these positions in the `with` block; any other call computes all."""
    block.positions = positions
    try:
        yield
    finally:
        block.positions = None


class Block(SwappedClass):
    """Mixin for the last block.

    Attributes:
        form: its kind.
        positions: those to compute, [B, P] or "first"; None: all.
    """

    form: Form
    positions: Tensor | str | None = None

    def __call__(self: Any, *args: object, **kwargs: object) -> object:
        if self.positions is not None:
            # an argument: checkpointing, which computes the block again, keeps it with the others
            kwargs["read_positions"] = self.positions
        return super().__call__(*args, **kwargs)

    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: object,
        read_positions: Tensor | str | None = None,
        **kwargs: object,
    ) -> Any:
        positions = read_positions
        if positions is None or not _has_known_arguments(args, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        B, T, _ = hidden_states.shape
        if isinstance(positions, str):
            positions = torch.zeros(B, 1, dtype=torch.long, device=hidden_states.device)
        form = self.form
        attention = self.get_submodule(form.attention)
        # at all positions, for keys and values; the block repeats it for those that are read
        states = (
            hidden_states if form.norm is None else self.get_submodule(form.norm)(hidden_states)
        )
        attention.reading = _Reading(form, positions, states)
        try:
            y = super().forward(_taken(hidden_states, positions), *args, **kwargs)
        finally:
            del attention.reading
        index = positions[..., None].expand(-1, -1, y.shape[-1])
        return y.new_zeros(B, T, y.shape[-1]).scatter(1, index, y)


class _Reading(NamedTuple):
    """What the attention of a `Block` needs: the form, the positions, all hidden states."""

    form: Form
    positions: Tensor
    states: Tensor


def _has_known_arguments(args: tuple[object, ...], kwargs: Arguments) -> bool:
    mask = args[0] if args else kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        return False
    names = (*CACHES, "encoder_hidden_states")
    return all(value is None for value in args[1:]) and all(kwargs.get(n) is None for n in names)


def _taken(x: Tensor, positions: Tensor) -> Tensor:
    """Return [B, P, H], the values of x [B, T, H] at the positions."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class Attention(SwappedClass):
    """Mixin for the self-attention of a `Block`.

    Attributes:
        reading: set by the block while it computes some positions.
    """

    reading: _Reading | None = None

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.reading is None:
            return super().forward(hidden_states, *args, **kwargs)
        form, positions, states = self.reading
        mask = args[0] if args else kwargs.get("attention_mask")
        owner = sys.modules[original_class(self).__module__]
        D = getattr(self, "head_dim", None) or self.attention_head_size
        xs = (hidden_states, states, states)
        q, k, v = (
            # -1: keys and values have fewer heads than queries in Llama and kin
            getattr(self, name)(x).unflatten(-1, (-1, D)).transpose(1, 2)
            for name, x in zip(form.projections, xs, strict=True)
        )
        if "position_embeddings" in kwargs:
            cos, sin = kwargs["position_embeddings"]
            # no heads of the other, which has another number of positions
            k = owner.apply_rotary_pos_emb(k[:, :0], k, cos, sin)[1]
            at = [_taken(each.expand(len(q), -1, -1), positions) for each in (cos, sin)]
            q = owner.apply_rotary_pos_emb(q, q[:, :0], *at)[0]
        attend = owner.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, owner.eager_attention_forward
        )
        dropout = self.attention_dropout if hasattr(self, "attention_dropout") else self.dropout.p
        out, weights = attend(
            self,
            q,
            k,
            v,
            _mask_at(positions, mask, k.shape[2], is_causal=self.is_causal),
            dropout=dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        out = out.flatten(2).contiguous()
        return (out if form.output is None else getattr(self, form.output)(out)), weights


def _mask_at(
    positions: Tensor, mask: Tensor | None, tokens: int, *, is_causal: bool
) -> Tensor | None:
    """Return the mask [B, 1, P, T] of the queries at some positions; None: they attend to all."""
    if mask is None:
        if not is_causal:
            return None
        # boolean, for sdpa; eager attention adds its mask, but a causal one is always given to it
        order = torch.arange(tokens, device=positions.device)
        return order <= positions[:, None, :, None]
    if mask.shape[2] == 1:  # one for all queries
        return mask
    mask = mask.expand(len(positions), -1, -1, -1)
    index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return mask.gather(2, index)
