"""Writes docs/models.md from the results of the sweep."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from packaging.version import Version

import petl
from architectures.small import KINDS
from architectures.sweep import Results

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
RARE = 0.2  # share of the types on which a method works that is made for a few kinds of models
FIRST = ("lora", "mola")  # run on all types
HEAD = """\
# Models

Every type of model of transformers {version} that is in its auto maps {maps},
and builds from a small config on a CPU, with the methods of petl and of PEFT through petl. Types of
other maps alone were not run, such as object detection, segmentation and masks, depth, video, time
series, keypoints, text to sound. {built} of {all} types build; LoRA and MoLA
were run on all of these{others}. A run wraps the model with the
fields of the method's YAML (targets: `block-linear`, or what the method chooses), takes two steps,
saves, loads into a new model, and merges. The outputs after loading are equal to the bit but for
rounding (1e-5) where a kernel sums in another order (2e-5 for a method that takes weights of the
base apart), those after merging to 1e-3. Of causal models, loss and gradients of LoRA under the
rewrites that `petl train` makes by default are those without (1e-4). Models for images and text get
texts.

**{works} of {pairs} pairs of a type and a method work, {refused} are refused before training, with
a reason; broken: {broken}. {silent} of {compared} types are silent: what petl says that LoRA
reaches is the share of the block weights that merging changes, and trained tensors without a
gradient are named, those of experts in longer runs only. {unreachable} types are unreachable: no
method works on them.**
`python scripts/architectures.py` runs it, and
`pytest -m slow tests/scripts/test_architectures.py` compares each pair with this page.

`reached` is the share of the weights in the blocks that LoRA adapts; petl logs it, with what is
missed, when it wraps a model; the reasons are under "What LoRA does not reach". `unused`: LoRA
trains tensors that get no gradient in a run of texts, which the log names after the first steps.
"""


def page(results: Results) -> str:
    """Return the text of docs/models.md."""
    built = {name: row for name, row in results.items() if "reason" not in row}
    rare = _rare(built)
    found = [f for row in built.values() for f in row["methods"].values()]
    verdicts = [each["verdict"] for each in found]
    methods = petl.list_methods()
    complete = sum(len(row["methods"]) == len(methods) for row in built.values())
    text = HEAD.format(
        version=max((row["transformers"] for row in results.values()), key=Version),
        maps=", ".join(f"`{each}`" for maps in KINDS.values() for each in maps),
        built=len(built),
        all=len(results),
        others=f", all {len(methods)} methods on {complete}" if complete else "",
        pairs=len(found),
        works=verdicts.count("works"),
        refused=verdicts.count("refused"),
        broken=verdicts.count("broken"),
        silent=sum(any(f.get("silent") for f in row["methods"].values()) for row in built.values()),
        compared=sum("changed" in row["methods"].get("lora", {}) for row in built.values()),
        unreachable=sum(not _works(row) for row in built.values()),
    )
    notes: dict[str, int] = {}  # reason -> number
    for kind in KINDS:
        text += f"\n## {kind}\n\n" + _table(kind, built, rare, notes)
    text += "\n## What LoRA does not reach\n\n" + _missed(built)
    text += "\n## Reasons\n\n" + "".join(f"{n}. {reason}\n" for reason, n in notes.items())
    if rare:
        text += "\n## Methods for a few kinds of models\n\n" + "".join(
            f"- `{method}`: {', '.join(sorted(types)) or 'none of these types'}\n"
            for method, types in rare.items()
        )
    missing = {name: row["reason"] for name, row in results.items() if "reason" in row}
    groups = defaultdict(list)
    for name, reason in missing.items():
        groups[_short(reason, results[name]["class"])].append(name)
    text += "\n## Types that were not built\n\n" + "".join(
        f"- {', '.join(names)}: {reason}\n" for reason, names in sorted(groups.items())
    )
    return text


def _works(row: dict[str, Any]) -> bool:
    return any(found["verdict"] == "works" for found in row["methods"].values())


def _missed(built: Results) -> str:
    """Return for each reason the kinds of layers that LoRA leaves out for it, with their types."""
    by_reason: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, row in built.items():
        by_kinds: dict[str, list[str]] = defaultdict(list)
        for kind, reason in row["methods"].get("lora", {}).get("missed", {}).items():
            by_kinds[reason].append(f"`{kind}`")
        for reason, kinds in by_kinds.items():
            by_reason[reason][", ".join(sorted(kinds))].append(name.partition("/")[2])
    return "".join(
        f"- {reason}:\n"
        + "".join(
            f"  - {kinds}: {', '.join(dict.fromkeys(types))}\n"
            for kinds, types in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))
        )
        for reason, groups in sorted(by_reason.items())
    )


def _rare(built: Results) -> dict[str, list[str]]:
    """Return the methods made for a few kinds of models, with the types on which they work."""
    works, run = defaultdict(list), defaultdict(int)
    for name, row in built.items():
        for method, found in row["methods"].items():
            run[method] += 1
            works[method] += [name] * (found["verdict"] == "works")
    return {m: works[m] for m in sorted(run) if len(works[m]) < RARE * run[m]}


def _table(kind: str, built: Results, rare: dict[str, list[str]], notes: dict[str, int]) -> str:
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, row in built.items():
        if name.startswith(f"{kind}/"):
            groups[_reached(row), _unused(row), _others(row, rare, notes)].append(name)
    lines = ["| types | reached | unused | do not work |", "| --- | --- | --- | --- |"]
    for (reached, unused, others), names in sorted(groups.items(), key=lambda g: -len(g[1])):
        types = ", ".join(name.partition("/")[2] for name in names)
        lines.append(f"| {types} | {reached} | {unused} | {others} |")
    return "\n".join(lines) + "\n"


def _reached(row: dict[str, Any]) -> str:
    share = row["methods"].get("lora", {}).get("coverage")
    if share is None:
        return ""
    for bound, words in ((0.995, "100 %"), (0.95, "95 %"), (0.9, "90 %"), (0.5, "50 to 90 %")):
        if share >= bound:
            return words if bound in (0.995, 0.5) else f"from {words}"
    return "below 50 %"


def _unused(row: dict[str, Any]) -> str:
    return "yes" if row["methods"].get("lora", {}).get("no_gradient") else ""


def _others(row: dict[str, Any], rare: dict[str, list[str]], notes: dict[str, int]) -> str:
    """Return the methods that do not work on a type, with the numbers of the reasons."""
    by_reason = defaultdict(list)
    for method, found in row["methods"].items():
        if found["verdict"] != "works" and method not in rare:
            reason = _short(found["detail"], row["class"])
            if found["verdict"] == "broken":
                reason = f"**not refused:** {reason}"
            by_reason[notes.setdefault(reason, len(notes) + 1)].append(method)
    cells = [f"{', '.join(sorted(each))} ({n})" for n, each in sorted(by_reason.items())]
    if len(row["methods"]) == len(FIRST):
        cells.append("others: not run")
    return "; ".join(cells)


def _short(reason: str, class_name: str) -> str:
    """Return a reason without names that differ between models."""
    reason = reason.replace(class_name, "the model").replace("|", "/")
    reason = re.sub(r"\b[A-Z]\w+Model\b", "the model", reason)
    reason = re.sub(r"model_type='[\w-]+'", "its type", reason)
    reason = re.sub(r"\d+\.\de[-+]\d+", "...", reason)
    reason = re.sub(r"\b[\w*]+(\.[\w*]+)*\.\d+(\.\w+)*", "a module", reason)
    reason = re.sub(r"\d[\d,]*", "N", reason)
    return reason[:200]
