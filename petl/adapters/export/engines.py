"""What engines make of a LoRA, by engine and version; commands by which they serve one."""

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from petl.system.towers import is_beside_text

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


class EngineVersion(NamedTuple):
    """An engine in the version whose code was read.

    Attributes:
        lacks: by feature of a LoRA, why the engine cannot serve it, or would compute another
            update. Engines ignore what they do not know: the outputs would be silently wrong.
    """

    name: str
    version: str
    lacks: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


COPIES = "it has trained copies of modules besides the LoRA"
DORA, BIASES = "it is a DoRA", "it has biases"
SCALES = "its layers have several scales, and {engine} reads r and lora_alpha alone"
RANK = f"it has rank {{rank}}, and {{engine}} takes {RANKS[-1]} at most"
WEAK = (
    "it is an rsLoRA, and {engine} ignores use_rslora: the update would be {root:.1f} times too "
    "weak"
)
STACKS = (
    " (if the checkpoints of the model have experts in stacks, as gpt_oss; else first: petl export "
    "RUN OUT --lora --engine vllm)"
)
TYPE = "it is of type {type}, and {engine} serves LoRA alone"
BESIDE = "it adapts layers beside the language model, such as those of images, "
TOWERS = f"{BESIDE}and {{engine}} leaves them as they are in the base"
UNKNOWN = f"{BESIDE}which {{engine}} is not known to apply"  # its code was not read for it
COMMON = {
    "type": TYPE,
    "modules": COPIES,
    "tokens": COPIES,
    "dora": DORA,
    "bias": BIASES,
    "towers": UNKNOWN,
}
ENGINES = {
    "vllm": EngineVersion(
        "vLLM", "0.12", {**COMMON, "scales": SCALES, "rank": RANK, "towers": TOWERS}
    ),
    "sglang": EngineVersion(
        "SGLang", "0.5", {**COMMON, "scales": SCALES, "rank": RANK, "rslora": WEAK}
    ),
    # its converter reads lora_alpha, and the rank of each layer from the tensors
    "llama.cpp": EngineVersion(
        "llama.cpp",
        "",
        {
            **COMMON,
            "alphas": "it has an alpha_pattern, and {engine} reads lora_alpha alone",
            "experts": "it adapts experts that are one parameter, which {engine} cannot name: "
            "serve the model that petl merge writes",
            "rslora": WEAK,
        },
    ),
    "peft": EngineVersion(
        "PEFT", "", {"petl": "it is of type {type}, which PEFT knows after import petl"}
    ),
    "petl": EngineVersion("petl", "", {}),
}


def features(config: Mapping[str, object], adapted: Iterable[str] = ()) -> Iterator[str]:
    """Yield what an adapter has besides the factors of a LoRA with one scale.

    Args:
        adapted: paths of its layers.
    """
    kind = str(config["peft_type"])
    if kind.startswith("PETL_"):
        yield "petl"
    if kind != "LORA":
        yield "type"
        return
    fields = {
        "modules": "modules_to_save",
        "tokens": "trainable_token_indices",
        "dora": "use_dora",
        "experts": "target_parameters",
        "alphas": "alpha_pattern",
        "rslora": "use_rslora",
    }
    yield from (name for name, field in fields.items() if config.get(field))
    if config.get("bias") not in (None, "none") or config.get("lora_bias"):
        yield "bias"
    if any(map(is_beside_text, adapted)):
        yield "towers"
    if len(scales(config)) > 1:
        yield "scales"
    if largest_rank(config) > RANKS[-1]:
        yield "rank"


def refusal(
    config: Mapping[str, object], engine: EngineVersion, adapted: Iterable[str] = ()
) -> str:
    """Return why an engine cannot serve an adapter, or would compute another update; "": it can.

    Args:
        config: as in adapter_config.json.
        adapted: paths of its layers.
    """
    lacking = next((name for name in features(config, adapted) if name in engine.lacks), None)
    if lacking is None:
        return ""
    kind = str(config["peft_type"]).partition(" ")[0]
    rank = largest_rank(config) if kind == "LORA" else 1
    reason = engine.lacks[lacking]
    return reason.format(engine=engine.name, type=kind, rank=rank, root=math.sqrt(rank))


def serving_lines(folder: Path, *, for_vllm: bool = False) -> list[str]:
    """Return what to run so that vLLM and SGLang serve the LoRA in `folder`, or why they cannot.

    Empty unless it is an adapter of a causal language model.

    Args:
        for_vllm: it was written as vLLM reads experts.
    """
    # the table alone is read without torch
    from transformers.utils import CONFIG_NAME

    from petl.core.adapter_folder import Folder
    from petl.training.runs.card_code import BASE

    files = Folder(folder)
    saved, adapted = files.config, files.shapes
    config = {**saved.to_dict(), "peft_type": str(getattr(saved.peft_type, "value", ""))}
    if config["task_type"] != "CAUSAL_LM":
        return []
    # beside an adapter, the config of a base that has no weights on disk
    is_random = (folder / BASE / CONFIG_NAME).is_file()
    base = shlex.quote(str(config["base_model_name_or_path"]))
    adapter = shlex.quote(f"{folder.absolute().name}={folder}")
    # one that is larger than all of them is refused
    rank = next((rank for rank in RANKS if rank >= largest_rank(config)), RANKS[-1])
    commands = {
        "vllm": f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {adapter}",
        "sglang": f"python -m sglang.launch_server --model-path {base} --enable-lora "
        f"--lora-paths {adapter}",
    }
    lines = []
    for key, command in commands.items():
        engine = ENGINES[key]
        reason = (
            "its base model has random weights" if is_random else refusal(config, engine, adapted)
        )
        cannot = f"{engine.name} cannot serve it: {reason}; `petl serve` and a merged model can"
        if key == "vllm" and config.get("target_parameters") and not for_vllm:
            command += STACKS
        lines.append(cannot if reason else f"{engine.name}: {command}")
    return lines


def largest_rank(config: Mapping[str, Any]) -> int:
    """The largest rank of the layers of a LoRA."""
    return max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])


def scales(config: Mapping[str, Any]) -> set[float]:
    """The scales of a LoRA's layers, as far as its patterns show."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    # rsLoRA scales by alpha / sqrt(r), LoRA by alpha / r
    power = 0.5 if config.get("use_rslora") else 1.0
    # "": a layer that no pattern matches
    found = {
        alphas.get(key, config.get("lora_alpha") or 0) / ranks.get(key, config.get("r", 8)) ** power
        for key in ("", *ranks, *alphas)
    }
    # quotients that are equal but for rounding count once
    return {round(scale, 12) for scale in found}
