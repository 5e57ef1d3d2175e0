"""Quantized base models: `model.quantization=...`, with bitsandbytes or torchao.

The linear layers of the body are quantized; heads, embeddings, norms and the adapter are not.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

# NF4 with double quantization: weights per scale, scales per second-level scale, and bytes of the
# tables of codes and the offset
NF4_BLOCK, NF4_SCALES, NF4_TABLE = 64, 256, 4 * (16 + 256) + 4


def quantization_config(scheme: str, dtype: torch.dtype, dense: Sequence[str]) -> object:
    """The `quantization_config` of `from_pretrained` for a scheme in `PACKAGES`.

    Args:
        scheme: bnb_4bit, bnb_8bit or torchao_int8.
        dtype: the dtype of matrix products.
        dense: names of modules that are not quantized.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if scheme == "bnb_4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(dense),
        )
    if scheme == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(dense))
    from torchao.quantization import Int8WeightOnlyConfig  # ty: ignore[import-not-found]

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(dense))


def keep_gradients(model: nn.Module) -> None:
    """Make 4-bit layers of bitsandbytes pass gradients on a CPU also after an evaluation.

    On processors with AVX512-BF16, the first forward pass without gradients repacks a layer's
    weight for a kernel that has no backward pass, and nothing reverts that.
    """
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        # the attribute that bitsandbytes reads before repacking
        layer.support_avx512bf16_for_cpu = False


def quantized_layers(model: PreTrainedModel, scheme: str, dense: Sequence[str]) -> list[str]:
    """Names of the layers whose weights transformers quantizes with this scheme."""
    linear = (nn.Linear, Conv1D) if scheme.startswith("bnb") else (nn.Linear,)
    excluded = [*dense, *(model._keep_in_fp32_modules or ())]
    return [
        name
        for name, module in model.named_modules()
        if type(module) in linear and should_convert_module(name, excluded)
    ]


def quantized_bytes(layer: nn.Module, scheme: str) -> int:
    """Bytes of the quantized weight of a linear layer, with its scales."""
    weight = layer.get_parameter("weight")
    if scheme == "bnb_4bit":
        # two 4-bit codes per byte
        blocks = math.ceil(weight.numel() / NF4_BLOCK)
        scales = blocks + 4 * math.ceil(blocks / NF4_SCALES)  # a scale has 8 bits
        return math.ceil(weight.numel() / 2) + scales + NF4_TABLE
    scale = 4 if scheme == "bnb_8bit" else weight.itemsize + 1  # torchao: with a zero point
    return weight.numel() + scale * weight.shape[1 if isinstance(layer, Conv1D) else 0]
