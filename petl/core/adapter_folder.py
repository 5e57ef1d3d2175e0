"""The config and the weights of a saved adapter, from a folder or the hub; nothing executable."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from petl.core.compat import config_class
from petl.errors import InputError

MEGATRON = "megatron.core"  # PEFT's default
# arguments about where an adapter is found on the hub
ON_THE_HUB = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    f"save_file(torch.load('{WEIGHTS_NAME}', map_location='cpu', weights_only=True), "
    f"'{SAFETENSORS_WEIGHTS_NAME}')\""
)


def read_config(path: str | Path, **where: Any) -> PeftConfig:
    """The config of the adapter saved in folder `path`, or of a hub repository of that name.

    Args:
        where: of `ON_THE_HUB`, as `PeftConfig.from_pretrained` takes them.

    Raises:
        InputError: there is no adapter, its config cannot be read or would have PEFT read a file
            that could hold code, or its method is unknown.
    """
    file = Path(path) / (where.get("subfolder") or "") / "adapter_config.json"
    if Path(path).is_dir() and not file.is_file():
        raise InputError(f"{path} holds no adapter: adapter_config.json is missing")
    if file.is_file():
        try:
            peft_type = json.loads(file.read_text())["peft_type"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as an adapter's config: {error}") from error
        if config_class(peft_type) is None:
            raise InputError(f"{file} names method {peft_type!r}, which neither petl nor PEFT has")
    try:
        config = PeftConfig.from_pretrained(str(path), **where)
    except (ValueError, OSError) as error:
        raise InputError(f"no adapter can be read from {str(path)!r}: {error}") from error
    module = getattr(config, "megatron_core", MEGATRON)
    if module != MEGATRON:  # PEFT imports it by this name
        raise InputError(f"{path} names megatron_core={module!r}, which is not {MEGATRON}")
    start = getattr(config, "prompt_tuning_init_state_dict_path", None)
    if start and not start.endswith(".safetensors"):  # PEFT reads it whenever it makes the prompts
        raise InputError(
            f"{path} names prompt_tuning_init_state_dict_path={start!r}, which could hold code: "
            "set it to null, the prompts themselves are in the adapter's file"
        )
    return config


def weights_file(path: str | Path, **where: Any) -> Path:
    """The safetensors file of the adapter in folder `path`, or in a hub repository of that name.

    Raises:
        InputError: there is none; the message says how one is made of a file that could hold code.
    """
    folder = Path(path) / (where.get("subfolder") or "")
    if not Path(path).is_dir():
        try:
            return Path(hf_hub_download(str(path), SAFETENSORS_WEIGHTS_NAME, **where))
        except (EntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
            raise InputError(
                f"{path} has no {SAFETENSORS_WEIGHTS_NAME} that can be had "
                f"({str(error).splitlines()[0]}); {WEIGHTS_NAME} is not read, such files can hold "
                f"code: download it, make the other of it by {CONVERT} and give the folder"
            ) from error
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return folder / SAFETENSORS_WEIGHTS_NAME
    others = sorted(file.name for file in folder.glob("adapter_model.*"))
    how = f": make the other of it, in that folder, by {CONVERT}" if WEIGHTS_NAME in others else ""
    raise InputError(
        f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}"
        + (f"; {others[0]} is not read, such files can hold code{how}" if others else "")
    )


def read_weights(path: str | Path, config: PeftConfig, **where: Any) -> Mapping[str, Tensor]:
    """The tensors of the adapter whose config this is.

    Raises:
        InputError: there is no safetensors file, of it or of an adapter that its config names, or
            it cannot be read.
    """
    file = weights_file(path, **where)
    for expert in (getattr(config, "adapters", None) or {}).values():  # X-LoRA's
        weights_file(expert)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter file in {str(path)!r} cannot be read: {error}") from error
