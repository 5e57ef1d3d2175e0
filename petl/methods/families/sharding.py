"""Why FSDP1 must not shard an adapter, for several methods."""

from peft import LoraConfig

from petl.core.spec.facts import facts_of


def factors_of_experts(config: LoraConfig) -> str:
    """Return why FSDP1 must not shard a LoRA: it adapts stacked experts; "": it may."""
    if not facts_of(config).target_parameters:
        return ""
    return (
        "factors of stacked experts are read outside of the modules that have them, each of which "
        "PEFT's policy wraps by itself"
    )
