"""The file of a store: states of rows, unpadded and end to end, memory-mapped.

A store is a folder, complete or absent, with states.bin (values of all rows [N, ...]), index.npy
(of each row its key, and where its values start and stop, sorted by key) and store.json, which has
the XXH3 of both files and of its own entries. All of them are compared before a value is used: who
finds a damaged store makes it again. Once a process, that takes 10 to 20 % of the processor time of
reading the rows once, 0.1 s a gigabyte: as fast as memory is read. A digest of each row, compared
whenever it is read, would take 9 to 24 % of all reading, and find damage when training cannot go
back to before it.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import xxhash
from torch import Tensor

from petl.core.types import Settings
from petl.efficiency.frozen.keys import KEY_BYTES
from petl.errors import InputError
from petl.system.files.disk import as_json, atomic_folder, create, remove, write_json
from petl.system.files.read import read_json
from petl.system.processes import release, try_claim

FORMAT = 4  # increment when files or the meaning of keys change
STATES, INDEX, ABOUT = "states.bin", "index.npy", "store.json"
ENTRY = np.dtype([("key", f"S{KEY_BYTES}"), ("start", "i8"), ("stop", "i8")])
CONTENT = "content"  # the folder that is complete or absent, next to the lock
PAYS = 1.5  # passes over the train rows; a store costs the frozen blocks of one
MARGIN = 64 * 2**20  # bytes that stay free on the disk
WAIT = 0.2  # seconds between looks at a store that another process fills
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputSpec:
    """What the last block of a prefix returns.

    Attributes:
        dtype: of the states, as torch names it without its prefix.
        tail: shape of the states after rows and positions, such as [width].
        outputs: length of the tuple that a block returns, the others None; 0: a tensor.
        positions: of an image or clip; 0: as many as tokens.
    """

    dtype: str
    tail: list[int]
    outputs: int
    positions: int

    @classmethod
    def of(cls, output: object, *, by_token: bool) -> "OutputSpec | None":
        """Return the form of a block's output; None if it hands on more than hidden states.

        Args:
            by_token: False: all rows have as many positions, as images and clips.
        """
        states, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(states, Tensor) or any(value is not None for value in others):
            return None
        dtype = str(states.dtype).removeprefix("torch.")
        outputs = len(output) if isinstance(output, tuple) else 0
        return cls(dtype, list(states.shape[2:]), outputs, 0 if by_token else states.shape[1])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the states."""
        return getattr(torch, self.dtype)

    @property
    def bytes_each(self) -> int:
        """Bytes of one position."""
        return prod(self.tail) * self.torch_dtype.itemsize


class About(TypedDict):
    """The content of store.json, of which `computation` and `rows` are what `present` asks for."""

    form: Settings
    index: str  # XXH3 of the file
    states: str  # likewise
    own: str  # XXH3 of the other entries


class Store:
    """A complete store, opened for reading.

    Raises:
        InputError: it is absent, or its content is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about: About = read_json(folder / ABOUT, About)
        others = {name: entry for name, entry in about.items() if name != "own"}
        self._compare(ABOUT, about["own"] == _digest(as_json(others).encode()))
        self.form = OutputSpec(**about["form"])
        index = folder / INDEX
        is_whole = _is_readable(index) and _digest(index.read_bytes()) == about["index"]
        self._compare(INDEX, is_whole)
        # it refuses arrays of objects, which would be unpickled
        self.index = np.lib.format.open_memmap(index, mode="r")
        shape = (int(self.index["stop"].max()), *self.form.tail)
        size = prod(shape)
        expected, states = size * self.form.torch_dtype.itemsize, folder / STATES
        self._compare(STATES, _is_readable(states) and states.stat().st_size == expected)
        # read-only and shared by all processes that map it
        # shared=False is MAP_PRIVATE: a write would copy the page and never reach the file
        self.states = torch.from_file(
            str(states), shared=False, size=size, dtype=self.form.torch_dtype
        ).view(shape)
        # all at once, in the order of the file, which also brings it into memory
        content = memoryview(self.states.view(-1).view(torch.uint8).numpy())
        self._compare(STATES, _digest(content) == about["states"])

    def _compare(self, name: str, is_equal: bool) -> None:
        if not is_equal:
            raise InputError(f"{self.folder / name} is damaged")

    def __len__(self) -> int:
        return len(self.index)

    def __deepcopy__(self, _: object) -> "Store":
        return self  # a copy of a model reads the same files

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the place of each key in the index, -1 for one that the store has not."""
        # numpy drops zero bytes at the end of such strings: no loss, as all keys have one length
        wanted = np.array(keys, dtype=f"S{KEY_BYTES}")
        at = np.searchsorted(self.index["key"], wanted).clip(max=len(self.index) - 1)
        return np.where(self.index["key"][at] == wanted, at, -1)

    def row(self, number: int) -> Tensor:
        """Return the states of a place in the index, [T, ...], a view of the file."""
        entry = self.index[number]
        return self.states[entry["start"] : entry["stop"]]


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Lock the folder of a store for this process, and wait for another one that has the lock.

    Raises:
        InputError: this user cannot write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = try_claim(folder)
    except OSError as error:
        raise InputError(
            f"the store {folder} cannot be written ({error.strerror}): set PETL_CACHE to a folder "
            "of yours, or leave the blocks uncached (train.cache_frozen=false)"
        ) from error
    if holder:
        logger.info("waiting for %s, which fills the store %s", holder, folder)
    while holder:
        time.sleep(WAIT)
        holder = try_claim(folder)
    try:
        yield
    finally:
        release(folder)


def exists(folder: Path) -> bool:
    """Return True if the store is complete."""
    return _is_readable(folder / CONTENT / ABOUT)


def present(folder: Path, computation: str) -> set[str]:
    """Return the names of the rows of all complete stores of blocks that compute alike.

    The values of their weights are not compared: those who ask have none.

    Args:
        folder: of stores.
        computation: as `Prober.computation`.
    """
    rows = set[str]()
    for file in folder.glob(f"*/{CONTENT}/{ABOUT}"):
        try:
            about = read_json(file, dict[str, Any])
        except InputError as error:  # a run would make the store again
            logger.warning("skipping a store: %s", error)
            continue
        if about.get("computation") == computation:
            rows.add(about["rows"])
    return rows


def write(
    folder: Path,
    form: OutputSpec,
    keys: Sequence[bytes],
    lengths: Sequence[int],
    parts: Iterable[Tensor],
    **about: str,
) -> None:
    """Write a store; `folder` is locked.

    Args:
        about: further entries of store.json: `computation` and `rows`, by which `present` finds it.
        keys: of the rows, in the order in which their states come.
        lengths: positions of each row.
        parts: states of each row, [T, ...].

    Raises:
        InputError: the disk is too small.
        RunStopped: the disk is full after all, or not writable.
    """
    remove(folder / CONTENT)  # damaged, if it is there: its space is needed
    ends = np.cumsum(lengths, dtype=np.int64)
    check_space(folder, size_of(form, len(keys), int(ends[-1])))
    index: np.ndarray = np.empty(len(keys), ENTRY)
    index["key"], index["start"], index["stop"] = keys, ends - lengths, ends
    with atomic_folder(folder / CONTENT) as draft:
        written = xxhash.xxh3_64()
        with create(draft / STATES) as opened:
            for part, _ in zip(parts, keys, strict=True):
                content = part.contiguous().view(torch.uint8).numpy()
                written.update(content)
                opened.write(content)
        with create(draft / INDEX) as opened:
            np.save(opened, np.sort(index, order="key"), allow_pickle=False)
        digests = {"index": _digest((draft / INDEX).read_bytes()), "states": written.hexdigest()}
        content = {"format": FORMAT, "form": asdict(form), **digests, **about}
        write_json(draft / ABOUT, {**content, "own": _digest(as_json(content).encode())})


def _is_readable(file: Path) -> bool:
    """Return True if there is a file that this user may read: a cache may be of several users."""
    return os.access(file, os.R_OK) and file.is_file()


def _digest(content: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def size_of(form: OutputSpec, rows: int, positions: int) -> int:
    """Return the bytes of a store."""
    return positions * form.bytes_each + rows * ENTRY.itemsize


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of `folder` has not `needed` bytes, and some to spare."""
    free = free_bytes(folder)
    if free < needed + MARGIN:
        raise InputError(
            f"the outputs of the frozen blocks need {needed / 1e6:,.0f} MB, and the disk of "
            f"{folder} has {free / 1e6:,.0f} MB free: free some, set PETL_CACHE to a folder on "
            "another disk, or leave the blocks uncached (train.cache_frozen=false)"
        )


def why_not(missing: int, folder: Path, passes: float) -> str:
    """Return why stores that could be made are not; "" if they are.

    Args:
        missing: bytes that are in no store yet.
        folder: of the stores.
        passes: over the rows; infinite if stores are wanted whatever they cost.
    """
    if missing and passes < PAYS:
        return f"the run reads its examples {passes:.2g} times, and computing them costs as much"
    try:
        if missing:
            check_space(folder, missing)
    except InputError as error:
        return str(error)
    return ""


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def name_of(*ingredients: object) -> str:
    """Return a name of 32 characters for all that a store depends on."""
    return sha256(json.dumps([FORMAT, *ingredients], sort_keys=True).encode()).hexdigest()[:32]
