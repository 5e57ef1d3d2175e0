"""The folder of a saved adapter, or its repository on the Hub, read without running code."""

import math
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from peft import PeftConfig
from peft.utils import WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from petl.core import fingerprint
from petl.core.adapter_file import WEIGHTS, reference_of
from petl.core.compat import config_class
from petl.core.parameters import check_memory
from petl.core.spec.config import check_values
from petl.core.spec.facts import Facts, facts_of
from petl.errors import InputError, first_line, shown
from petl.system.files.disk import copy_file
from petl.system.files.paths import TERNARY
from petl.system.files.read import read_json
from petl.system.files.tensor_file import Shapes, check_finite, read_shapes

if TYPE_CHECKING:
    from petl.ops.ternary import Ternary

CONFIG = "adapter_config.json"

MAX_BLOCKS = 1_000  # of a model with layer_replication; assumption: the deepest have some hundred
# arguments of `PeftConfig.from_pretrained` that locate an adapter on the hub
ON_THE_HUB = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
# command that converts a pickle file to safetensors
CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    f"save_file(torch.load('{WEIGHTS_NAME}', map_location='cpu', weights_only=True), "
    f"'{WEIGHTS}')\""
)


class Folder:
    """A saved adapter. Each of its files is read once, when it is asked for.

    Attributes:
        path: its folder, or the name of its repository on the Hub.
        where: arguments of `ON_THE_HUB`.
    """

    def __init__(self, path: str | Path, **where: Any) -> None:
        self.path, self.where = path, where

    def file(self, name: str) -> Path | None:
        """Return a file of the adapter, downloaded if it is on the Hub; None if there is none.

        Raises:
            InputError: there is no such repository, or the Hub cannot be asked.
        """
        if Path(self.path).is_dir():
            # a local folder has its subfolder in the path; the Hub's client takes it as an argument
            file = Path(self.path, self.where.get("subfolder") or "", name)
            return file if file.is_file() else None
        try:
            return Path(hf_hub_download(str(self.path), name, **self.where))
        # only a missing file: no connection, or no access to the repository, is an error
        except EntryNotFoundError:
            return None
        except (HFValidationError, HTTPError, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(f"no adapter can be read from {str(self.path)!r}: {first_line(error)}")

    @cached_property
    def config(self) -> PeftConfig:
        """Its config.

        Raises:
            InputError: there is no adapter, its config cannot be read, has a value of the wrong
                type or out of range, or makes PEFT read a file that could contain code or repeat
                blocks thousands of times, or its method is unknown.
        """
        file = self.file(CONFIG)
        if file is None:
            raise InputError(f"{self.path} contains no adapter: {CONFIG} is missing")
        # checked before PEFT reads it, whose errors are hard to understand
        _check_config(file)
        try:
            config = PeftConfig.from_pretrained(str(self.path), **self.where)
        except (ValueError, TypeError, OSError, RecursionError) as error:
            raise self._unreadable(error) from error
        _check_safe(config, self.path)
        return config

    @cached_property
    def base(self) -> fingerprint.Fingerprint:
        """The fingerprint of the base model that it was trained on; empty if none is saved.

        Raises:
            InputError: its file has other content.
        """
        return fingerprint.read(self.file(fingerprint.FILE))

    @cached_property
    def compressed(self) -> Path | None:
        """The file of a compressed adapter; None if there is none, or a plain one beside it."""
        # the plain file first, as most adapters have it: one request instead of two
        return None if self.file(WEIGHTS) else self.file(TERNARY)

    @cached_property
    def ternary(self) -> "Ternary":
        """The content of the compressed file.

        Raises:
            InputError: it is damaged, or there is none.
        """
        if self.compressed is None:
            raise InputError(f"{self.path} has no {TERNARY}: it is not compressed")
        return _ternary(self.compressed)

    @cached_property
    def weights(self) -> Path:
        """The file of its tensors, plain or compressed; adapters that its config names have one.

        Raises:
            InputError: the adapter, or one that its config names, has no safetensors file.
        """
        for expert in (facts_of(self.config).adapters or {}).values():  # X-LoRA loads these itself
            Folder(expert).plain_file()
        return self.compressed or self.plain_file()

    def plain_file(self) -> Path:
        """Return the safetensors file.

        Raises:
            InputError: there is none; the message has the command that converts a pickle file.
        """
        file = self.file(WEIGHTS)
        if file is not None:
            return file
        folder = Path(self.path, self.where.get("subfolder") or "")
        # those of a repository are not known
        others = sorted(each.name for each in folder.glob("adapter_model.*"))
        others = others if folder.is_dir() else [WEIGHTS_NAME]
        how = f": convert it, in that folder, by {CONVERT}" if WEIGHTS_NAME in others else ""
        raise InputError(
            f"{folder} has no {WEIGHTS}"
            + (f"; {others[0]} is not read, such files can contain code{how}" if others else "")
        )

    @property
    def shapes(self) -> Shapes:
        """Dtype and shape of its tensors, by name; nothing is expanded.

        Raises:
            InputError: the file is damaged.
        """
        if self.compressed is None:
            return read_shapes(self.weights)
        others = {name: (t.dtype, t.shape) for name, t in self.ternary.others.items()}
        return {**self.ternary.shapes, **others}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, expanded if it is compressed.

        Raises:
            InputError: the file is damaged, has values that are not finite, or states more than the
                memory of this machine.
        """
        if self.compressed is None:
            found = read_weights(self.weights)
            # afterwards: of a file that cannot be read, the other message says more
            self.check_sealed()
            return found
        found = self.ternary
        # torch counts the other sizes of a tensor without entries too
        size = sum(
            dtype.itemsize * math.prod(max(length, 1) for length in shape)
            for dtype, shape in found.shapes.values()
        )
        # a short file can state a large tensor
        check_memory("a compressed adapter", size, "if you trust it, use a larger machine")
        # the reference from which differences were taken when the adapter was compressed
        sizes = {name: size for name, (_, size) in found.shapes.items()}
        return found.dense(reference_of(self.config, sizes))

    def check(self) -> None:
        """Read all of its files strictly; nothing is expanded.

        Raises:
            InputError: one of them is damaged.
        """
        _ = self.config, self.base
        if self.compressed is None:
            read_weights(self.weights)
            self.check_sealed()
        file = self.file(TERNARY)
        if file is not None:
            _ternary(file)

    def check_sealed(self) -> None:
        """Check that the file of tensors is the one that petl saved; a compressed one has a digest.

        Raises:
            InputError: it is another one, by the digest in the fingerprint.
        """
        if self.compressed is None:
            fingerprint.check_sealed(self.weights, self.file(fingerprint.FILE))

    def copy_weights(self, target: Path) -> None:
        """Copy its tensors to another folder, expanded."""
        if self.compressed is None:
            copy_file(self.weights, target / WEIGHTS)
        else:
            save_file(self.tensors, target / WEIGHTS, {"format": "pt"})

    @contextmanager
    def plain(self, check: Callable[[Shapes, str], object]) -> Generator["Folder"]:
        """Yield this adapter, or a temporary folder with its expanded tensors if it is compressed.

        Args:
            check: called with the shapes of a compressed adapter and the name of its file before
                any tensor is allocated; raises if they do not fit.
        """
        if self.compressed is None:
            yield self
            return
        check(self.shapes, str(self.compressed))
        with tempfile.TemporaryDirectory() as place:
            self.config.save_pretrained(place)
            self.copy_weights(Path(place))
            yield Folder(place)


def _check_safe(config: PeftConfig, path: str | Path) -> None:
    """Raise InputError for values with which PEFT would run code, or fill the memory."""
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


def read_weights(file: Path) -> dict[str, Tensor]:
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


def _ternary(file: Path) -> "Ternary":
    from petl.ops.ternary import Ternary  # few adapters are compressed

    return Ternary.load(file)
