"""Levels of rank: LoRA layers cut to their first singular directions.

Of the update B A the SVD keeps the r' largest singular values, each shared evenly by the two
factors; in the model A and B keep their shapes, with zeros behind r', so that the scale alpha / r
stays. Shapes: I in, O out, R rank.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.adapters.search.tensors import active_adapter, config_of
from petl.adapters.search.units import Unit
from petl.core.adapter_file import type_of
from petl.core.compat import BaseTunerLayer
from petl.core.refusals import is_lora, refuse_more_than_factors
from petl.errors import UnsupportedError


def rank_of(model: nn.Module) -> list[Unit]:
    """Return the LoRA layers of the active adapter, each at ranks 1 to r; costs in values.

    Raises:
        InputError: there is no adapter, or one that is not a plain LoRA of linear layers.
    """
    model, name = active_adapter(model)
    config = config_of(model, name)
    if not is_lora(config):
        raise UnsupportedError(
            f"{type_of(config)} has no ranks to cut; write the adapter as a LoRA first, with "
            "petl export RUN OUT --lora"
        )
    if config.use_dora:
        raise UnsupportedError(
            "use_dora=True scales the weight with its update, whose rank alone cannot be cut"
        )
    refuse_more_than_factors(model, name)
    return [unit_of(path, layer, name) for path, layer in layers_of(model, name)]


def layers_of(model: PeftModel, name: str) -> list[tuple[str, Any]]:
    """Return path and LoRA layer of the layers that an adapter is on."""
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and name in getattr(layer, "r", {})
    ]


def unit_of(path: str, layer: Any, name: str) -> Unit:
    """Return a LoRA layer as a unit."""
    A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    down, up, rank = *factors(A, B), len(A)
    names = f"{path}.lora_A.{name}.weight", f"{path}.lora_B.{name}.weight"
    keep = torch.arange(rank, device=A.device)
    tensors = [
        {names[0]: down * (keep < r)[:, None], names[1]: up * (keep < r)} for r in range(1, rank)
    ]
    # of full rank, the stored factors themselves: nothing is rounded
    tensors.append({names[0]: A.clone(), names[1]: B.clone()})
    each = A.shape[1] + len(B)
    return Unit(
        path.removeprefix("base_model.model."),
        rank,
        tuple(r * each for r in range(1, rank + 1)),
        tuple(tensors),
        tuple(range(1, rank + 1)),
    )


def factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [O, R] of the same product, ordered by singular values."""
    # of the small factors of two QR decompositions: the product itself is not formed
    Q, S = torch.linalg.qr(B.double())
    P, T = torch.linalg.qr(A.double().T)
    U, sigma, V = torch.linalg.svd(S @ T.T)
    # if R is above I or O, there are fewer directions than R
    root, missing = sigma.sqrt(), len(A) - len(sigma)
    down, up = root[:, None] * (V[: len(sigma)] @ P.T), (Q @ U[:, : len(sigma)]) * root
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 0, missing)).to(A.dtype), pad(up, (0, missing)).to(B.dtype)
