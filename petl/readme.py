"""The README beside a saved adapter: what it is, and lines that load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from petl.tasks import Task

TEXT = """\
---
library_name: peft
base_model: {base}
---

# {method} adapter for {model}, trained on {data}

{needs}

```python
import petl
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({arguments})
model = petl.load(base, {folder!r}){classes}
tokenizer = AutoTokenizer.from_pretrained({location})
```

`petl.load` refuses a file with missing or unexpected tensors; {also}
"""
OURS = (
    "Import petl before loading: PEFT learns the method from it.",
    "after `import petl`,\n`peft.PeftModel.from_pretrained` loads it as well.",
)
PEFTS = (
    "PEFT knows this kind of adapter, {kind}, by itself.",
    "without petl,\n`peft.PeftModel.from_pretrained` loads it as well.",
)


def adapter_readme(model: PeftModel, task: Task, config: Mapping[str, Any], folder: Path) -> str:
    """The README of the adapter in `folder`, for the run with this configuration."""
    base = model.get_base_model()
    cfg = config["model"]
    places = [repr(str(base.name_or_path))]
    if cfg.get("revision"):
        places.append(f"revision={cfg['revision']!r}")
    if cfg.get("trust_remote_code"):
        places.append("trust_remote_code=True")
    options = {"dtype": cfg.get("dtype", "float32"), **task.model_kwargs()}
    if "num_labels" in options:  # the head is the adapter's, whatever the base's file has
        options["ignore_mismatched_sizes"] = True
    shaping = [f"{k}={v!r}" for k, v in options.items() if k not in ("id2label", "label2id")]
    kind = str(model.active_peft_config.to_dict()["peft_type"]).rpartition(".")[2]  # of the file
    needs, also = OURS if kind.startswith("PETL_") else PEFTS
    classes = f"\nclasses = {task.labels!r}" if task.labels else ""
    return TEXT.format(
        needs=needs.format(kind=kind),
        also=also,
        base=base.name_or_path,
        method=config["method"]["name"],
        model=cfg["name"],
        data=config["data"]["name"],
        auto_class=task.auto_class.__name__,
        arguments=", ".join([*places, *shaping]),
        location=", ".join(places),
        folder=str(folder.absolute()),
        classes=classes,
    )
