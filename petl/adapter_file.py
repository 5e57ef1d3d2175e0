"""How large an adapter file will be, to the byte, from shapes alone."""

import json
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Shapes = dict[str, tuple[torch.dtype, torch.Size]]


def saved_shapes(model: PeftModel, *, rank_factor: int = 1) -> Shapes:
    """Type and shape of what `save_pretrained` writes, by name."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: (t.dtype, widened(name, t.shape, rank_factor)) for name, t in tensors.items()}


def widened(name: str, shape: torch.Size, factor: int) -> torch.Size:
    """The shape with `factor` times the rank, if it is that of a LoRA matrix."""
    rows = factor if ".lora_A." in name else 1
    columns = factor if ".lora_B." in name else 1
    return torch.Size([shape[0] * rows, shape[1] * columns, *shape[2:]] if shape[1:] else shape)


def safetensors_bytes(tensors: Shapes) -> int:
    """Size of the safetensors file of these tensors: 8 bytes, a JSON header, the data.

    The header names type, shape and place of each tensor, and is filled up to a multiple of 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    for name in order:
        dtype, shape = tensors[name]
        end = place + shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [place, end],
        }
        place = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + place
