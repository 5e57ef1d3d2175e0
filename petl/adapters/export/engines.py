"""Commands by which engines serve a plain LoRA."""

import shlex
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from petl.core.adapter_folder import Folder
from petl.training.runs.card_code import BASE

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def serving_lines(folder: Path) -> list[str]:
    """Return what to run so that vLLM and SGLang serve the LoRA in `folder`, or why they cannot.

    Empty unless it is an adapter of a causal language model.
    """
    config: Any = Folder(folder).config
    if config.task_type != "CAUSAL_LM":
        return []
    # beside an adapter, the config of a base that has no weights on disk
    is_random = (folder / BASE / CONFIG_NAME).is_file()
    reason = "its base model has random weights" if is_random else refusal(config)
    if reason:
        return [f"vLLM and SGLang cannot serve it: {reason}; `petl serve` and a merged model can"]
    base = shlex.quote(config.base_model_name_or_path)
    adapter = shlex.quote(f"{folder.absolute().name}={folder}")
    # `refusal` has checked that there is one
    rank = next(rank for rank in RANKS if rank >= largest_rank(config))
    return [
        f"vLLM: vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {adapter}",
        f"SGLang: python -m sglang.launch_server --model-path {base} --enable-lora "
        f"--lora-paths {adapter}",
    ]


def refusal(config: Any) -> str:
    """Return why engines cannot serve a LoRA, or would compute another update; "": they can.

    They read the rank, one scale for all layers, and the two factors of each layer.
    """
    # engines ignore what they do not know: the outputs would be silently wrong
    if config.modules_to_save or config.trainable_token_indices:
        return "it has trained copies of modules besides the LoRA"
    if config.use_dora:
        return "it is a DoRA"
    if config.bias != "none" or config.lora_bias:
        return "it has biases"
    # vLLM and SGLang read r and lora_alpha only, and no patterns
    if len(scales(config)) > 1:
        return "its layers have several scales"
    if largest_rank(config) > RANKS[-1]:
        return f"it has rank {largest_rank(config)}, and they take {RANKS[-1]} at most"
    return ""


def largest_rank(config: Any) -> int:
    """The largest rank of the layers of a LoRA."""
    return max([config.r, *config.rank_pattern.values()])


def scales(config: Any) -> set[float]:
    """The scales of a LoRA's layers, as far as its patterns show."""
    # rsLoRA scales by alpha / sqrt(r), LoRA by alpha / r
    power = 0.5 if config.use_rslora else 1.0
    # "": a layer that no pattern matches
    keys = ("", *config.rank_pattern, *config.alpha_pattern)
    found = {
        config.alpha_pattern.get(key, config.lora_alpha)
        / config.rank_pattern.get(key, config.r) ** power
        for key in keys
    }
    # quotients that are equal but for rounding count once
    return {round(scale, 12) for scale in found}
