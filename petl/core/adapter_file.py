"""Contents of the adapter file, what its tensors are, and its size in bytes from shapes alone."""

import json
import re
from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from petl.system.files.tensor_file import DTYPE_NAMES, Shapes

WEIGHTS = "adapter_model.safetensors"
ROWS = ".token_adapter.trainable_tokens_delta"  # ends the name of trained rows of a table
PREFIX = "base_model.model."  # of every key in an adapter file
# tensors of PEFT's methods that are no differences from 0: norms of weights, factors that start at
# another value, random matrices that stay as they are, rows of an embedding
WHOLE = re.compile(
    r"\.(lora_magnitude_vector|delora_(w_norm|lambda)|boft_s|p?vera_([AB]|lambda_d)|"
    r"randlora_([AB]|gamma)|trainable_tokens_delta)$"
)


def saved_shapes(model: PeftModel, *, rank_factor: int = 1) -> Shapes:
    """Return dtype and shape of the tensors that `save_pretrained` writes, by name."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: (t.dtype, widened(name, t.shape, rank_factor)) for name, t in tensors.items()}


def trained_modules(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of `modules_to_save` that an adapter saves, by name in its file."""
    wrappers = [name for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # saved names have the wrapper's path, without `modules_to_save`
    inside = tuple(f"{name}." for name in wrappers)
    return {name: tensor for name, tensor in state.items() if name.startswith(inside)}


def trained_rows(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the rows of tokens that an adapter saves, by name in its file."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: tensor for name, tensor in state.items() if name.endswith(ROWS)}


def widened(name: str, shape: torch.Size, factor: int) -> torch.Size:
    """Return the shape with `factor` times the rank if it is a LoRA matrix's, else unchanged."""
    # A is [R, I] and B [O, R]
    rows = factor if ".lora_A." in name else 1
    columns = factor if ".lora_B." in name else 1
    return torch.Size([shape[0] * rows, shape[1] * columns, *shape[2:]] if shape[1:] else shape)


def safetensors_bytes(tensors: Shapes) -> int:
    """Return the size of the safetensors file of these tensors: 8 bytes, a JSON header, the data.

    The header has dtype, shape and offsets of each tensor, and is padded to a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    types = list(DTYPE_NAMES)
    for name in sorted(tensors, key=lambda name: (types.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        end = start + shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    header_bytes = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header_bytes // 8) * 8 + start  # the first 8 bytes are the header's length


def is_whole(name: str) -> bool:
    """Return True for a tensor of an adapter's file that is a weight, not what training added.

    Those of `modules_to_save` are, trained biases of the base model, and embeddings.
    """
    own = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    of_base = not any(part.startswith(own) for part in name.split("."))
    return bool(WHOLE.search(name)) or (of_base and name.endswith((".weight", ".bias")))


def type_of(config: PeftConfig | PeftModel) -> str:
    """Return the name of the PEFT type of a config or model."""
    kind = config.peft_type
    return str(kind.value if isinstance(kind, PeftType) else kind)


def reference_of(config: PeftConfig, sizes: Mapping[str, torch.Size]) -> dict[str, Tensor] | None:
    """Return what an adapter's tensors differ from: ones for IA3, None (0) for other methods."""
    return {n: torch.ones(size) for n, size in sizes.items()} if starts_at_one(config) else None


def starts_at_one(config: PeftConfig) -> bool:
    """Return True if the method's tensors are factors, so that 1 is what has no effect (IA3)."""
    return type_of(config) == "IA3"
