"""Small models with random weights of every type in transformers' auto maps, without a download.

A type's config is built from its class's defaults with smaller numbers, chosen by the names of its
fields (`SIZES`); EXCEPTIONS has the types that need other fields.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from petl.core.model.calls import training_inputs

EXCEPTIONS = yaml.safe_load(Path(__file__).with_name("exceptions.yaml").read_text())
# kinds of models, with the auto maps of their classes; a type may be of several
KINDS = {
    "causal": ("CAUSAL_LM",),
    "image-text": ("IMAGE_TEXT_TO_TEXT",),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "encoder": ("SEQUENCE_CLASSIFICATION", "MASKED_LM"),
    "vision": ("IMAGE_CLASSIFICATION",),
}
VOCABULARY = 160
FIRST_TOKEN, LAST_TOKEN = 10, 110  # of texts: special tokens are below and above
ROWS = 2
# Values of a config's numbers by their names; the first match counts. Widths differ where those of
# real models do.
SIZES = {
    r"qk_rope_head_dim|rotary_dim|qk_nope_head_dim|index_head_dim": 8,
    r"\w*head_dim|\w*head_size|d_head|d_kv|kv_channels|dim_head|mamba_\w*headd?i?m?": 16,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
    r"((num|n)_)?(key_value|kv)_heads|\w+(num|n)_(key_value|kv)_heads|num_query_groups": 2,
    r"linear_num_key_heads": 2,
    r"((\w*_)?(num|n)_)?(\w+_)?heads?": 4,
    r"\w*(n|num)_heads?": 4,
    r"\w*(vocab|vocabulary)_size\w*|\w+_vocab": VOCABULARY,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|top_?k_experts|moe_k": 2,
    r"(n|num_expert)_group|topk_group": 1,
    r"\w*(ffn_dim|intermediate_size|d_ff|dff|dim_ff|n_inner|mlp_dim|d_inner)\w*": 96,
    r"ffn_hidden_size|expert_ffn_hidden_size": 96,
    r"(feed_forward|input|output)_size": 64,
    r"\w*(hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|embedding_size)\w*": 64,
    r"\w*(embedding_dim|proj_dim|projection_dim|projection_size|output_dim|proj_size)": 64,
    r"lru_width": 64,
    r"encoder_layers|decoder_layers|layers|depth|n_layers?|num_layers|\w*num_hidden_layers": 2,
    r"num_(encoder|decoder|global)_layers|\w+_(encoder|decoder)_layers|\w+_num_layers": 2,
    r"\w*position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length": 256,
    r"max_(source|target)_positions": 128,
    r"image_size|resolution|crop_size": 32,
    r"patch_size": 8,
    r"sliding_window\w*|window_size|local_attention|attention_window\w*|attention_chunk_size": 8,
    r"\w*lora_rank|\w*_rank|time_step_rank": 8,
    r"index_topk\w*|\w*state_size|\w*d_state|\w*chunk_size|block_size": 8,
    r"\w*n_groups?|mamba_n_groups": 1,
}
TOKEN = re.compile(r"\w*_(token_id|token_index|token_ids|id)|\w+_offset|image_patch_id")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
MOST_LAYERS = 4
# of fields that are None by default, where the model needs a number
ABSENT = {"head_dim": 16, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4}
USUAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Type:
    """A type of transformers and a kind of model that it has.

    Attributes:
        kind: one of KINDS.
        name: the `model_type`.
    """

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def class_name(self) -> str:
        """The name of the model's class."""
        return next(c for c in (_map_of(m).get(self.name) for m in KINDS[self.kind]) if c)

    def build(self) -> PreTrainedModel:
        """Build the small model, in eval mode, with the same weights each time."""
        import transformers

        if "reason" in self.own:
            raise NotImplementedError(self.own["reason"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model_cls, config = getattr(transformers, self.class_name), self.config()
            text = config.get_text_config(decoder=True)  # of a model for images, or for sounds
            if not isinstance(config, model_cls.config_class) and type(text) is not type(config):
                config = text if isinstance(text, model_cls.config_class) else config
            model = model_cls(config)
            _fill(model)
        return model.eval()

    def config(self) -> PreTrainedConfig:
        """Return the small config."""
        config = small_config(CONFIG_MAPPING[self.name], self.own.get("config", {}))
        config.use_cache = False
        return config

    @property
    def own(self) -> dict[str, Any]:
        """The exceptions for the type."""
        return EXCEPTIONS.get(str(self)) or EXCEPTIONS.get(self.name) or {}

    def inputs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return a batch: texts for a model that reads any, else images or sounds."""
        generator = torch.Generator().manual_seed(0)
        made = next(training_inputs(model))
        filled = {name: _filled(name, value, generator) for name, value in made.items()}
        for name, shape in self.own.get("inputs", {}).items():
            filled[name] = torch.randn(ROWS, *shape, generator=generator)
        for name, values in self.own.get("rows", {}).items():
            filled[name] = torch.tensor([values] * ROWS)
        if "last_token" in self.own:
            filled["input_ids"][:, -1] = self.own["last_token"]
        return {name: filled[name] for name in filled if name not in self.own.get("without", ())}


def types(kinds: Mapping[str, tuple[str, ...]] = KINDS) -> list[Type]:
    """Return all types of transformers' auto maps of these kinds."""
    found = {}
    for kind, maps in kinds.items():
        for name in (name for each in maps for name in _map_of(each)):
            # a decoder's classifier has the blocks of its language model
            if kind == "encoder" and name not in _map_of("MASKED_LM"):
                others = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
                if any(name in _map_of(other) for other in others):
                    continue
            if kind == "encoder-decoder" and not _is_encoder_decoder(name):
                continue
            found[Type(kind, name)] = None
    return list(found)


@cache
def _map_of(name: str) -> dict[str, Any]:
    mapping = dict(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES"))
    return {t: c[0] if isinstance(c, list | tuple) else c for t, c in mapping.items()}


def _is_encoder_decoder(name: str) -> bool:
    try:
        return bool(getattr(CONFIG_MAPPING[name](), "is_encoder_decoder", False))
    except Exception:  # of a config that has no defaults
        return True


def small_config(
    config_cls: type[PreTrainedConfig],
    own: Mapping[str, Any],
    default: PreTrainedConfig | None = None,
    tokens: Iterator[int] | None = None,
) -> PreTrainedConfig:
    """Return a config of a class with small numbers, and with the values of `own`.

    Args:
        config_cls: the class.
        own: exceptions; of a config inside it, a dict of its own.
        default: with the numbers of usual size; None: the class's defaults.
        tokens: ids of special tokens that no other config has; None: all.
    """
    own = copy.deepcopy(dict(own))  # a config keeps and changes them
    if own.pop("no_default", False):
        default, fields = None, {}
    else:
        default = config_cls() if default is None else default
        fields = small_fields(default, tokens or _tokens(), own)
    for name, value in own.items():
        if isinstance(value, dict) and "model_type" in value:
            rest = {k: v for k, v in value.items() if k != "model_type"}
            fields[name] = small_config(CONFIG_MAPPING[value["model_type"]], rest)
        elif not isinstance(fields.get(name), PreTrainedConfig):
            fields[name] = value
    config = config_cls(**fields)
    for part in [config, *(getattr(config, name) for name in config.sub_configs)]:
        _fit_rotation(part)
    return config


def _fit_rotation(config: Any) -> None:
    """Give each axis of a rotary embedding for images its part of a head."""
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        rope = config.rope_parameters
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        rope.setdefault("mrope_section", [half - 2 * (half // 3), half // 3, half // 3])


def small_fields(
    config: PreTrainedConfig, tokens: Iterator[int], own_values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of a config that are to have other values, those inside it included."""
    own = vars(config)
    fields: dict[str, Any] = _small_lists(config)
    fields |= {name: size for name, size in ABSENT.items() if own.get(name, 0) is None}
    if own.get("num_key_value_heads", 0) in (None, own.get("num_attention_heads")):
        fields["num_key_value_heads"] = 4
    # of multi-head latent attention: widths that its config computes
    derived = ("head_dim", "qk_head_dim") if hasattr(config, "qk_rope_head_dim") else ()
    mapped = {value: key for key, value in config.attribute_map.items()}
    for name, value in own.items():
        if name in fields or name in derived or isinstance(value, bool):
            continue
        if isinstance(value, PreTrainedConfig):
            given = own_values.get(name, {})
            if "model_type" not in given:
                fields[name] = small_config(type(value), given, value, tokens)
        elif isinstance(value, int):
            new = _small_number(name, value, tokens)
            new = new if new != value else _small_number(mapped.get(name, name), value, tokens)
            fields |= {name: new} if new != value else {}
        elif "layerdrop" in name:  # of two layers both would be dropped at times
            fields[name] = 0.0
        elif name in USUAL and isinstance(value, list):
            fields[name] = USUAL[name]
    return fields


def _small_lists(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the lists with an entry a layer, cut to layers of each kind, and their number."""
    count = next((n for n in LAYERS if isinstance(getattr(config, n, None), int)), "")
    lists = {
        name: value
        for name, value in vars(config).items()
        if count and isinstance(value, list | tuple) and len(value) == getattr(config, count) > 2
        if value and isinstance(value[0], str | int | bool)
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    indices = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    indices = indices if len(indices) > 1 else [0, 1]
    return {name: [value[i] for i in indices] for name, value in lists.items()} | {
        count: len(indices)
    }


def _small_number(name: str, value: int, tokens: Iterator[int]) -> int:
    if name in USUAL:
        return USUAL[name]
    if TOKEN.fullmatch(name) and value > FIRST_TOKEN:
        return next(tokens)
    for pattern, size in SIZES.items():
        if re.fullmatch(pattern, name):
            return min(size, value) if value > 0 else value
    return value


def _tokens() -> Iterator[int]:
    """The ids of special tokens."""
    return iter(range(LAST_TOKEN, VOCABULARY))


def _fill(model: PreTrainedModel) -> None:
    """Give a value to parameters that transformers leaves as memory was, and to scales of zero."""
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        largest = parameter.abs().max()
        # what a zero multiplies has no gradient, such as the keys of Zaya
        if not largest < 1e4 or (largest == 0 and "bias" not in name):
            torch.nn.init.normal_(parameter, std=0.02)


def _filled(name: str, value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = (ROWS, *value.shape[1:])
    if value.is_floating_point():
        return torch.randn(shape, generator=generator)
    if "mask" in name:
        return torch.ones(shape, dtype=value.dtype)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, shape, generator=generator)


def logits_of(outputs: Any) -> Tensor:
    """Return the first tensor of numbers among a model's outputs: logits, as a rule."""
    named = [outputs.get("logits"), *outputs.values()]
    return next(v for v in named if isinstance(v, Tensor) and v.is_floating_point())


def loss_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a loss on all outputs of `model`, which needs no labels."""
    with suppress(KeyError):
        # tokens that a model never writes have the lowest number
        return logits_of(model(**inputs)).float().clamp(-1e4, 1e4).pow(2).mean()
    raise TypeError(f"{type(model).__name__} returns no tensor of numbers")


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Return True if the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters
