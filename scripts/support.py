"""Write what follows from the methods: index, signatures, `petl methods`, docs/support.md."""

import ast
import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import make_stubs

from petl import methods
from petl.cli.catalog.listing import write_cache
from petl.cli.catalog.support import HEADINGS, row
from petl.core.registry import build_config, method, refusal
from petl.core.spec.checks import config_hints
from petl.core.spec.config import usual_rule
from petl.core.support import Capability
from petl.methods import BUILT_IN, losses
from petl.system.imports.tables import INDEX, LOSSES, METHODS, Indexed
from petl.system.values import FREE, rule_of, type_name
from petl.testing import CHECKS
from petl.testing.bases import REFUSED

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
# types of fields that the index can hold
PLAIN = {"int", "float", "str", "bool", "list", "dict", "set", "tuple", "None"}
# bases of petl.testing.bases, in words
BASES = {"mamba": "Mamba", "llava": "image-text", "plain": "no config"}
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
tests/adapters/export/test_lora.py). The cells of a row hold for the kinds of base
models in its last column: dense, with stacked experts (Qwen3-MoE, gpt-oss), Mamba, images and text
(LLaVA), and a module of PyTorch without a config. Two do not hold everywhere: exporting a LoRA
for Mamba, since PEFT has none on its `out_proj`; `torch.compile` with experts, at which the graph
breaks (`mos`: it does not), and with images and text, where it breaks in the base model itself.
`corda` and `rslora` adapt experts as `lora` does (tests/methods/corda/test_experts.py,
tests/core/experts/test_lora.py); the cells of their rows are checked on dense models alone.
`python scripts/support.py` writes this page from what methods `lacks`; a test compares it with the
code.

| column | meaning of "yes" | check |
| --- | --- | --- |
"""
MEANINGS = {
    Capability.DDP: "two processes train the same adapter as one process, on the same examples",
    Capability.FSDP: "likewise two processes with sharded parameters (`+launch=fsdp`)",
    Capability.FSDP1: "likewise in FullyShardedDataParallel with `use_orig_params=True`, wrapped "
    "by block and by PEFT's policy",
    Capability.ZERO: "likewise two processes with DeepSpeed ZeRO, stages 1 and 2 "
    "(`+launch=deepspeed`)",
    Capability.BASE_4BIT: "trains and reloads on an NF4 base model, bitsandbytes "
    "(`model.quantization=bnb_4bit`)",
    Capability.BASE_8BIT: "likewise in LLM.int8, bitsandbytes (`bnb_8bit`)",
    Capability.BASE_TORCHAO: "likewise with int8 weights, torchao (`torchao_int8`)",
    Capability.CHECKPOINTING: "the same gradients with `train.gradient_checkpointing=true`",
    Capability.COMPILE: "`torch.compile(fullgraph=True)` compiles the training step without "
    "a graph break",
    Capability.NEW_TOKENS: "rows of tokens train beside the adapter (`data.new_tokens`, "
    "`trainable_token_indices`)",
    Capability.MIXED_BATCH: "`adapter_names`: examples of one batch use different adapters",
    Capability.MERGE: "the model with merged weights has the same outputs (`petl merge`)",
    Capability.LORA_EXPORT: "the exported plain LoRA has the same outputs (`petl export --lora`)",
}


def page() -> str:
    """Return the text of docs/support.md."""
    columns = [
        f"| {heading} | {MEANINGS[key]} | {', '.join(f'`{k}`' for k in checks_of(key))} |"
        for key, heading in HEADINGS.items()
    ]
    # equal reasons share a number
    reasons: dict[str, int] = {}  # reason -> its number in the notes below the table
    rows = []
    for name in BUILT_IN:
        cells = [_cell(reason, reasons) for reason in row(name).values()]
        cells.append(_bases(name))
        rows.append(f"| `{name}` | {method(name).by} | {' | '.join(cells)} |")
    headings = " | ".join([*HEADINGS.values(), "bases"])
    rule = "| --- " * (len(HEADINGS) + 3) + "|"
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    table = "\n".join([f"| method | by | {headings} |", rule, *rows])
    return HEAD + "\n".join(columns) + f"\n\n{table}\n\n" + "\n".join(notes) + "\n"


def _bases(name: str) -> str:
    """The kinds of base models on which the cells of a method's row are checked."""
    if not method(name).own:
        return "dense, experts" if name == "lora" else "dense"
    found = [] if refusal(build_config(name), Capability.EXPERTS) else ["experts"]
    found += [words for base, words in BASES.items() if name not in REFUSED[base]]
    return ", ".join(["dense", *found])


def _cell(reason: str, reasons: dict[str, int]) -> str:
    """A cell of the table; adds a new reason to `reasons`, which numbers them."""
    if not reason:
        return "yes"
    return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"


def checks_of(capability: Capability) -> list[str]:
    """The checks of petl.testing that prove a column."""
    return [name for name, check in CHECKS.items() if check.of is capability]


def index() -> dict[str, dict[str, Any]]:
    """Return the content of petl/methods/index.json, from the modules of methods and losses."""
    for package in (methods, losses):
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    places = adopted()
    return {
        "methods": {
            name: indexed(places.get(name) or type(entry).__module__, entry)
            for name, entry in sorted(METHODS.loaded.items())
            if name in places or type(entry).__module__.startswith(methods.__name__)
        },
        "losses": {
            name: indexed(entry.controller_cls.__module__, entry)
            for name, entry in sorted(LOSSES.loaded.items())
            if entry.controller_cls.__module__.startswith(losses.__name__)
        },
    }


def indexed(module: str, entry: Any) -> dict[str, Any]:
    """Return what the index has of a method or loss."""
    parts = 4 if module.startswith(losses.__name__) else 3  # petl.methods.NAME
    config_cls, tuner = entry.config_cls, getattr(entry, "tuner", None)
    hints = config_hints(config_cls)
    fields = {f.name: declared(f, hints[f.name]) for f in dataclasses.fields(config_cls) if f.init}
    prefix = tuner.prefix if tuner is not None and tuner.__module__.startswith("petl.") else ""
    module = ".".join(module.split(".")[:parts])
    return Indexed(module, config_cls.__name__, fields, prefix)._asdict()


def declared(field: dataclasses.Field, hint: object) -> dict[str, Any]:
    """Return what the index has of a field: its type and its rule, where JSON can hold them."""
    rule = rule_of(field)
    if rule is FREE:
        rule = usual_rule(field.name, field.default)
    words = type_name(hint).replace("null", "None")
    found: dict[str, Any] = {}
    if set(re.findall(r"\w+", words)) <= PLAIN:
        found["type"] = words
    if rule.options:
        return found | {"options": [*rule.options]}
    reason = {"reason": rule.reason} if rule.reason else {}
    return {**found, **rule.bounds, **reason} if rule.bounds else found


def adopted() -> dict[str, str]:
    """Return the module of each call of `adopt`, by the name of the method of PEFT."""
    root, places = Path(methods.__path__[0]), {}
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "adopt":
                name = node.args[0]
                assert isinstance(name, ast.Constant)
                place = file.relative_to(root).with_suffix("").parts
                places[str(name.value)] = ".".join([methods.__name__, *place])
    return places


def index_text() -> str:
    """Return the text of petl/methods/index.json."""
    return json.dumps(index(), indent=1) + "\n"


if __name__ == "__main__":
    INDEX.write_text(index_text())
    PAGE.write_text(page())
    print(f"written: {INDEX}, {PAGE}, {write_cache()} and {make_stubs.write()}")
