"""Base models read in few bits: `model.quantization=...`, by bitsandbytes or torchao.

The linear layers of the body are quantised; heads, embeddings and norms stay as they are, and so
does the adapter, whatever its method.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from petl.errors import InputError
from petl.imports.extras import need_extra

# of NF4: numbers that have one scale, scales that have one of their own, bytes of codes and offset
NF4_BLOCK, NF4_SCALES, NF4_TABLE = 64, 256, 4 * (16 + 256) + 4
PACKAGES = {
    "bnb_4bit": "bitsandbytes",
    "bnb_8bit": "bitsandbytes",
    "torchao_int8": "torchao",
}


def check_kind(kind: str | None) -> None:
    """Raise InputError for a kind that there is not, or whose package is not installed."""
    if kind is None:
        return
    if kind not in PACKAGES:
        raise InputError(f"model.quantization={kind} is not one of {', '.join(PACKAGES)}, or null")
    need_extra("quantized", PACKAGES[kind], f"model.quantization={kind}")


def quantization_config(kind: str, dtype: torch.dtype, dense: Sequence[str]) -> Any:
    """What `from_pretrained` takes to read a model so.

    Args:
        dtype: in which products are computed.
        dense: modules that stay as they are.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bnb_4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(dense),
        )
    if kind == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(dense))
    from torchao.quantization import Int8WeightOnlyConfig  # ty: ignore[import-not-found]

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(dense))


def keep_gradients(model: nn.Module) -> None:
    """Have 4-bit layers of bitsandbytes pass gradients on a CPU after an evaluation, too.

    On processors with AVX512-BF16 such a layer repacks its weight for a kernel without a backward
    pass the first time it runs without gradients, and nothing undoes that.
    """
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def quantized_layers(model: PreTrainedModel, kind: str, dense: Sequence[str]) -> list[str]:
    """Paths of the layers whose weights transformers would read in few bits."""
    linear = (nn.Linear, Conv1D) if kind.startswith("bnb") else (nn.Linear,)
    kept = [*dense, *(model._keep_in_fp32_modules or ())]
    return [
        name
        for name, module in model.named_modules()
        if type(module) in linear and should_convert_module(name, kept)
    ]


def quantized_bytes(layer: nn.Module, kind: str) -> int:
    """Bytes of the weight of a linear layer in few bits, with its scales."""
    weight = layer.get_parameter("weight")
    if kind == "bnb_4bit":
        blocks = math.ceil(weight.numel() / NF4_BLOCK)
        scales = blocks + 4 * math.ceil(blocks / NF4_SCALES)  # themselves in 8 bits
        return math.ceil(weight.numel() / 2) + scales + NF4_TABLE
    scale = 4 if kind == "bnb_8bit" else weight.itemsize + 1  # torchao: and a zero point
    return weight.numel() + scale * weight.shape[1 if isinstance(layer, Conv1D) else 0]
