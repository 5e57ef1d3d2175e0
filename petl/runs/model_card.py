"""The model card of a saved adapter (README.md): what it is, and the code that loads it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from petl.files.disk import write_atomic
from petl.files.markup import front_matter, markdown
from petl.models.loading import save_processor
from petl.models.sources import ModelSource, RandomInit
from petl.tasks.base import Task

BASE = "base"  # subfolder for config and processor of a base model that has no files elsewhere
TEXT = """\
{header}
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

`petl.load` raises on missing or unexpected tensors; {also}
"""
RANDOM = """
The base model has random weights: it was not pretrained. The code below initializes it again from
the same seed, with torch {torch} and transformers {transformers}; other versions may initialize it
differently, and the adapter would not fit.
"""
STARTED = "\nTraining started from the adapter in {start}.\n"
OURS = (
    "Import petl before loading: it registers the method with PEFT.",
    "after `import petl`,\n`peft.PeftModel.from_pretrained` loads it as well.",
)
PEFTS = (
    "PEFT supports this type of adapter, {type}, without petl.",
    "without petl,\n`peft.PeftModel.from_pretrained` loads it as well.",
)


def write_readme(
    model: PeftModel,
    task: Task,
    source: ModelSource,
    names: tuple[str, str],
    folder: Path,
    place: Path,
    start: str | None = None,
) -> None:
    """Write the README of an adapter into `folder`, which will be renamed to `place`.

    For a base model with random weights, also write its config and processor, in a subfolder.

    Args:
        source: of the base model.
        names: of the method and of the data.
        start: where the adapter is that the training started from; None for a new one.
    """
    base: Any = model.get_base_model()
    method, data = names
    if isinstance(source, RandomInit):  # no hub or folder has its config and processor
        base.config.save_pretrained(folder / BASE)
        save_processor(source, task, folder / BASE)
        build = random_init_code(task, source, place)
    else:
        build = pretrained_code(task, source, str(base.name_or_path))
    # the saved type: that of the config object is a subclass for some methods
    peft_type = str(model.active_peft_config.to_dict()["peft_type"]).rpartition(".")[2]
    if start is not None:
        build["note"] += STARTED.format(start=markdown(start))
    needs, also = OURS if peft_type.startswith("PETL_") else PEFTS
    classes = f"\nclasses = {task.labels!r}" if task.labels else ""
    # names are escaped; values in the code are literals, in which `repr` escapes
    text = TEXT.format(  # paths are those of the final place, not of the draft
        header=front_matter({"library_name": "peft", "base_model": build.pop("base")}),
        **build,
        needs=needs.format(type=peft_type),
        also=also,
        method=markdown(method),
        model=markdown(source.name),
        data=markdown(data),
        processor=task.processor_class.__name__,
        word="tokenizer" if task.reads_text else "processor",
        folder=str(place.absolute()),
        classes=classes,
    )
    write_atomic(folder / "README.md", text)


def pretrained_code(task: Task, source: ModelSource, base: str) -> dict[str, str]:
    """Return the parts of `TEXT` with the code that loads a pretrained base model."""
    location = [repr(base)]
    revision = getattr(source, "revision", None)
    if revision:
        location.append(f"revision={revision!r}")
    if getattr(source, "trust_remote_code", False):
        location.append("trust_remote_code=True")
    kwargs = {"dtype": source.dtype, **task.model_kwargs()}
    if "num_labels" in kwargs:  # the adapter has the head; that of the base model may differ
        kwargs["ignore_mismatched_sizes"] = True
    options = [f"{k}={v!r}" for k, v in kwargs.items() if k not in ("id2label", "label2id")]
    auto, processor = task.auto_class.__name__, task.processor_class.__name__
    return {
        "base": base,
        "note": "",
        "imports": f"from transformers import {auto}, {processor}",
        "build": f"base = {auto}.from_pretrained({', '.join([*location, *options])})",
        "location": ", ".join(location),
    }


def random_init_code(task: Task, source: RandomInit, place: Path) -> dict[str, str]:
    """Return the parts of `TEXT` with the code that initializes a random base model again."""
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
