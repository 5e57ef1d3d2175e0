"""Write a decoder as GGUF for llama.cpp inside of this process, from its weights in memory.

Prompts and answers are token ids on the way to llama.cpp and back: petl reads and writes text with
the model's own tokenizer. The file therefore has, in place of the vocabulary, the number of each
token as a word of `DIGITS` digits, which also the pieces of an answer are.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petl.adapters.export.gguf import DECODERS, Decoder, row_order
from petl.core.types import CausalModel
from petl.errors import UnsupportedError
from petl.system.imports.extras import optional

EXTRA = "llama"
DIGITS = 7
PLAIN_ROPE = "default"


def decoder_of(config: Any) -> Decoder:
    """Return the architecture in llama.cpp of a model with this config.

    Raises:
        UnsupportedError: it is none of `DECODERS`, or has a part that the file does not hold.
    """
    kind = config.model_type
    if kind not in DECODERS:
        raise UnsupportedError(
            f"a model of the type {kind} is not written for llama.cpp; possible: "
            f"{', '.join(DECODERS)}; --engine petl serves any decoder"
        )
    ropes = [config.rope_parameters, *config.rope_parameters.values()]
    scaled = {each["rope_type"] for each in ropes if isinstance(each, dict) and "rope_type" in each}
    windows = not kind.startswith("gemma") and "sliding_attention" in _layer_types(config)
    if scaled - {PLAIN_ROPE} or windows:
        what = f"positions of the type {max(scaled)}" if scaled - {PLAIN_ROPE} else "a window"
        raise UnsupportedError(
            f"a {kind} with {what} is not written for llama.cpp: take --engine petl"
        )
    return DECODERS[kind]


def _layer_types(config: Any) -> list[str]:
    if getattr(config, "layer_types", None):
        return config.layer_types
    # of Mistral: one window for all layers
    return ["sliding_attention"] if getattr(config, "sliding_window", None) else []


@torch.no_grad()
def write_model(model: CausalModel, end: int, file: Path) -> None:
    """Write a decoder: in float32, or float16 if its weights have 16 bits.

    Args:
        end: the token at which llama.cpp ends an answer.
    """
    gguf: Any = optional("gguf", EXTRA)
    config: Any = model.config
    decoder = decoder_of(config)
    writer = gguf.GGUFWriter(file, decoder.name)
    write_sizes(writer, config, decoder.name)
    write_numbers(writer, config.vocab_size, end)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == decoder.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = np.float32 if model.dtype == torch.float32 else np.float16
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        values = tensor.detach().float().cpu()
        count = heads.get(key.split(".")[-2]) if decoder.reorders else None
        values = values if count is None else values[row_order(len(values), count)]
        if decoder.name.startswith("gemma") and key.endswith("norm.weight"):
            values = values + 1  # transformers adds it in the forward pass
        # vectors stay in float32, as llama.cpp wants them
        array = values.contiguous().numpy().astype(kind if values.dim() > 1 else np.float32)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sizes(writer: Any, config: Any, arch: str) -> None:
    """Write the sizes of a decoder."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    # Gemma 3 has other ones in layers with a window, which llama.cpp knows
    writer.add_rope_freq_base(rope.get("rope_theta") or rope["full_attention"]["rope_theta"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write_numbers(writer: Any, count: int, end: int) -> None:
    """Write a vocabulary of numbers."""
    gguf: Any = optional("gguf", EXTRA)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"{i:0{DIGITS}d}" for i in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges(["0 0"])  # llama.cpp wants at least one
    writer.add_bos_token_id(end)  # never used: prompts are complete
    writer.add_eos_token_id(end)


def tokens_in(text: str) -> list[int]:
    """The tokens of a piece of an answer."""
    return [int(text[i : i + DIGITS]) for i in range(0, len(text), DIGITS)]


def next_token(model: CausalModel, ids: list[int]) -> Tensor:
    """The log probabilities of the token behind a prompt, [V], by transformers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    return logits[0, -1].float().log_softmax(-1).cpu()
