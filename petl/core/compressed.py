"""Folders of compressed adapters (`petl.deltas`), which are expanded to be loaded."""

import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_folder import ON_THE_HUB, read_config
from petl.files.disk import copy_file
from petl.files.tensor_file import Shapes, read_shapes
from petl.ops.ternary import FILE, Ternary


def type_of(config: PeftConfig | PeftModel) -> str:
    """Return the name of the PEFT type of a config or model."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def starts_at_one(config: PeftConfig) -> bool:
    """Return True if the method's tensors are factors, so that 1 is what has no effect (IA3)."""
    return type_of(config) == "IA3"


def compressed_file(path: str | Path, **where: Any) -> Path | None:
    """Return the file of a compressed adapter, or None if there is none beside a plain one's.

    Args:
        path: folder or hub repository.
        where: arguments of `ON_THE_HUB`.
    """
    # a local folder has its subfolder in the path; the Hub's client takes it as an argument
    folder = Path(path) / (where.get("subfolder") or "")
    if Path(path).is_dir():
        # with both files present, the plain one is loaded
        is_compressed = (folder / FILE).is_file() and not (folder / WEIGHTS).exists()
        return folder / FILE if is_compressed else None
    # the plain file first, as most adapters have it: one request instead of two
    for name in (WEIGHTS, FILE):
        try:
            file = hf_hub_download(str(path), name, **where)
        # only a missing file: no connection, or no access to the repository, is an error
        except EntryNotFoundError:
            continue
        return Path(file) if name == FILE else None
    return None


def expanded(
    config: PeftConfig, file: Path, check: Callable[[Shapes, Path], Any] | None = None
) -> dict[str, Tensor]:
    """Read a compressed adapter's tensors, by name.

    Args:
        config: of the adapter.
        file: of the compressed tensors.
        check: called with dtypes and shapes by name, and the file, before tensors are allocated; a
            small file may name large ones.

    Raises:
        InputError: the file is damaged.
    """
    found = Ternary.load(file)
    if check is not None:
        check(_shapes_in(found), file)
    # the reference from which differences were taken when the adapter was compressed
    ones = {name: torch.ones(shape) for name, (_, shape) in found.shapes.items()}
    return found.dense(ones if starts_at_one(config) else None)


def stored_shapes(folder: Path) -> Shapes:
    """Return dtype and shape of the tensors in an adapter folder, plain or compressed, by name.

    Raises:
        InputError: the file is damaged.
    """
    file = compressed_file(folder)
    if file is None:
        return read_shapes(folder / WEIGHTS)
    return _shapes_in(Ternary.load(file))


def _shapes_in(found: Ternary) -> Shapes:
    # from the metadata: nothing is expanded to know shapes
    return {**found.shapes, **{name: (t.dtype, t.shape) for name, t in found.others.items()}}


def copy_weights(folder: Path, target: Path) -> None:
    """Copy the weights in an adapter folder to another folder, expanded."""
    file = compressed_file(folder)
    if file is None:
        copy_file(folder / WEIGHTS, target / WEIGHTS)
    else:
        save_file(expanded(read_config(folder), file), target / WEIGHTS, {"format": "pt"})


@contextmanager
def plain_folder(
    path: str | Path,
    config: PeftConfig,
    where: Mapping[str, Any],
    check: Callable[[Shapes, Path], Any],
) -> Generator[tuple[str | Path, dict[str, Any]]]:
    """Yield the folder or repository of a plain adapter, and `where` in it its files are.

    For a compressed adapter, that is a temporary folder with its expanded weights; `check` is as of
    `expanded`.
    """
    file = compressed_file(path, **where)
    if file is None:
        yield path, dict(where)
        return
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(expanded(config, file, check), Path(folder) / WEIGHTS, {"format": "pt"})
        # a revision or a subfolder would be looked up inside the temporary folder
        yield folder, {key: value for key, value in where.items() if key not in ON_THE_HUB}
