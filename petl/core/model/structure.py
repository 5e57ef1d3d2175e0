"""Structure of a base model: transformer blocks, sub-layers, norms, quantized weights."""

import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig, PreTrainedModel

from petl.core.compat import BaseTunerLayer
from petl.core.layers.class_swap import original_class
from petl.core.layers.context import is_encoder_decoder
from petl.core.layers.layer import Adapter, LayerShape, shape_of
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.names import LANGUAGE, candidate_names, language_path, names_of
from petl.core.model.places import Place, is_stack, place
from petl.core.parameters import is_norm
from petl.errors import InputError

logger = logging.getLogger(__name__)

KINDS = ("attn", "cross_attn", "ffn")  # of sub-layers
BLOCK = "block"  # the location of an adapter for a whole block
VALUE = "value"  # the location of an adapter beside the values of cross-attention

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
BLOCK_CLASS = re.compile(r"(Layer|Block)$")
CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)
MIXER = re.compile(r"(mamba|mixer|ssm)\.")  # of a state-space model
QUERIES = (  # names of the projection whose input is the sub-layer's own, the surest first
    "q", "q_proj", "query", "query_proj", "q_lin", "q_attn",
    "in_proj", "c_attn", "qkv_proj", "query_key_value", "Wqkv",
)  # fmt: skip

KEYS = ("k", "k_proj", "key", "key_proj", "k_lin")
VALUES = ("v", "v_proj", "value", "value_proj", "v_lin")
# attributes of attention modules with the width of a head
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_per_head")
NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")

# names of the norms before self-attention and feed-forward; the first pair that a block has counts
PRE_NORMS = (
    ("input_layernorm", "pre_feedforward_layernorm"),
    ("input_layernorm", "pre_mlp_layernorm"),
    ("input_layernorm", "pre_ff_layernorm"),
    ("input_layernorm", "post_attention_layernorm"),
    ("input_layernorm", "input_layernorm"),  # both sub-layers see the same input
    ("pre_self_attn_layernorm", "pre_feedforward_layernorm"),
    ("attention_layernorm", "feedforward_layernorm"),
    ("ln_attn", "ln_mlp"),
    ("ln_1", "ln_2"),
    ("ln_1", "ln_1"),
    ("layernorm_before", "layernorm_after"),
    ("layer_norm1", "layer_norm2"),
    ("norm1", "norm2"),
    ("attn_norm", "mlp_norm"),
)
WITH_SCALE = "transformers.models.ibert"  # its layers return integers and their scale
TOKENS_FIRST = ("LEDEncoderSelfAttention", "LongformerSelfAttention")  # queries of [T, B, K]
CROSS_PRE_NORMS = ("ln_cross_attn", "pre_cross_attn_layernorm")
POST_NORMS = ("attention.output.LayerNorm", "sa_layer_norm")  # in blocks that normalize afterwards
EITHER_NORMS = (  # names for norms before or after the sub-layer: the class of the block decides
    ("self_attn_layer_norm", "final_layer_norm"),
    ("layer_norm", "final_layer_norm"),
)
EITHER_CROSS_NORM = "encoder_attn_layer_norm"
# classes of blocks, by the beginning of their names
NORM_FIRST = re.compile(
    r"Whisper|OPT|MBart|M2M100|Pegasus|BigBirdPegasus|XGLM|BioGpt|Speech2Text|Blenderbot(?!Small)"
    r"|.*StableLayerNorm"
)
NORM_LAST = re.compile(
    r"Bart|Marian|BlenderbotSmall|PLBart|Mvp|LED|Wav2Vec2EncoderLayer|Hubert|WavLM|UniSpeech|SEW"
    r"|Swinv2|Swin2SR"
)


class SubLayer(NamedTuple):
    """One sub-layer of a block; all names are paths in the model.

    Attributes:
        kind: one of `KINDS`.
        closing: the module whose output the block adds to the residual stream: a linear layer, or
            the whole feed-forward module where its weights are experts.
        width: of that output.
        source: the module whose first input is the sub-layer's (in a block that normalizes first,
            the normalized stream); None if not known.
        residual: the module whose first input is the residual stream; None if not known.
        causal: True if the block belongs to a decoder.
    """

    kind: str
    closing: str
    width: int
    source: str | None
    residual: str | None
    causal: bool


class AttentionInfo(NamedTuple):
    """The projections of an attention sub-layer by path, and the width of a head.

    Attributes:
        query, key, value: their outputs are the heads, one after the other; None for one that the
            sub-layer does not have as a layer of its own.
        output: its inputs are the heads.
        head_width: entries of a head; None if it is not known.
    """

    query: str | None
    key: str | None
    value: str | None
    output: str
    head_width: int | None


class _Leaf(NamedTuple):
    path: str  # in the block
    shape: LayerShape
    in_attention: bool


def find_sublayers(model: nn.Module) -> list[SubLayer]:
    """Return the sub-layers of all blocks, adapted or not; empty if the structure is unknown."""
    return [sub for path, block in blocks(model) for sub in _sublayers_of(path, block)]


def value_projections(model: nn.Module) -> list[str]:
    """Return the paths of the projections to values in cross-attention, adapted or not."""
    return [
        f"{path}.{leaf.path}"
        for path, block in blocks(model)
        for leaf in _leaves_by_kind(block)["cross_attn"]
        if leaf.path.rpartition(".")[2] in VALUES
    ]


def encoder_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return path and module of the encoder of an encoder-decoder, else None."""
    if not is_encoder_decoder(model) or not hasattr(model, "get_encoder"):
        return None
    encoder = cast(Any, model).get_encoder()
    return next(((n, m) for n, m in model.named_modules() if n and m is encoder), None)


def find_attention(model: nn.Module) -> list[AttentionInfo]:
    """Return the attention sub-layers of all blocks, adapted or not."""
    found = []
    for path, block in blocks(model):
        parts, width = _leaves_by_kind(block), width_of(block)
        for kind in ("attn", "cross_attn"):
            ends = _ends(kind, parts[kind], block, width)
            if ends is None:
                continue
            by_name = {leaf.path.rpartition(".")[2]: leaf for leaf in parts[kind]}
            names = (QUERIES[: QUERIES.index("in_proj")], KEYS, VALUES)
            three = [next((by_name[n] for n in each if n in by_name), None) for each in names]
            first = next((leaf for leaf in three if leaf is not None), None)
            size = None if first is None else _head_width(block, first)
            paths = [None if leaf is None else f"{path}.{leaf.path}" for leaf in three]
            found.append(AttentionInfo(*paths, f"{path}.{ends[0]}", size))
    return found


def _head_width(block: nn.Module, projection: _Leaf) -> int | None:
    owner = block.get_submodule(projection.path.rpartition(".")[0])
    for name in HEAD_WIDTHS:
        if isinstance(width := getattr(owner, name, None), int):
            return width
    numbers = (getattr(owner, name, None) for name in NUM_HEADS)
    number = next((n for n in numbers if isinstance(n, int)), None)
    return None if number is None else projection.shape.out_features // number


def block_widths(model: nn.Module, given: str | None = None) -> dict[str, int]:
    """Return the width of the residual stream of each block, by path; `given` as of `blocks`.

    Raises:
        InputError: an entry of the given list has no sub-layer that tells it.
    """
    found = {path: width_of(block) for path, block in blocks(model, given)}
    unknown = next((path for path, width in found.items() if given and not width), None)
    if unknown is not None:
        raise InputError(
            f"blocks={given}: the width of {unknown} is not known, a "
            f"{type(model.get_submodule(unknown)).__name__} without sub-layers; name a list of "
            "blocks"
        )
    return found


def stacks_of(model: nn.Module, given: str | None, number: int, method: str) -> list[list[str]]:
    """Return the paths of the blocks of each list, as `stacks`, of a model with `number` lists.

    Args:
        given: the field `blocks` of the method's config.

    Raises:
        InputError: the model has another number of them.
    """
    found = stacks(model, given)
    if len(found) != number:
        one = "one: name it with blocks=PATH" if number == 1 else "an encoder and a decoder"
        raise InputError(
            f"{type(model).__name__} has {lists_found(model)}, and {method} needs {one}"
        )
    return list(found.values())


def list_of_blocks(model: nn.Module, given: str | None) -> str | None:
    """Return `given`; null of a model for images and text: the list of its language model."""
    language = None if given or is_encoder_decoder(model) else language_path(model)
    found = [] if language is None else names_of(LANGUAGE, stacks(model), language)
    return found[0] if len(found) == 1 else given


def stacks(model: nn.Module, given: str | None = None) -> dict[str, list[str]]:
    """Return the paths of the blocks by the path of their list, those of an encoder last.

    So the list that the head reads is the first one, also of an encoder-decoder.

    Args:
        given: as of `blocks`.
    """
    found: dict[str, list[str]] = {}
    for path, _ in blocks(model, given):
        found.setdefault(path.rpartition(".")[0], []).append(path)
    if not is_encoder_decoder(model):
        return found
    inside = set(cast(Any, model).get_encoder().modules())
    return dict(sorted(found.items(), key=lambda item: model.get_submodule(item[0]) in inside))


def lists_found(model: nn.Module) -> str:
    """Return, for a message, the lists of transformer blocks of a model, and other lists it has."""
    found = list(stacks(model))
    lists = [name for name, module in model.named_modules() if name and is_stack(module)]
    others = [
        name
        for name in lists
        if name not in found and not any(name.startswith(f"{each}.") for each in lists)
    ]
    number = f"{len(found)} lists" if len(found) > 1 else "one list" if found else "no list"
    text = f"{number} of blocks with attention" + (f" ({', '.join(found)})" if found else "")
    return text + (f" and other lists of layers ({', '.join(others)})" if others else "")


def layer_drop(config: PretrainedConfig | None) -> str:
    """Return the setting of a config that drops blocks in training, with its value; "" if none."""
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    found = (f"{k}={v}" for k, v in fields.items() if re.fullmatch(r".*layer_?drop", k) and v)
    return next(found, "")


def final_norm(model: nn.Module, stack: str) -> str | None:
    """Return the norm behind the list of blocks at path `stack`, or None if there is none."""
    owner, _, name = stack.rpartition(".")
    children = list(model.get_submodule(owner).named_children())
    behind = children[[child for child, _ in children].index(name) + 1 :]
    # BART registers the norm of its embeddings behind its blocks
    norms = [child for child, module in behind if is_norm(module) and "embed" not in child]
    return (f"{owner}.{norms[0]}" if owner else norms[0]) if norms else None


def norm_kind(block: nn.Module) -> tuple[float, bool]:
    """Return epsilon of the norms of a block, and whether they have a bias.

    Raises:
        InputError: it has none of a known kind.
    """
    norm = next((module for module in block.modules() if is_norm(module)), None)
    if norm is None:
        raise InputError(
            f"{type(block).__name__} has no LayerNorm or RMSNorm, and a norm like that of the "
            "blocks is needed: choose another method, such as lora"
        )
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    return float(eps), getattr(norm, "bias", None) is not None


def norm_names(model: nn.Module) -> list[str]:
    """Return the names of the norms with 1-D weights in the backbone of `model` (without head)."""
    backbone = model.base_model if isinstance(model, PreTrainedModel) else model
    inside = {id(module) for module in backbone.modules()}
    modules = ((name, model.get_submodule(name)) for name in candidate_names(model))
    return [name for name, module in modules if id(module) in inside and is_norm(module)]


def blocks(model: nn.Module, given: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of the transformer blocks: entries of the innermost lists of layers.

    Args:
        given: path of the list whose entries are the blocks; None: the lists with attention.

    Raises:
        InputError: there is no list of layers at the path.
    """
    if given is not None:
        named = dict(model.named_modules()).get(given)
        if named is None or not is_stack(named):
            raise InputError(
                f"blocks={given} is no list of layers of {type(model).__name__}, which has "
                f"{lists_found(model)}"
            )
        yield from ((f"{given}.{part}", block) for part, block in named.named_children())
        return
    lists = {
        name: module
        for name, module in model.named_modules()
        if is_stack(module) and _holds_blocks(module)
    }
    for name, blocks in lists.items():
        # the innermost list: Swin has stages of blocks
        if not any(other.startswith(f"{name}.") for other in lists):
            yield from ((f"{name}.{part}", block) for part, block in blocks.named_children())


def place_in(model: nn.Module, key: str, given: str | None) -> Place | None:
    """Return the place of the module called `key` in the list at path `given`; None: in any list.

    Raises:
        InputError: there is no list of layers at the path.
    """
    if given is None:
        return place(model, key)
    names = [path for path, _ in blocks(model, given)]
    index = next((i for i, name in enumerate(names) if key.startswith(f"{name}.")), None)
    if index is None:
        return None
    return Place(given, index, len(names), key.removeprefix(f"{names[index]}."))


def _holds_blocks(stack: nn.Module) -> bool:
    # blocks have one class, or one for each kind of mixer; lists of heads or levels do not
    entries = list(stack.children())
    classes = {original_class(entry) for entry in entries}
    if len(classes) != 1 and not all(BLOCK_CLASS.search(cls.__name__) for cls in classes):
        return False
    return any(leaf.in_attention for entry in entries for leaf in _leaves(entry))


def _leaves(block: nn.Module) -> list[_Leaf]:
    """Return the linear layers of a block in registration order, adapted or not."""
    leaves = []
    for name in candidate_names(block):
        module = block.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        returns_scale = type(base).__module__.startswith(WITH_SCALE)
        if isinstance(base, LINEAR_KINDS) or (hasattr(base, "in_features") and not returns_scale):
            # of a hybrid, "mixer" is the name of attention too
            owner = original_class(block.get_submodule(name.rpartition(".")[0]))
            where = f"{name} {owner.__name__}" if "." in name else name
            leaves.append(_Leaf(name, shape_of(base), bool(ATTENTION.search(where))))
    return leaves


def is_causal(block: nn.Module) -> bool:
    """Return True if the block belongs to a decoder."""
    return any(
        getattr(m, "is_causal", False) or getattr(m, "is_decoder", False) for m in block.modules()
    )


def feed_forward_layers(block: nn.Module) -> dict[str, LayerShape]:
    """Return the linear layers of a block outside of attention, by path in it, in their order."""
    return {leaf.path: leaf.shape for leaf in _leaves_by_kind(block)["ffn"]}


def width_of(block: nn.Module) -> int:
    """Return the width of the residual stream of a block: the queries are computed from it."""
    parts = _leaves_by_kind(block)
    # a block may have cross-attention only (Perceiver), or none (Mamba)
    attention = parts["attn"] or parts["cross_attn"]
    if not attention:
        norm = next((module for module in block.modules() if is_norm(module)), None)
        if norm is not None:
            return next(norm.parameters()).numel()
        # one of convolutions alone (Emu3's images) has no residual stream of tokens
        return parts["ffn"][0].shape.in_features if parts["ffn"] else 0
    return (_query(attention) or attention[0]).shape.in_features


def _leaves_by_kind(block: nn.Module) -> dict[str, list[_Leaf]]:
    parts: dict[str, list[_Leaf]] = {kind: [] for kind in KINDS}
    for leaf in _leaves(block):
        if "norm" in leaf.path:  # of a norm with a gate
            continue
        if leaf.in_attention:
            parts["cross_attn" if CROSS.search(leaf.path) else "attn"].append(leaf)
        elif "adapter" not in leaf.path:  # wav2vec2 has modules of that name
            parts["ffn"].append(leaf)
    # Falcon-H1 has both, and the mixer is no feed-forward
    others = [leaf for leaf in parts["ffn"] if not MIXER.match(leaf.path)]
    return {**parts, "ffn": others or parts["ffn"]}


def _sublayers_of(path: str, block: nn.Module) -> Iterator[SubLayer]:
    parts, width, causal = _leaves_by_kind(block), width_of(block), is_causal(block)
    for kind, leaves in parts.items():
        ends = _ends(kind, leaves, block, width)
        if ends is not None:
            closing, source = ends
            residual = _residual(block, kind, closing, source)
            where = (f"{path}.{name}" if name else None for name in (source, residual))
            yield SubLayer(kind, f"{path}.{closing}", width, *where, causal)


def _query(leaves: list[_Leaf]) -> _Leaf | None:
    by_name = {leaf.path.rpartition(".")[2]: leaf for leaf in leaves}
    return next((by_name[name] for name in QUERIES if name in by_name), None)


def _ends(
    kind: str, leaves: list[_Leaf], block: nn.Module, width: int
) -> tuple[str, str | None] | None:
    """Return the module that closes a sub-layer and the one that gets its input, or None.

    Paths are relative to the block.
    """
    if kind == "ffn" and (owners := owners_of_experts(block)):
        if len(owners) > 1:
            # of ERNIE, for text and for images; their outputs are tokens in another order
            logger.warning("no bottleneck on %s: a block has several such", ", ".join(owners))
        return (owners[0], owners[0]) if len(owners) == 1 else None
    inner = () if kind == "ffn" else (*QUERIES, *KEYS, *VALUES)
    closings = [
        leaf.path
        for leaf in leaves
        if leaf.shape.out_features == width and leaf.path.rpartition(".")[2] not in inner
    ]
    if not closings:
        return None
    if kind == "ffn":
        entry = next((leaf for leaf in leaves if leaf.shape.in_features == width), None)
    else:
        entry = _query(leaves)
        owner = block.get_submodule(entry.path.rpartition(".")[0]) if entry else None
        if type(owner).__name__.startswith(TOKENS_FIRST):
            entry = None
    return closings[-1], entry.path if entry else None


def owners_of_experts(block: nn.Module) -> list[str]:
    """Return the modules of a block that route tokens to experts."""
    owners = dict[str, None]()
    for name, module in block.named_modules():
        if ATTENTION.search(name) or isinstance(module, _ConvNd | Adapter):
            continue
        is_stacked = any(p.dim() > 2 for p in module.parameters(recurse=False))  # [E, O, I]
        # the owner of the experts, by its path without petl's wrappers
        owner = re.sub(r"\.base_layer(?=\.|$)", "", name).rpartition(".")[0]
        is_known = any(f"{owner}.".startswith(f"{other}.") for other in owners)
        if owner and not is_known and (is_stacked or "experts" in name.rpartition(".")[2]):
            owners[owner] = None
    return list(owners)


def _residual(block: nn.Module, kind: str, closing: str, source: str | None) -> str | None:
    """Return the module of a block whose first input is the residual stream of a sub-layer.

    It is the norm before the sub-layer; in blocks that normalize afterwards the residual stream is
    the sub-layer's input.
    """
    # outwards from the closing module
    container = closing
    while container := container.rpartition(".")[0]:  # T5: each sub-layer has its own norm
        norm = f"{container}.layer_norm"
        if _has(block, norm):
            return norm
    if any(_has(block, norm) for norm in POST_NORMS):
        return source
    # these names are used by classes of both kinds
    for pair in EITHER_NORMS:
        if all(_has(block, norm) for norm in pair):
            norms = dict(zip(KINDS, (pair[0], EITHER_CROSS_NORM, pair[1]), strict=True))
            return {True: norms[kind], False: source, None: None}[_norms_first(block)]
    if _norms_first(block) is False:
        return source
    if kind == "cross_attn":
        return next((norm for norm in CROSS_PRE_NORMS if _has(block, norm)), None)
    found = (pair for pair in PRE_NORMS if all(_has(block, norm) for norm in pair))
    attention_norm, feed_forward_norm = next(found, (None, None))
    return attention_norm if kind == "attn" else feed_forward_norm


def _norms_first(block: nn.Module) -> bool | None:
    """Return True if the class of a block normalizes before its sub-layers, None if unknown."""
    name = type(block).__name__
    if NORM_FIRST.match(name):
        return getattr(block, "do_layer_norm_before", True)
    return False if NORM_LAST.match(name) else None


def _has(block: nn.Module, path: str) -> bool:
    """Return True if the block has a module at `path` that it can call: LongCat has lists there."""
    module = block
    for part in path.split("."):
        module = getattr(module, part, None)
    return isinstance(module, nn.Module) and not isinstance(module, nn.ModuleList)
