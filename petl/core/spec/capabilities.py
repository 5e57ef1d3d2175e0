"""Capabilities of methods, such as FSDP2 or a 4-bit base: the columns of docs/support.md.

A method has a capability unless its `unsupported` (see `petl.core.spec.method.Method`) has a reason
against it. Checks of `petl.testing` prove both: that it works, or that it raises with that reason.
"""

from typing import NamedTuple


class Capability(NamedTuple):
    """A column of the table: its heading, and its checks, one of which applies to a method."""

    heading: str
    checks: tuple[str, ...]


# in the order of the table's columns; checks are names of functions in petl.testing
CAPABILITIES = {
    "ddp": Capability("DDP", ("two_processes_equal_one",)),
    "fsdp": Capability("FSDP2", ("sharded_processes_equal_one",)),
    "deepspeed": Capability("DeepSpeed", ("zero_processes_equal_one",)),
    "4bit": Capability("4-bit base", ("trains_on_a_4bit_base",)),
    "8bit": Capability("8-bit base", ("trains_on_an_8bit_base",)),
    "torchao": Capability("torchao base", ("trains_on_a_torchao_base",)),
    "checkpointing": Capability(
        "gradient checkpointing", ("checkpointing_gives_the_same_gradients",)
    ),
    "compile": Capability("torch.compile", ("model_compiles_whole",)),
    "mixed": Capability("mixed batch", ("mixed_batch_equals_single_runs",)),
    "merge": Capability(
        "merge", ("merged_model_computes_the_same", "merging_is_refused_before_anything_changes")
    ),
    "lora": Capability("LoRA export", ("exports_as_a_plain_lora", "export_as_lora_is_refused")),
}


def capability_of(check: str) -> str:
    """Return the capability to which a check belongs, or ""."""
    return next(
        (name for name, capability in CAPABILITIES.items() if check in capability.checks), ""
    )
