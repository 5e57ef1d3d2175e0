"""The rows of a job, encoded once: all variants and seeds read the same."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bench.jobs.definitions import Job, model_words
from petl.core.registry import wrap
from petl.data.models.loading import load_base, load_processor
from petl.system.files.disk import atomic_folder
from petl.system.files.read import read_json
from petl.training.compose import compose
from petl.training.dataloader import Splits, batched, encode_splits
from petl.training.features import Setup, features_of
from petl.training.runs.config import RunConfig
from petl.training.runs.run_config import read_config
from petl.training.wrapping import train_new_modules

SETTINGS = (
    "epochs", "batch_size", "eval_batch_size", "weight_decay", "warmup", "max_grad_norm",
)  # fmt: skip
RANKED = ("_role", "_id", "_relevant")  # of queries and documents that are scored
LORA = ("r", "lora_alpha", "target_modules", "modules_to_save", "task_type", "bias")


def export(job: Job, words: list[str], folder: Path, where: Path) -> dict[str, Any]:
    """Write rows, LoRA config and settings of a job, unless they are there; return the latter.

    Args:
        words: of `petl train`: data, length of training.
        folder: of all jobs.
        where: the folder to write.
    """
    words = [*words, *model_words(job, folder)]
    if where.is_dir():
        about = read_json(where / "about.json", dict[str, Any])
        if about["words"] == words:
            return about
        shutil.rmtree(where)  # of other settings
    # held out as `petl train` does it
    config = read_config(compose(["+method=lora", *words, "train.eval_steps=1"]))
    data = config.data.read()
    processor = load_processor(config.model, data.task)
    accelerator = Accelerator(cpu=True)
    splits = encode_splits(data, processor, config.train, accelerator)
    whole = read_config(compose(["+method=lora", *words]))
    rows = encode_splits(data, processor, whole.train, accelerator)
    about = {
        "words": words,
        "task": data.task.name,
        "metric": data.task.metric,
        "higher_is_better": data.task.higher_is_better,
        "rows": {"train": len(rows.known), "rest": len(splits.known), "test": len(rows.test)},
        "lora": lora_of(config, splits, processor),
        "model": str(config.model.where()),
        "max_length": getattr(data.task, "max_length", None),
        "arguments": data.task.model_kwargs(),
        "settings": {name: getattr(config.train, name) for name in SETTINGS},
        "rates": {"lr": config.train.lr, "head_lr": config.train.head_lr or config.train.lr},
    }
    parts = {
        "train": rows.known,
        "test": rows.test,
        "rest": splits.known,
        "validation": splits.validation,
    }
    with atomic_folder(where) as draft:
        for name, part in parts.items():
            ranked = [column for column in RANKED if column in part.column_names]
            part.select_columns([*batched(part), *ranked]).save_to_disk(str(draft / name))
        (draft / "about.json").write_text(json.dumps(about, indent=1, default=str))
    return read_json(where / "about.json", dict[str, Any])


def lora_of(config: RunConfig, splits: Splits, processor: Any) -> dict[str, Any]:
    """Return the fields of the LoRA config that petl makes of its defaults, for `LoraConfig`."""
    fields = Setup(load_base, config, splits, features_of(config.resolved)).fields()
    base = load_base(config.model, splits.task, processor=processor)
    made = wrap(base, **train_new_modules(fields, base)).active_peft_config.to_dict()
    return {name: sorted(v) if isinstance(v := made[name], set) else v for name in LORA}
