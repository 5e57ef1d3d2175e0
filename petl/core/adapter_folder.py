"""Read config and weights of a saved adapter from a folder or the hub, without running code."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from petl.core.compat import config_class
from petl.core.spec.config import check_values
from petl.core.spec.facts import Facts, facts_of
from petl.errors import InputError, first_line, shown
from petl.system.files.read import read_json
from petl.system.files.tensor_file import check_finite

CONFIG = "adapter_config.json"

MAX_BLOCKS = 1_000  # of a model with layer_replication; assumption: the deepest have some hundred
# arguments of `PeftConfig.from_pretrained` that locate an adapter on the hub
ON_THE_HUB = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
# command that converts a pickle file to safetensors
CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    f"save_file(torch.load('{WEIGHTS_NAME}', map_location='cpu', weights_only=True), "
    f"'{SAFETENSORS_WEIGHTS_NAME}')\""
)


def read_config(path: str | Path, **where: Any) -> PeftConfig:
    """Read the config of the adapter in folder `path`, or in the hub repository of that name.

    Args:
        path: the folder or repository.
        where: arguments of `ON_THE_HUB`.

    Raises:
        InputError: there is no adapter, its config cannot be read, has a value of the wrong type or
            out of range, or makes PEFT read a file that could contain code or repeat blocks
            thousands of times, or its method is unknown.
    """
    # checked before PEFT reads it, whose errors are hard to understand
    _check_config(config_file(path, **where))
    try:
        config = PeftConfig.from_pretrained(str(path), **where)
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise InputError(
            f"no adapter can be read from {str(path)!r}: {first_line(error)}"
        ) from error
    module = facts_of(config).megatron_core
    if module != Facts.megatron_core:  # PEFT imports it by this name
        raise InputError(
            f"{path} has megatron_core={module!r}, a module that PEFT would import; allowed is "
            f"only {Facts.megatron_core}"
        )
    replicas = facts_of(config).layer_replication or ()
    blocks = sum(max(end - start, 0) for start, end in replicas)
    if blocks > MAX_BLOCKS:  # PEFT clones each
        raise InputError(
            f"{path} has layer_replication of {len(replicas)} ranges with {blocks:,} blocks; list "
            f"at most {MAX_BLOCKS:,}"
        )
    start = facts_of(config).prompt_tuning_init_state_dict_path
    if start and not start.endswith(".safetensors"):  # PEFT unpickles it when it creates prompts
        raise InputError(
            f"{path} has prompt_tuning_init_state_dict_path={start!r}, a file that could contain "
            "code: set it to null, the prompts themselves are in the adapter's file"
        )
    return config


def config_file(path: str | Path, **where: Any) -> Path:
    """Return the config file of the adapter in folder `path`, or in that hub repository.

    Raises:
        InputError: there is none.
    """
    if not Path(path).is_dir():
        try:
            return Path(hf_hub_download(str(path), CONFIG, **where))
        except (EntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
            raise InputError(
                f"no adapter can be read from {str(path)!r}: {first_line(error)}"
            ) from error
    file = Path(path) / (where.get("subfolder") or "") / CONFIG
    if not file.is_file():
        raise InputError(f"{path} contains no adapter: {CONFIG} is missing")
    return file


class ConfigHeader(TypedDict):
    """The entry of adapter_config.json that every adapter has."""

    peft_type: str


def _check_config(file: Path) -> None:
    """Raise InputError unless a config names a known method, with values of the right types."""
    raw = read_json(file, ConfigHeader)
    peft_type = raw["peft_type"]
    config_cls: Any = config_class(peft_type)
    if config_cls is None:
        raise InputError(
            f"{file} has peft_type={shown(peft_type)}, which neither petl nor PEFT knows"
        )
    known = {field.name for field in fields(config_cls)}
    if "lora_alpha" in known - raw.keys():
        raise InputError(
            f"{file} has no lora_alpha, and PEFT's default would be a guess: the update may be any "
            "times too strong; write the value that the adapter was trained with into it"
        )
    try:
        # a field that is not known belongs to a later version; PEFT warns of it
        check_values(config_cls, {name: value for name, value in raw.items() if name in known})
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def weights_file(path: str | Path, **where: Any) -> Path:
    """Return the safetensors file of the adapter in folder `path`, or in that hub repository.

    Raises:
        InputError: there is none; the message has the command that converts a pickle file.
    """
    folder = Path(path) / (where.get("subfolder") or "")
    if not Path(path).is_dir():
        try:
            return Path(hf_hub_download(str(path), SAFETENSORS_WEIGHTS_NAME, **where))
        except (EntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
            raise InputError(
                f"{SAFETENSORS_WEIGHTS_NAME} of {path} cannot be downloaded "
                f"({str(error).splitlines()[0]}); {WEIGHTS_NAME} is not read, since pickle files "
                f"can contain code: download it, convert it by {CONVERT} and pass the folder"
            ) from error
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return folder / SAFETENSORS_WEIGHTS_NAME
    others = sorted(file.name for file in folder.glob("adapter_model.*"))
    how = f": convert it, in that folder, by {CONVERT}" if WEIGHTS_NAME in others else ""
    raise InputError(
        f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}"
        + (f"; {others[0]} is not read, such files can contain code{how}" if others else "")
    )


def adapter_files(path: str | Path, config: PeftConfig, **where: Any) -> Path:
    """Return the weights file of the adapter in `path`; those that its config names exist as well.

    Args:
        path: folder or hub repository.
        config: the adapter's config.
        where: arguments of `ON_THE_HUB`.

    Raises:
        InputError: the adapter, or one that its config names, has no safetensors file.
    """
    for expert in (facts_of(config).adapters or {}).values():  # X-LoRA loads these itself
        weights_file(expert)
    return weights_file(path, **where)


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        InputError: the file cannot be read, or has values that are not finite.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}") from error
    check_finite(tensors, str(file))
    return tensors
