"""Write a decoder as GGUF for llama.cpp inside of this process, from its weights in memory.

Prompts and answers are token ids on the way to llama.cpp and back: petl reads and writes text with
the model's own tokenizer. The file therefore has, in place of the vocabulary, the number of each
token as a word of `DIGITS` digits, which also the pieces of an answer are.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petl.core.types import CausalModel
from petl.system.imports.extras import optional

EXTRA = "llama"
DIGITS = 7
# of gguf, by --weights; int8 and int4 are those of each engine
TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0", "int8": "Q8_0", "int4": "Q4_0"}
ENDS = {"int4": "Q8_0"}  # of embedding and head, in which few bits cost most
RowOrder = Callable[[int, int], Tensor]


@torch.no_grad()
def write_model(
    model: CausalModel, arch: str, end: int, file: Path, *, weights: str, reorder: RowOrder | None
) -> None:
    """Write a decoder.

    Args:
        arch: in llama.cpp.
        end: the token at which llama.cpp ends an answer.
        weights: a name of `TYPES`, for matrices; vectors stay in float32, as llama.cpp wants them.
        reorder: gives the order of rows of query and key by their number and that of heads; None:
            llama.cpp has the order of transformers.
    """
    gguf = optional("gguf", EXTRA)
    config = model.config
    writer = gguf.GGUFWriter(file, arch)
    write_sizes(writer, config, arch)
    write_numbers(writer, config.vocab_size, end)
    code = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(code, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        values = tensor.detach().float().cpu()
        count = heads.get(key.split(".")[-2])
        if reorder is not None and count is not None:
            values = values[reorder(len(values), count)]
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            values = values + 1  # transformers adds it in the forward pass
        # rows that do not divide into the blocks of a type stay in float16
        is_end = key.endswith(("embed_tokens.weight", "lm_head.weight"))
        types = TYPES | ENDS if is_end else TYPES
        kind = gguf.GGMLQuantizationType[types[weights]]
        block = gguf.GGML_QUANT_SIZES[kind][0]
        fitting = kind if values.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16
        kind = fitting if values.dim() > 1 else gguf.GGMLQuantizationType.F32
        array = gguf.quants.quantize(values.contiguous().numpy(), kind)
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sizes(writer: Any, config: Any, arch: str) -> None:
    """Write the sizes of a decoder."""
    # not each config has the size of a head
    size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
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
    gguf = optional("gguf", EXTRA)
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
