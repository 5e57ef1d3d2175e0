"""Caches of covariances and factors: safetensors files with a key in their metadata.

The key has all inputs of the tensors: model, targets, calibration, settings. A file is found by
comparing every field of the key; tensors are read and written one at a time, to bound memory.
"""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from petl.core.parameters import buffer_of
from petl.errors import InputError
from petl.system.files.disk import create, is_as_noted, note_digest
from petl.system.files.read import parse_json

logger = logging.getLogger(__name__)

# safetensors' names of dtypes
CODES = {torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
IGNORED_ENTRIES = {  # entries of a model's config that do not affect activations, or are in the key
    *("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"),
}
Key = dict[str, Any]
Write = Callable[[Tensor], Any]


class Cache:
    """The cache files of one kind in a folder.

    Args:
        folder: created when the first file is written.
        kind: prefix of the file names: "covariances" or "factors".
    """

    def __init__(self, folder: str | Path, kind: str) -> None:
        self.folder, self.kind = Path(folder).expanduser(), kind

    def find(self, key: Key) -> Path | None:
        """The file with this key, or None; then the differences of the closest file are logged.

        A field that is None is not compared.

        Raises:
            InputError: several files match, because fields of the key are None.
        """
        found: list[Path] = []
        closest: list[str] | None = None
        for path in sorted(self.folder.glob(f"{self.kind}-*.safetensors")):
            stored = read_key(path)
            if stored is None:
                continue
            # None: unknown here, so any value matches
            gaps = [name for name, value in key.items() if value not in (None, stored.get(name))]
            if not gaps:
                found.append(path)
            elif closest is None or len(gaps) < len(closest):
                closest = gaps
        # one that another process has just written has no digest yet
        for path in [each for each in found if not is_as_noted(each)]:
            logger.warning("%s is damaged or incomplete: computing it again", path)
            found.remove(path)
        if len(found) > 1:
            raise InputError(
                f"{len(found)} files in {self.folder} match, of different calibration data; "
                "pass calibration=batches to choose one"
            )
        if not found and closest is not None:
            logger.info(
                "no %s in %s match: the closest differ in %s; computing them again",
                self.kind,
                self.folder,
                ", ".join(closest),
            )
        return found[0] if found else None

    @contextmanager
    def writing(self, key: Key, shapes: Mapping[str, Tensor], notes: object) -> Generator[Write]:
        """Write a new file atomically: yields a function that appends the next tensor.

        Args:
            key: the inputs of the tensors.
            shapes: by name, tensors of equal shape and dtype, in the order of writing.
            notes: further metadata, JSON-serializable.

        Raises:
            InputError: the folder is not writable.
        """
        text = json.dumps(key, sort_keys=True)
        name = f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        draft = self.folder / f".unfinished-{os.getpid()}-{name}"  # never found by `find`
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with create(draft) as file, removed_on_failure(draft):
                # sizes must be known first
                file.write(header(shapes, {"key": text, "notes": json.dumps(notes)}))
                yield lambda tensor: self.put(file, tensor)
            # atomic: other runs see a complete file or none
            draft.replace(self.folder / name)
            note_digest(self.folder / name)
        except OSError as error:
            raise self.not_writable(error) from error

    def put(self, file: BinaryIO, tensor: Tensor) -> None:
        """Append the bytes of a tensor."""
        try:
            file.write(buffer_of(tensor))
        except OSError as error:
            raise self.not_writable(error) from error

    def not_writable(self, error: OSError) -> InputError:
        """The error of a folder that cannot be written to."""
        return InputError(
            f"{self.folder} cannot be written to ({error.strerror}); choose another folder"
        )


@contextmanager
def removed_on_failure(draft: Path) -> Generator[None]:
    """Remove an unfinished file if the block raises, also on Ctrl-C."""
    try:
        yield
    except BaseException:
        draft.unlink()
        raise


def read_key(path: Path) -> Key | None:
    """The key of a file; None, with a warning, if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as opened:
            return parse_json(opened.metadata()["key"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is skipped, it is no valid cache file: %s", path, error)
        return None


def header(shapes: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file with these tensors, in this order.

    safetensors' own writer needs all tensors in memory.
    """
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in shapes.items():
        begin, end = end, end + tensor.nbytes  # offsets after the header
        entries[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


# Hashes of the inputs


def hash_of_batches(batches: Iterable[Mapping[str, object]]) -> str:
    """SHA-256 of the names and values in all batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            update_hash(digest, name, value)
    return digest.hexdigest()


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of every entry of each tensor of the model.

    A sample of entries would not do: a merged sparse adapter changes a few single entries.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        update_hash(digest, name, tensor)
    return digest.hexdigest()


def hash_of_config(model: nn.Module) -> str | None:
    """SHA-256 of a Hugging Face model's config, which determines its computation; else None."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    entries = {k: value for k, value in config.to_dict().items() if k not in IGNORED_ENTRIES}
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()


def update_hash(digest: Any, name: str, value: object) -> None:
    """Update a hash with a name and a value."""
    if isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(buffer_of(value))
    else:
        digest.update(f"{name} ".encode())
        digest.update(pickle.dumps(value))  # `repr` would abbreviate long arrays
