"""Which features each method supports: docs/support.md, and lines of `petl show NAME`."""

from peft import PeftConfig

from petl.core.registry import build_config, refusal
from petl.core.support import Capability
from petl.system.settings.command_line import preset_of
from petl.training.runs.config import method_fields

STEPS = 1000  # length of a run, for methods with a schedule (assumption)
# the columns of docs/support.md, in order
HEADINGS = {
    Capability.DDP: "DDP",
    Capability.FSDP: "FSDP2",
    Capability.FSDP1: "FSDP1",
    Capability.ZERO: "DeepSpeed",
    Capability.BASE_4BIT: "4-bit base",
    Capability.BASE_8BIT: "8-bit base",
    Capability.BASE_TORCHAO: "torchao base",
    Capability.CHECKPOINTING: "gradient checkpointing",
    Capability.COMPILE: "torch.compile",
    Capability.NEW_TOKENS: "new tokens",
    Capability.MIXED_BATCH: "mixed batch",
    Capability.MERGE: "merge",
    Capability.LORA_EXPORT: "LoRA export",
}


def default_config(name: str) -> PeftConfig:
    """Return the config of a method with the settings of its YAML."""
    # without a YAML, as for a method of another package, its defaults
    return build_config(**method_fields(preset_of(name) or {"name": name}, None, STEPS))


def row(name: str) -> dict[Capability, str]:
    """Return, by capability, why a method with its YAML does not support it; "" if it does."""
    config = default_config(name)
    return {capability: refusal(config, capability) for capability in HEADINGS}


def lines_of(name: str) -> list[str]:
    """Return what a method supports, and what it does not with the reasons, for its page."""
    reasons = row(name)
    works = [HEADINGS[key] for key, reason in reasons.items() if not reason]
    refused = [
        f"{'merging' if key is Capability.MERGE else HEADINGS[key]}: not supported ({reason})"
        for key, reason in reasons.items()
        if reason
    ]
    return [f"supports: {', '.join(works)}", *refused]
