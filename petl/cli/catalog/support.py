"""Which features each method supports: docs/support.md, and lines of `petl show NAME`."""

from pathlib import Path
from typing import Any

from peft import PeftConfig

from petl.core.refusals import is_lora, lora_refusal, merge_refusal
from petl.core.registry import build_config, method, refusal
from petl.core.spec.capabilities import CAPABILITIES
from petl.methods import BUILT_IN
from petl.system.settings.command_line import preset_of
from petl.training.runs.settings import method_fields

STEPS = 1000  # length of a run, for methods with a schedule (assumption)
PAGE = Path("docs") / "support.md"
HEAD = """\
# What works together

Each method with several processes, quantized base models, gradient checkpointing, `torch.compile`,
mixed batches, merging and LoRA export. "yes" means that a check of it passes for the method; "no"
means that it is refused, and the reason has the number in parentheses in the list at the end.
Quantized base models need `pip install 'petl-peft[quantized]'`, DeepSpeed needs
`pip install 'petl-peft[deepspeed]'`.

The checks use the fields of tests/contract/test_contract.py. Run one with

    pytest -m 'slow or not slow' tests/contract/test_contract.py -k 'NAME-llama-CHECK'

(for PEFT's own LoRA, which is a plain LoRA already, `test_a_lora_of_pefts_own_is_copied` of
tests/export/test_lora.py). `python scripts/support.py` writes this page from `Method.unsupported`,
`merge_refusal` and `lora_refusal`; a test compares it with the code.

| column | meaning of "yes" | check |
| --- | --- | --- |
"""
MEANINGS = {
    "ddp": "two processes train the same adapter as one process, on the same examples",
    "fsdp": "likewise two processes with sharded parameters (`+launch=fsdp`)",
    "deepspeed": "likewise two processes with DeepSpeed ZeRO, stages 1 and 2 (`+launch=deepspeed`)",
    "4bit": "trains and reloads on an NF4 base model, bitsandbytes (`model.quantization=bnb_4bit`)",
    "8bit": "likewise in LLM.int8, bitsandbytes (`bnb_8bit`)",
    "torchao": "likewise with int8 weights, torchao (`torchao_int8`)",
    "checkpointing": "the same gradients with `train.gradient_checkpointing=true`",
    "compile": "`torch.compile(fullgraph=True)` compiles the training step without a graph break",
    "mixed": "`adapter_names`: examples of one batch use different adapters",
    "merge": "the model with merged weights has the same outputs (`petl merge`)",
    "lora": "the exported plain LoRA has the same outputs (`petl export --lora`)",
}


def default_config(name: str) -> PeftConfig:
    """Return the config of a method with the settings of its YAML."""
    # without a YAML, as for a method of another package, its defaults
    return build_config(**method_fields(preset_of(name) or {"name": name}, None, STEPS))


def row(name: str) -> dict[str, str]:
    """Return, by capability, why a method with its YAML does not support it; "" if it does."""
    config: Any = default_config(name)
    reasons = {capability: refusal(config, capability) for capability in CAPABILITIES}
    # these two are decided when an adapter is merged or exported, not by `Method.unsupported`
    reasons["merge"] = merge_refusal(config) or ""
    reasons["lora"] = "" if is_lora(config) else lora_refusal(config) or ""
    return reasons


def lines_of(name: str) -> list[str]:
    """Return what a method supports, and what it does not with the reasons, for its page."""
    reasons = row(name)
    works = [CAPABILITIES[key].heading for key, reason in reasons.items() if not reason]
    refused = [
        f"{'merging' if key == 'merge' else CAPABILITIES[key].heading}: not supported ({reason})"
        for key, reason in reasons.items()
        if reason
    ]
    return [f"supports: {', '.join(works)}", *refused]


def page() -> str:
    """Return the text of docs/support.md."""
    columns = [
        f"| {c.heading} | {MEANINGS[name]} | {', '.join(f'`{k}`' for k in c.checks)} |"
        for name, c in CAPABILITIES.items()
    ]
    # equal reasons share a number
    reasons: dict[str, int] = {}  # reason -> its number in the notes below the table
    rows = []
    for name in BUILT_IN:
        cells = [_cell(reason, reasons) for reason in row(name).values()]
        rows.append(f"| `{name}` | {method(name).by} | {' | '.join(cells)} |")
    headings = " | ".join(capability.heading for capability in CAPABILITIES.values())
    rule = "| --- " * (len(CAPABILITIES) + 2) + "|"
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    table = "\n".join([f"| method | by | {headings} |", rule, *rows])
    return HEAD + "\n".join(columns) + f"\n\n{table}\n\n" + "\n".join(notes) + "\n"


def _cell(reason: str, reasons: dict[str, int]) -> str:
    """A cell of the table; adds a new reason to `reasons`, which numbers them."""
    if not reason:
        return "yes"
    return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
