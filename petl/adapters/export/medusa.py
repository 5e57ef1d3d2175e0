"""Parallel draft heads in the format of vLLM's Medusa model (vllm/model_executor/models/medusa.py).

It computes the same residual blocks, with one head for a reduced vocabulary, and drafts a chain of
the likeliest tokens. Shapes: K heads, H width, V tokens, D tokens of the draft vocabulary.
"""

import json
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from petl.efficiency.drafting.hydra import Hydra
from petl.efficiency.drafting.registry import Drafter
from petl.errors import UnsupportedError
from petl.system.files.disk import write_json
from petl.system.files.outputs import check_output, new_folder

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def export_medusa(drafter: Drafter, out: Path) -> None:
    """Write a drafter as a Medusa model.

    Args:
        drafter: parallel heads.
        out: folder: new or empty.

    Raises:
        UnsupportedError: it is another drafter, or has what that model has not.
        InputError: the folder is taken, or cannot be written.
    """
    heads = _checked(drafter)
    check_output(out)
    tensors, size = _tensors(heads), len(heads.vocab)
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": heads.ends.width,
        "num_heads": heads.heads,
        "num_hidden_layers": heads.fields["layers"],
        "vocab_size": heads.ends.vocabulary,
        "truncated_vocab_size": size,
        "medusa_fc_bias": True,
        "original_lm_head": not heads.own_head,
        "torch_dtype": str(heads.dtype).removeprefix("torch."),
    }
    with new_folder(out) as folder:
        # transformers, which reads the config, asks for the format of the tensors
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, config)


def serving_line(out: Path, heads: int) -> str:
    """Return the command by which vLLM uses the exported heads."""
    options = json.dumps({"model": str(out), "num_speculative_tokens": heads})
    return f"vLLM: vllm serve MODEL --speculative-config {shlex.quote(options)}"


def _checked(drafter: Drafter) -> Hydra:
    """Return the heads if vLLM can compute them."""
    reason = ""
    if not isinstance(drafter, Hydra):
        reason = f"it is a {drafter.name or type(drafter).__name__}, and vLLM has no such drafter"
    elif drafter.kind != "parallel":
        reason = (
            f"its heads are {drafter.kind}, and read the tokens drafted before; vLLM computes "
            "parallel heads: train with drafter.kind=parallel"
        )
    elif drafter.reader is not None:
        reason = "it has a prefix layer, which vLLM's Medusa model lacks: train with prefix=false"
    elif getattr(drafter.ends.head, "bias", None) is not None and not drafter.own_head:
        reason = "the head of its model has a bias, which vLLM's Medusa model lacks"
    if reason:
        raise UnsupportedError(f"the drafter cannot be exported for vLLM: {reason}")
    assert isinstance(drafter, Hydra)
    return drafter


def _tensors(heads: Hydra) -> dict[str, Tensor]:
    """Return the tensors by the names of vLLM."""
    found: dict[str, Tensor] = {}
    for i, layers in enumerate(heads.blocks):
        for j, block in enumerate(layers.children()):
            found[f"blocks.{i}.layers.{j}.weight"] = block.get_parameter("lin_weight")
            found[f"blocks.{i}.layers.{j}.bias"] = block.get_parameter("lin_bias")
    rows = list(heads.lm_heads) if heads.own_head else [heads.ends.rows(heads.index)]
    if len(heads.vocab) < heads.ends.vocabulary:
        found["token_map"] = heads.index
        order = torch.arange(len(heads.vocab), device=heads.index.device)
    else:
        order = heads.index.argsort()  # vLLM reads no map of the whole vocabulary
    for i, own in enumerate(rows):
        found[f"lm_heads.{i}.weight"] = own.to(heads.dtype)[order]
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}
