"""What each method goes together with: rows of docs/support.md, and of `petl show NAME`."""

from pathlib import Path
from typing import Any

from peft import PeftConfig

from petl.config.compose import preset_of
from petl.config.method_fields import method_fields
from petl.core.refusals import is_lora, lora_refusal, merge_refusal
from petl.core.registry import build_config, method, refusal
from petl.core.spec.capabilities import CAPABILITIES
from petl.methods import BUILT_IN

STEPS = 1000  # of a run, for methods that change on a schedule
PAGE = Path("docs") / "support.md"
HEAD = """\
# What goes together with what

Written by `python scripts/support.py` from what the code says (`Method.unsupported`,
`merge_refusal`, `lora_refusal`); a test compares the two. "yes" means that the check named below
passes on the method, with the fields of tests/contract/test_contract.py, and a number that it is
refused with the words that stand there. Run a check by

    pytest -m 'slow or not slow' tests/contract/test_contract.py -k 'NAME-llama-CHECK'

(`test_a_lora_of_pefts_own_is_copied` of tests/export/test_export.py for PEFT's own LoRA, which is
one already.) Quantised bases need `pip install -e '.[quantized]'`, DeepSpeed `'.[deepspeed]'`.

| column | what it says | check |
| --- | --- | --- |
"""
MEANINGS = {
    "ddp": "two processes end with the adapter of one, on the same rows",
    "fsdp": "so do two processes that hold shares of every tensor (`+launch=fsdp`)",
    "deepspeed": "so do two with DeepSpeed's ZeRO, stages 1 and 2 (`+launch=deepspeed`)",
    "4bit": "trains and reloads on a base in NF4, bitsandbytes (`model.quantization=bnb_4bit`)",
    "8bit": "likewise in 8 bits, bitsandbytes (`bnb_8bit`)",
    "torchao": "likewise in 8-bit weights, torchao (`torchao_int8`)",
    "checkpointing": "the same gradients with `train.gradient_checkpointing=true`",
    "compile": "`torch.compile(fullgraph=True)` takes the training step without a graph break",
    "mixed": "`adapter_names`: rows of one batch through different adapters",
    "merge": "merged into a dense base, the model computes the same (`petl merge`)",
    "lora": "written as a plain LoRA, it computes the same (`petl export --lora`)",
}


def default_config(name: str) -> PeftConfig:
    """The config of a method as its YAML has it."""
    return build_config(**method_fields(preset_of(name) or {"name": name}, None, STEPS))


def row(name: str) -> dict[str, str]:
    """By ability, why the method `name`, as its YAML has it, does not have it; "" if it does."""
    config: Any = default_config(name)
    found = {capability: refusal(config, capability) for capability in CAPABILITIES}
    found["merge"] = merge_refusal(config) or ""
    found["lora"] = "" if is_lora(config) else lora_refusal(config) or ""
    return found


def lines_of(name: str) -> list[str]:
    """What the method goes together with, and what it refuses, for a reader of its page."""
    found = row(name)
    works = [CAPABILITIES[capability].heading for capability, reason in found.items() if not reason]
    refused = [
        f"  not {CAPABILITIES[a].heading}: {reason}" for a, reason in found.items() if reason
    ]
    return [f"works with: {', '.join(works)}", *refused]


def page() -> str:
    """docs/support.md."""
    columns = [
        f"| {c.heading} | {MEANINGS[name]} | {', '.join(f'`{k}`' for k in c.checks)} |"
        for name, c in CAPABILITIES.items()
    ]
    reasons: dict[str, int] = {}
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
    if not reason:
        return "yes"
    return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
