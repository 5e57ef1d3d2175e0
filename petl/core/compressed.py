"""Folders of compressed adapters (`petl.deltas`), which are expanded to be loaded."""

import math
import re
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import save_file
from torch import Tensor

from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_folder import ON_THE_HUB, read_config
from petl.core.parameters import check_memory
from petl.ops.ternary import FILE, Ternary
from petl.system.files.disk import copy_file
from petl.system.files.tensor_file import Shapes, read_shapes

# tensors of PEFT's methods that are no differences from 0: norms of weights, factors that start at
# another value, random matrices that stay as they are, rows of an embedding
WHOLE = re.compile(
    r"\.(lora_magnitude_vector|delora_(w_norm|lambda)|boft_s|p?vera_([AB]|lambda_d)|"
    r"randlora_([AB]|gamma)|trainable_tokens_delta)$"
)


def is_whole(name: str) -> bool:
    """Return True for a tensor of an adapter's file that is a weight, not what training added.

    Those of `modules_to_save` are, trained biases of the base model, and embeddings.
    """
    own = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    of_base = not any(part.startswith(own) for part in name.split("."))
    return bool(WHOLE.search(name)) or (of_base and name.endswith((".weight", ".bias")))


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


def expanded(config: PeftConfig, file: Path) -> dict[str, Tensor]:
    """Read a compressed adapter's tensors, by name.

    Raises:
        InputError: the file is damaged, or states more than the memory of this machine.
    """
    return dense(config, Ternary.load(file))


def dense(config: PeftConfig, found: Ternary) -> dict[str, Tensor]:
    """Return a compressed adapter's tensors, by name.

    Raises:
        InputError: they exceed the memory of this machine, as a short file can state.
    """
    # torch counts the other sizes of a tensor without entries too
    size = sum(
        dtype.itemsize * math.prod(max(length, 1) for length in shape)
        for dtype, shape in found.shapes.values()
    )
    check_memory("a compressed adapter", size, "if you trust it, use a larger machine")
    if not starts_at_one(config):
        return found.dense()
    # the reference from which differences were taken when the adapter was compressed
    return found.dense({name: torch.ones(shape) for name, (_, shape) in found.shapes.items()})


def stored_shapes(folder: Path) -> Shapes:
    """Return dtype and shape of the tensors in an adapter folder, plain or compressed, by name.

    Raises:
        InputError: the file is damaged.
    """
    file = compressed_file(folder)
    if file is None:
        return read_shapes(folder / WEIGHTS)
    return shapes_of(Ternary.load(file))


def shapes_of(found: Ternary) -> Shapes:
    """Return dtype and shape of a compressed adapter's tensors, by name; nothing is expanded."""
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
    check: Callable[[Shapes, str], object],
) -> Generator[tuple[str | Path, dict[str, Any]]]:
    """Yield the folder or repository of a plain adapter, and `where` in it its files are.

    For a compressed adapter, that is a temporary folder with its expanded weights.

    Args:
        path: the folder or repository.
        config: of the adapter.
        where: arguments of `ON_THE_HUB`, and others that are passed on.
        check: called with the shapes of a compressed adapter and the name of its file before any
            tensor is allocated; raises if they do not fit.
    """
    file = compressed_file(path, **{k: v for k, v in where.items() if k in ON_THE_HUB})
    if file is None:
        yield path, dict(where)
        return
    found = Ternary.load(file)
    check(shapes_of(found), str(file))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(dense(config, found), Path(folder) / WEIGHTS, {"format": "pt"})
        # a revision or a subfolder would be looked up inside the temporary folder
        yield folder, {key: value for key, value in where.items() if key not in ON_THE_HUB}
