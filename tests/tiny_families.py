"""A tiny model of each architecture whose sub-layers petl must find, and where they are, by hand.

A family's stacks map the path of a module list to its sub-layers: kind, closing projection, what
sees the sub-layer's input, what sees the residual stream, all as paths in a block. In post-norm
families the last two are the same, and `post` names the norm after each sub-layer.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

K, FF = 32, 48  # width of the stream, of the feed-forward
WIDTHS = {
    "hidden_size": K,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": FF,
}
TEXT = {"vocab_size": 64}
SPECIAL = {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**WIDTHS, **SPECIAL, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = {**WIDTHS, "image_size": 16, "patch_size": 8}
PAIR = {
    "d_model": K,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": FF,
    "decoder_ffn_dim": FF,
}
WAVE = {
    **WIDTHS,
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}

Part = tuple[str, str, str, str]  # kind, closing, source, residual


@dataclass(frozen=True)
class Family:
    """A class of models, a tiny config, its stacks, and what its forward takes."""

    model: str
    config: str
    settings: dict[str, Any]
    stacks: dict[str, tuple[Part, ...]]
    inputs: str = "text"
    post: dict[str, str] = field(default_factory=dict)
    causal: bool = False

    def build(self) -> Any:
        """The model in eval mode, its norms not at their neutral start, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(hf, self.model)(getattr(hf, self.config)(**self.settings)).eval()
            for module in model.modules():
                weight = getattr(module, "weight", None)
                if "Norm" in type(module).__name__ and weight is not None:
                    nn.init.normal_(weight, 1.0, 0.3)
        return model

    def batch(self, rows: int = 2, tokens: int = 6, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of the model's forward."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "pixel_values": (rows, 3, 16, 16),
            "spectrogram": (rows, 32, 16),
            "wave": (rows, 400),
            "input_features": (rows, 8, 32),
        }
        ids = torch.randint(3, 32, (rows, tokens), generator=generator)
        if self.inputs in shapes:
            name = {"spectrogram": "input_values", "wave": "input_values"}.get(
                self.inputs, self.inputs
            )
            batch = {name: torch.randn(shapes[self.inputs], generator=generator)}
        else:
            batch = {"input_ids": ids}
        if any("cross_attn" in part for parts in self.stacks.values() for part in parts):
            batch["decoder_input_ids"] = ids.flip(0)
        return batch

    def outputs(self, model: nn.Module, **batch: Tensor) -> Tensor:
        """Logits, or the last hidden state of a model without a head."""
        out = model(**batch)
        return out.logits if "logits" in out else out.last_hidden_state

    def parts(self) -> list[Part]:
        """The sub-layers of the whole model, paths in full, in `named_modules` order of stacks."""
        return [
            (kind, *(f"{stack}.{block}.{path}" for path in paths))
            for stack, parts in self.stacks.items()
            for block in range(2)
            for kind, *paths in parts
        ]


def _pre(
    closings: tuple[str, str], sources: tuple[str, str], norms: tuple[str, str]
) -> tuple[Part, ...]:
    return tuple(zip(("attn", "ffn"), closings, sources, norms, strict=True))


def _post(closings: tuple[str, str], sources: tuple[str, str]) -> tuple[Part, ...]:
    return _pre(closings, sources, sources)


def _bert(query: str = "query") -> tuple[Part, ...]:
    closings = ("attention.output.dense", "output.dense")
    return _post(closings, (f"attention.self.{query}", "intermediate.dense"))


BERT_NORMS = {"attn": "attention.output.LayerNorm", "ffn": "output.LayerNorm"}
LLAMA_ENDS = ("self_attn.o_proj", "mlp.down_proj")
LLAMA_STARTS = ("self_attn.q_proj", "mlp.gate_proj")
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
LLAMA = {"model.layers": _pre(LLAMA_ENDS, LLAMA_STARTS, LLAMA_NORMS)}
GEMMA = {
    "model.layers": _pre(LLAMA_ENDS, LLAMA_STARTS, ("input_layernorm", "pre_feedforward_layernorm"))
}
VIT = {
    "layers": _pre(
        ("attention.o_proj", "mlp.fc2"),
        ("attention.q_proj", "mlp.fc1"),
        ("layernorm_before", "layernorm_after"),
    )
}


def _t5(cross: bool) -> tuple[Part, ...]:
    last = "layer.2" if cross else "layer.1"
    attention = ("SelfAttention.o", "SelfAttention.q", "layer_norm")
    ffn = ("DenseReluDense.wo", "DenseReluDense.wi", "layer_norm")
    parts = [("attn", *(f"layer.0.{p}" for p in attention))]
    if cross:
        encdec = ("EncDecAttention.o", "EncDecAttention.q", "layer_norm")
        parts.append(("cross_attn", *(f"layer.1.{p}" for p in encdec)))
    return (*parts, ("ffn", *(f"{last}.{p}" for p in ffn)))


def _bart(*, cross: bool, norms_first: bool) -> tuple[Part, ...]:
    parts = []
    for kind, name in (("attn", "self_attn"), ("cross_attn", "encoder_attn")):
        source = f"{name}.q_proj"
        norm = f"{name}_layer_norm" if norms_first else source
        parts.append((kind, f"{name}.out_proj", source, norm))
    ffn = ("ffn", "fc2", "fc1", "final_layer_norm" if norms_first else "fc1")
    return (*(parts if cross else parts[:1]), ffn)


def _wave(*norms: str) -> tuple[Part, ...]:
    closings = ("attention.out_proj", "feed_forward.output_dense")
    sources = ("attention.q_proj", "feed_forward.intermediate_dense")
    return _pre(closings, sources, norms or sources)


def _causal(name: str, stacks: Any, **settings: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", settings, stacks, causal=True)


def _encoder(name: str, query: str = "query", **settings: Any) -> Family:
    stacks = {"encoder.layer": _bert(query)}
    settings = {**WIDTHS, **TEXT, **settings}
    return Family(f"{name}Model", f"{name}Config", settings, stacks, post=BERT_NORMS)


FAMILIES = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "deberta": _encoder("Deberta", "in_proj"),
    "deberta_v2": _encoder("DebertaV2", "query_proj"),
    "electra": _encoder("Electra", embedding_size=K),
    "distilbert": Family(
        "DistilBertModel",
        "DistilBertConfig",
        {**TEXT, "dim": K, "n_layers": 2, "n_heads": 4, "hidden_dim": FF},
        {
            "transformer.layer": _post(
                ("attention.out_lin", "ffn.lin2"), ("attention.q_lin", "ffn.lin1")
            )
        },
        post={"attn": "sa_layer_norm", "ffn": "output_layer_norm"},
    ),
    "modernbert": Family(
        "ModernBertModel",
        "ModernBertConfig",
        {**WIDTHS, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        {"layers": _pre(("attn.Wo", "mlp.Wo"), ("attn.Wqkv", "mlp.Wi"), ("attn_norm", "mlp_norm"))},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**SPECIAL, "n_embd": K, "n_inner": FF, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {
            "transformer.h": _pre(
                ("attn.c_proj", "mlp.c_proj"), ("attn.c_attn", "mlp.c_fc"), ("ln_1", "ln_2")
            )
        },
        causal=True,
    ),
    "gpt_neox": _causal(
        "GPTNeoX",
        {
            "gpt_neox.layers": _pre(
                ("attention.dense", "mlp.dense_4h_to_h"),
                ("attention.query_key_value", "mlp.dense_h_to_4h"),
                LLAMA_NORMS,
            )
        },
        **WIDTHS,
        **SPECIAL,
    ),
    "opt": _causal(
        "OPT",
        {"model.decoder.layers": _bart(cross=False, norms_first=True)},
        **SPECIAL,
        hidden_size=K,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=FF,
        word_embed_proj_dim=K,
        max_position_embeddings=64,
    ),
    "opt_post": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {
            **SPECIAL,
            "hidden_size": K,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": FF,
            "word_embed_proj_dim": K,
            "max_position_embeddings": 64,
            "do_layer_norm_before": False,
        },
        {"model.decoder.layers": _bart(cross=False, norms_first=False)},
        post={"attn": "self_attn_layer_norm", "ffn": "final_layer_norm"},
        causal=True,
    ),
    "llama": _causal("Llama", LLAMA, **DECODER),
    "qwen2": _causal("Qwen2", LLAMA, **DECODER),
    "qwen3": _causal("Qwen3", LLAMA, **DECODER, head_dim=8),
    "smollm3": _causal("SmolLM3", LLAMA, **DECODER),
    "gemma2": _causal("Gemma2", GEMMA, **DECODER, head_dim=8),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}, GEMMA, causal=True
    ),
    "phi": _causal(
        "Phi",
        {
            "model.layers": _pre(
                ("self_attn.dense", "mlp.fc2"),
                ("self_attn.q_proj", "mlp.fc1"),
                ("input_layernorm", "input_layernorm"),
            )
        },
        **DECODER,
    ),
    "phi3": _causal(
        "Phi3",
        {"model.layers": _pre(LLAMA_ENDS, ("self_attn.qkv_proj", "mlp.gate_up_proj"), LLAMA_NORMS)},
        **DECODER,
    ),
    "falcon": _causal(
        "Falcon",
        {
            "transformer.h": _pre(
                ("self_attention.dense", "mlp.dense_4h_to_h"),
                ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
                ("input_layernorm", "input_layernorm"),
            )
        },
        **SPECIAL,
        hidden_size=K,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=FF,
    ),
    "mixtral": _causal(
        "Mixtral",
        {
            "model.layers": _pre(
                ("self_attn.o_proj", "mlp"), ("self_attn.q_proj", "mlp"), LLAMA_NORMS
            )
        },
        **DECODER,
        num_local_experts=4,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**TEXT, "d_model": K, "d_kv": 8, "d_ff": FF, "num_layers": 2, "num_heads": 4},
        {"encoder.block": _t5(cross=False), "decoder.block": _t5(cross=True)},
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {**PAIR, **TEXT, "max_position_embeddings": 64},
        {
            "model.encoder.layers": _bart(cross=False, norms_first=False),
            "model.decoder.layers": _bart(cross=True, norms_first=False),
        },
        post={
            "attn": "self_attn_layer_norm",
            "cross_attn": "encoder_attn_layer_norm",
            "ffn": "final_layer_norm",
        },
    ),
    "vit": Family("ViTModel", "ViTConfig", IMAGE, VIT, inputs="pixel_values"),
    "dinov2": Family(
        "Dinov2Model",
        "Dinov2Config",
        {**IMAGE, "mlp_ratio": 2},
        {
            "encoder.layer": _pre(
                ("attention.o_proj", "mlp.fc2"),
                ("attention.q_proj", "mlp.fc1"),
                ("norm1", "norm2"),
            )
        },
        inputs="pixel_values",
    ),
    "clip_vision": Family(
        "CLIPVisionModel",
        "CLIPVisionConfig",
        IMAGE,
        {
            "encoder.layers": _pre(
                ("self_attn.out_proj", "mlp.fc2"),
                ("self_attn.q_proj", "mlp.fc1"),
                ("layer_norm1", "layer_norm2"),
            )
        },
        inputs="pixel_values",
    ),
    "ast": Family(
        "ASTModel",
        "ASTConfig",
        {
            **WIDTHS,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
        },
        VIT,
        inputs="spectrogram",
    ),
    "wav2vec2": Family(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        WAVE,
        {"encoder.layers": _wave()},
        inputs="wave",
        post={"attn": "layer_norm", "ffn": "final_layer_norm"},
    ),
    "wav2vec2_stable": Family(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {**WAVE, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        {"encoder.layers": _wave("layer_norm", "final_layer_norm")},
        inputs="wave",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **PAIR,
            **SPECIAL,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
        },
        {
            "model.encoder.layers": _bart(cross=False, norms_first=True),
            "model.decoder.layers": _bart(cross=True, norms_first=True),
        },
        inputs="input_features",
    ),
}
