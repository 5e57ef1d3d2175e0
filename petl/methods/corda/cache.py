"""Covariances and factors on disk: one safetensors file for each content, with its key inside.

The key says from what the tensors were made: model, targets, calibration, settings. A file is found
by comparing every field of it; tensors are read, and written, one at a time.
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

from petl.errors import InputError

logger = logging.getLogger(__name__)

CODES = {torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
PASSING = {  # entries of a model's config that change no activation, or stand in the key already
    *("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"),
}
Key = dict[str, Any]
Write = Callable[[Tensor], Any]


class Cache:
    """The files of one kind in a folder.

    Args:
        folder: made when the first file is written.
        kind: first word of the files' names.
    """

    def __init__(self, folder: str | Path, kind: str) -> None:
        self.folder, self.kind = Path(folder).expanduser(), kind

    def find(self, key: Key) -> Path | None:
        """The file with this key, or None; the log then says how the closest one differs.

        A field that is None is not compared.

        Raises:
            InputError: several files fit a key that leaves fields open.
        """
        found: list[Path] = []
        closest: list[str] | None = None
        for path in sorted(self.folder.glob(f"{self.kind}-*.safetensors")):
            there = read_key(path)
            if there is None:
                continue
            gaps = [name for name, value in key.items() if value not in (None, there.get(name))]
            if not gaps:
                found.append(path)
            elif closest is None or len(gaps) < len(closest):
                closest = gaps
        if len(found) > 1:
            raise InputError(
                f"{len(found)} files in {self.folder} fit, of different calibration data; "
                "pass calibration=batches to say which"
            )
        if not found and closest is not None:
            logger.info(
                "no %s in %s fit: the closest differ in %s; working them out anew",
                self.kind,
                self.folder,
                ", ".join(closest),
            )
        return found[0] if found else None

    @contextmanager
    def writing(self, key: Key, shapes: Mapping[str, Tensor], notes: Any) -> Generator[Write]:
        """A function that takes the tensors of a new file, whole or not at all.

        Args:
            key: what they are made of.
            shapes: by name, tensors like those that will come, in their order.
            notes: what else to keep, as JSON takes it.

        Raises:
            InputError: the folder cannot be written to.
        """
        text = json.dumps(key, sort_keys=True)
        name = f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        draft = self.folder / f".unfinished-{os.getpid()}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file, removed_on_failure(draft):
                file.write(header(shapes, {"key": text, "notes": json.dumps(notes)}))
                yield lambda tensor: self.put(file, tensor)
            draft.replace(self.folder / name)
        except OSError as error:
            raise self.refused(error) from error

    def put(self, file: BinaryIO, tensor: Tensor) -> None:
        try:
            file.write(raw(tensor))
        except OSError as error:
            raise self.refused(error) from error

    def refused(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder} cannot be written to ({error.strerror}); choose another folder"
        )


@contextmanager
def removed_on_failure(draft: Path) -> Generator[None]:
    try:
        yield
    except BaseException:
        draft.unlink()
        raise


def read_key(path: Path) -> Key | None:
    """The key in a file; None, with a warning, if it is damaged."""
    try:
        with safe_open(path, framework="pt") as opened:
            return json.loads(opened.metadata()["key"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is passed over: %s", path, error)
        return None


def header(shapes: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file with these tensors, one after the other."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in shapes.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# What the tensors are made of


def digest_of(batches: Iterable[Mapping[str, Any]]) -> str:
    """A hash of all that is in all batches."""
    whole = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            take_in(whole, name, value)
    return whole.hexdigest()


def weights_of(model: nn.Module) -> str:
    """A hash of every value of each tensor of the model: another for other weights.

    Single entries may differ alone, where a sparse adapter was merged: a sample would miss them.
    """
    whole = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        take_in(whole, name, tensor)
    return whole.hexdigest()


def settings_of(model: nn.Module) -> str | None:
    """A hash of a Hugging Face model's config, which says what is done with the weights."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    kept = {name: value for name, value in config.to_dict().items() if name not in PASSING}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def take_in(whole: Any, name: str, value: Any) -> None:
    """Let a hash know a value and its name."""
    if isinstance(value, Tensor):
        whole.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        whole.update(raw(value))
    else:
        whole.update(f"{name} ".encode())
        whole.update(pickle.dumps(value))  # unlike `repr`, all of a long array


def raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, as a buffer."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
