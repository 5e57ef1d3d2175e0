"""The inner method's adapter of a PYRA adapter, as an adapter of its own."""

from dataclasses import fields
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from petl.core import fingerprint
from petl.core.adapter_folder import Folder
from petl.core.registry import method
from petl.errors import InputError, UnsupportedError
from petl.methods.pyra.config import PyraConfig
from petl.methods.pyra.method import PREFIX


def save_inner(adapter: str | Path, out: str | Path) -> None:
    """Write the inner method's adapter alone, such as the LoRA, to load onto the base by itself.

    Without merged tokens the outputs are others than those that it was trained with.

    Args:
        adapter: folder of an adapter of `pyra`, as `save_pretrained` or a run writes it.
        out: folder to write, new or without an adapter.

    Raises:
        InputError: the adapter is not one of `pyra`, or `out` has one already.
        UnsupportedError: it has no inner method.
    """
    out = Path(out)
    saved = Folder(adapter)
    config = saved.config
    if not isinstance(config, PyraConfig):
        raise InputError(f"{adapter} has an adapter of {config.peft_type}, not of pyra")
    if config.inner is None:
        raise UnsupportedError(
            f"{adapter} has an adapter of pyra without an inner method (inner: null), so there is "
            "no other adapter in it"
        )
    if (out / CONFIG_NAME).exists():
        raise InputError(f"{out} has an adapter already; name another folder")
    config_cls = method(config.inner).config_cls
    own = {f.name: getattr(config, f.name) for f in fields(config_cls) if f.init}
    own.pop("peft_type", None)
    tensors = {key: t for key, t in saved.tensors.items() if f".{PREFIX}" not in key}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    fingerprint.write(out, saved.base)
    # last: a folder with a config is a complete adapter
    config_cls(**own).save_pretrained(str(out))
