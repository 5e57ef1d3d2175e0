"""The README beside a saved adapter: what it is, and lines that load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from petl.models.loading import load_processor
from petl.models.sources import RandomInit, read_source
from petl.tasks.base import Task

BASE = "base"  # folder in the adapter's: config and processor of a base that has no file elsewhere
TEXT = """\
---
library_name: peft
base_model: {base}
---

# {method} adapter for {model}, trained on {data}
{note}
{needs}

```python
import petl
{imports}

{build}
model = petl.load(base, {folder!r}){classes}
{word} = {processor}.from_pretrained({location})
```

`petl.load` refuses a file with missing or unexpected tensors; {also}
"""
RANDOM = """
The base model has random weights: nothing was learned before this adapter and its head. They are
drawn anew from the seed below, with torch {torch} and transformers {transformers}; other versions
may draw others, which the adapter would not fit.
"""
OURS = (
    "Import petl before loading: PEFT learns the method from it.",
    "after `import petl`,\n`peft.PeftModel.from_pretrained` loads it as well.",
)
PEFTS = (
    "PEFT knows this kind of adapter, {kind}, by itself.",
    "without petl,\n`peft.PeftModel.from_pretrained` loads it as well.",
)


def write_readme(
    model: PeftModel, task: Task, config: Mapping[str, Any], folder: Path, place: Path
) -> None:
    """Write the README of an adapter into `folder`, which is to become `place`.

    Beside it, the config and processor of a base model that was made from a config alone.
    """
    base: Any = model.get_base_model()
    source = read_source(config["model"])
    if isinstance(source, RandomInit):
        base.config.save_pretrained(folder / BASE)
        load_processor(config["model"], task).save_pretrained(folder / BASE)
        build = drawing(task, source, place)
    else:
        build = reading(task, config["model"], str(base.name_or_path))
    kind = str(model.active_peft_config.to_dict()["peft_type"]).rpartition(".")[2]  # of the file
    needs, also = OURS if kind.startswith("PETL_") else PEFTS
    classes = f"\nclasses = {task.labels!r}" if task.labels else ""
    text = TEXT.format(
        **build,
        needs=needs.format(kind=kind),
        also=also,
        method=config["method"]["name"],
        model=config["model"]["name"],
        data=config["data"]["name"],
        processor=task.processor_class.__name__,
        word="tokenizer" if task.reads_text else "processor",
        folder=str(place.absolute()),
        classes=classes,
    )
    (folder / "README.md").write_text(text)


def reading(task: Task, cfg: Mapping[str, Any], base: str) -> dict[str, str]:
    """The parts of the text that tell how a pretrained base is read."""
    places = [repr(base)]
    if cfg.get("revision"):
        places.append(f"revision={cfg['revision']!r}")
    if cfg.get("trust_remote_code"):
        places.append("trust_remote_code=True")
    options = {"dtype": cfg.get("dtype", "float32"), **task.model_kwargs()}
    if "num_labels" in options:  # the head is the adapter's, whatever the base's file has
        options["ignore_mismatched_sizes"] = True
    shaping = [f"{k}={v!r}" for k, v in options.items() if k not in ("id2label", "label2id")]
    auto, processor = task.auto_class.__name__, task.processor_class.__name__
    return {
        "base": base,
        "note": "",
        "imports": f"from transformers import {auto}, {processor}",
        "build": f"base = {auto}.from_pretrained({', '.join([*places, *shaping])})",
        "location": ", ".join(places),
    }


def drawing(task: Task, source: RandomInit, place: Path) -> dict[str, str]:
    """The parts of the text that tell how a base with random weights is drawn again."""
    auto, processor = task.auto_class.__name__, task.processor_class.__name__
    folder = repr(str(place.absolute() / BASE))
    return {
        "base": f"random weights, {source.name}",
        "note": RANDOM.format(torch=torch.__version__, transformers=transformers.__version__),
        "imports": f"import torch\nfrom transformers import AutoConfig, {auto}, {processor}",
        "build": (
            f"config = AutoConfig.from_pretrained({folder})\n"
            f"torch.manual_seed({source.seed})\n"
            f"base = {auto}.from_config(config, dtype=torch.{source.dtype})"
        ),
        "location": folder,
    }
