"""Hashes that tell which model and tokenizer a drafter was trained for."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.fingerprint import fingerprint
from petl.core.types import base_of


def hashes_of(model: nn.Module) -> dict[str, str]:
    """Return hashes of a model's weights by what a drafter needs of them.

    `base` is of the input embedding and the output head, which a drafter reads; `adapter` of all
    other weights and of the active adapters, which decide what the model writes. Both are of
    samples, rounded to bfloat16: see petl.core.fingerprint.
    """
    base = base_of(model)
    # adapters that do not compute have no part in what the model writes
    active, inactive = _adapters(base)
    ends = {
        id(parameter)
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
        for name, parameter in _own(module).named_parameters()
    }
    digests, parts = fingerprint(base), {"base": {}, "adapter": {}}
    for name, parameter in base.named_parameters():
        words = name.split(".")
        if name in digests and not inactive & {*words}:
            kind = "base" if id(parameter) in ends else "adapter"
            # neither how an adapter is called nor that one wraps a layer is part of the weights
            short = ".".join(w for w in words if w not in active and w != "base_layer")
            parts[kind][short] = digests[name]
    return {kind: _hash(found) for kind, found in parts.items()}


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokens and their ids."""
    return _hash(tokenizer.get_vocab())


def _adapters(base: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names of the adapters that compute, and of the others."""
    known = {*getattr(base, "peft_config", {})}
    active: set[str] = set()
    for module in base.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            names = module.active_adapters if not module.disable_adapters else []
            active |= {*names}
    return active, known - active


def _own(module: Any) -> nn.Module:
    """Return a layer without its adapter, whose weights are not those of the base."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return getattr(module, "original_module", module)


def _hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
