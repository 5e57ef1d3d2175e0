"""The README of a saved adapter: what it is, and code that loads it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from petl.models.loading import load_processor
from petl.models.sources import ModelSource, RandomInit
from petl.tasks.base import Task

BASE = "base"  # in the adapter's folder: config and processor of a base with random weights
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
The base model has random weights: nothing was learned before this adapter and its head. The code
draws them again from the seed below, with torch {torch} and transformers {transformers}; other
versions may draw other values, which the adapter would not fit.
"""
OURS = (
    "Import petl before loading: it registers the method with PEFT.",
    "after `import petl`,\n`peft.PeftModel.from_pretrained` loads it as well.",
)
PEFTS = (
    "The adapter is of PEFT's own type {kind}.",
    "without petl,\n`peft.PeftModel.from_pretrained` loads it as well.",
)


def write_readme(
    model: PeftModel,
    task: Task,
    source: ModelSource,
    names: tuple[str, str],
    folder: Path,
    place: Path,
) -> None:
    """Write the README of an adapter into `folder`, which will be renamed to `place`.

    For a base model with random weights, also write its config and processor.

    Args:
        source: of the base model.
        names: of the method and of the data.
    """
    base: Any = model.get_base_model()
    method, data = names
    if isinstance(source, RandomInit):
        base.config.save_pretrained(folder / BASE)
        load_processor(source, task).save_pretrained(folder / BASE)
        build = random_base(task, source, place)
    else:
        build = pretrained_base(task, source, str(base.name_or_path))
    kind = str(model.active_peft_config.to_dict()["peft_type"]).rpartition(".")[2]  # of the file
    needs, also = OURS if kind.startswith("PETL_") else PEFTS
    classes = f"\nclasses = {task.labels!r}" if task.labels else ""
    text = TEXT.format(
        **build,
        needs=needs.format(kind=kind),
        also=also,
        method=method,
        model=source.name,
        data=data,
        processor=task.processor_class.__name__,
        word="tokenizer" if task.reads_text else "processor",
        folder=str(place.absolute()),
        classes=classes,
    )
    (folder / "README.md").write_text(text)


def pretrained_base(task: Task, source: ModelSource, base: str) -> dict[str, str]:
    """Return the parts of the text that load a pretrained base."""
    places = [repr(base)]
    revision = getattr(source, "revision", None)
    if revision:
        places.append(f"revision={revision!r}")
    if getattr(source, "trust_remote_code", False):
        places.append("trust_remote_code=True")
    options = {"dtype": source.dtype, **task.model_kwargs()}
    if "num_labels" in options:  # the adapter has the head; the base's file may have another one
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


def random_base(task: Task, source: RandomInit, place: Path) -> dict[str, str]:
    """Return the parts of the text that draw a base with random weights again."""
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
