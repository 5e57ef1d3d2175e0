"""Loading a saved adapter strictly: every tensor that the config asks for, and no other."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from petl.core.compat import BaseTunerLayer, config_class
from petl.core.registry import heed_limits, refuse_quantised
from petl.errors import InputError, near

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


def load(
    base: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """`base` with the adapter saved in `path`, as `PeftModel.from_pretrained`, but strict.

    Args:
        base: the model that the adapter was trained on, without adapters; changed in place.
        path: folder of the adapter, or the name of a hub repository.
        adapter_name: its name in the model, whatever it was called when saved.
        is_trainable: leave its parameters trainable.
        kwargs: further arguments of `PeftModel.from_pretrained`.

    Raises:
        InputError: no adapter there, an unknown method, a base that holds adapters already,
            tensors that are missing, unexpected or of another shape, or a file that could hold
            code.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InputError(
            "the base model holds an adapter already (wrapping changes a model in place); load "
            "onto a fresh one, or add to the PeftModel with model.load_adapter(path, adapter_name)"
        )
    where = {key: kwargs[key] for key in ON_THE_HUB if key in kwargs}
    config = read_config(path, **where)
    refuse_quantised(base, config)
    file = weights_file(path, **where)
    for expert in (getattr(config, "adapters", None) or {}).values():  # X-LoRA's
        weights_file(expert)
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter file in {str(path)!r} cannot be read: {error}") from error
    try:
        model = PeftModel.from_pretrained(
            base, str(path), adapter_name, is_trainable, config=config, **kwargs
        )
    except KeyError as error:  # a module to save that the file lacks
        raise InputError(f"the adapter file in {str(path)!r} lacks tensor {error}") from error
    except RuntimeError as error:
        raise InputError(f"the adapter in {str(path)!r} does not fit the model: {error}") from error
    expected = set(get_peft_model_state_dict(model, adapter_name=adapter_name))
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        which = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model lacks"
        count = len(missing) + len(unexpected)
        raise InputError(
            f"the adapter in {str(path)!r} does not fit its config: it {which} ({count} tensors "
            f"differ){near(unexpected[0], expected, limit=0) if unexpected and not missing else ''}"
        )
    heed_limits(model)
    return model
