"""The output of a model's frozen blocks, computed once for each row: what is attached to it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from petl.efficiency.frozen.feed import FrozenFeed, autocast_of
from petl.efficiency.frozen.fill import Collate, Contents, Prober, ingredients
from petl.efficiency.frozen.prefix import FrozenPrefix
from petl.efficiency.frozen.store import (
    CONTENT,
    OutputSpec,
    Store,
    exists,
    locked,
    name_of,
    present,
    size_of,
    write,
)
from petl.errors import InputError
from petl.system.files.paths import cache_folder

FOLDER = "frozen"  # of stores, in the cache folder of petl
logger = logging.getLogger(__name__)


class FrozenCache:
    """The outputs of the frozen blocks of one model, in a folder, by content.

    Attributes:
        k: number of frozen blocks: the blocks below the first that has a trained tensor, an
            adapter or a hook.
        left_out: dropout modules below block k, which a stored row does not get.
    """

    def __init__(
        self, model: nn.Module, prefix: FrozenPrefix, folder: Path, *, without_dropout: bool
    ) -> None:
        self.model, self.folder, self.without_dropout = model, folder, without_dropout
        self.prefix = prefix
        self.left_out: list[str] = []
        # from here on the model is changed
        self._feed = FrozenFeed(model, self.prefix)
        self._prober = Prober(model, self._feed)
        self._known = ""  # digest of the prefix, and the precision in which it was read
        self._read: str | None = None
        self._feed.is_unchanged = lambda: self._prober.digest() == self._known

    @property
    def k(self) -> int:
        """Number of frozen blocks."""
        return self.prefix.k

    @property
    def hits(self) -> int:
        """Passes of the model whose frozen blocks did not run."""
        return self._feed.passes.hits

    @property
    def misses(self) -> int:
        """Passes since the first `fill` whose frozen blocks ran."""
        return self._feed.passes.misses

    @property
    def reason(self) -> str:
        """Why the last such pass ran them."""
        return self._feed.passes.reason

    def find(self, rows: Sequence[object], collate: Collate) -> "CacheRequest":
        """Return the store that these rows need, which may not be there yet.

        Call it in the precision of training (inside of `torch.autocast`, if that uses it).

        Args:
            rows: examples, by index; a `datasets.Dataset`, or a list.
            collate: makes a batch, a dict of tensors that the model takes, of a list of examples.

        Raises:
            InputError: there are no rows, or `collate` does not make dicts of them.
            UnsupportedError: the output of the frozen blocks is not a fixed function of a row: the
                message says why.
        """
        if not len(rows):
            raise InputError(f"rows={rows!r} has no rows whose frozen blocks could be kept")
        contents = Contents(self._prober, rows, collate)
        # one row is enough (assumption): form, dropout and the modules called are those of all rows
        form, self.left_out = self._prober.inspect(
            contents.batch(contents.order[:1]), without_dropout=self.without_dropout
        )
        return CacheRequest(self.folder / name_of(self._digest(), contents.digest), form, contents)

    def _digest(self) -> str:
        """Return the digest of the prefix, which is read once: models may be large."""
        precision = autocast_of(self.prefix.body)
        if self._read == precision and not self._feed.has_changed():
            return self._known
        # rows have the same keys in stores of another prefix, so these must not be mixed
        if self._feed.stores:
            raise InputError(
                f"the frozen blocks, or the precision {self._read or 'float32'!r}, have changed "
                "since a store was opened: close this cache, and make another one"
            )
        self._known, self._read = self._prober.digest(), precision
        self._feed.remember(self._prober.called)
        return self._known

    def fill(self, rows: Sequence[object], collate: Collate) -> bool:
        """Open the store of these rows; compute it first if it is not there.

        Rows are computed in one order, whatever that of `rows`. Call it again for further rows,
        such as those of an evaluation. Arguments are those of `find`.

        Returns:
            True if the store was there.

        Raises:
            UnsupportedError: as `find`.
            InputError: the disk is too small, or rows differ each time that they are read.
        """
        return self.open(self.find(rows, collate))

    def open(self, wanted: "CacheRequest") -> bool:
        """Open a store that `find` returned; as `fill`."""
        # from the file, by the process that wrote it too: first and later runs read the same bits
        try:
            store, there = Store(wanted.folder / CONTENT), True
        except InputError:  # absent or damaged
            with locked(wanted.folder):
                store, there = wanted.read_or_write()
        self._feed.autocast = self._read or ""
        self._feed.stores.append(store)
        return there

    def close(self) -> None:
        """Undo all changes to the model: its frozen blocks run in each pass."""
        self._feed.close()

    def __enter__(self) -> "FrozenCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class CacheRequest:
    """The store of some rows: its folder, the form of its states, its rows."""

    folder: Path
    form: OutputSpec
    contents: Contents

    @property
    def is_there(self) -> bool:
        """True if it is complete."""
        return exists(self.folder)

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        positions = self.contents.positions(self.form)
        return size_of(self.form, len(positions), sum(positions))

    def read_or_write(self) -> tuple[Store, bool]:
        """Return the store, and True if it was there and whole; its folder is locked."""
        content = self.folder / CONTENT
        try:  # another process may have filled it in the meantime
            return Store(content), True
        except InputError as error:
            if content.exists():
                logger.warning("%s: its rows are computed again", error)
        self.write()
        return Store(content), False

    def write(self) -> None:
        """Compute it; its folder is locked."""
        contents, form = self.contents, self.form
        positions = contents.positions(form)
        write(
            self.folder,
            form,
            contents.keys,
            positions,
            contents.states(form),
            computation=contents.prober.computation,
            rows=contents.digest,
        )


def missing_rows(
    model: nn.Module,
    prefix: FrozenPrefix,
    parts: Sequence[Sequence[object]],
    collate: Collate,
    *,
    precision: str,
    device: torch.device,
) -> list[bool]:
    """Return, for each part of the rows of a run, True if no store in petl's cache has it.

    The values of weights are not compared: those of `model` are not read, and may be absent.

    Args:
        model: on any device.
        prefix: its frozen blocks.
        precision: dtype of autocast; "": none.
        device: of the run.
    """
    there = present(cache_folder() / FOLDER, name_of(*ingredients(prefix, precision, device)))
    if not there:  # as ever: rows need not be read
        return [True] * len(parts)
    feed = FrozenFeed(model, prefix)
    try:
        prober = Prober(model, feed, device=torch.device("cpu"))
        return [Contents(prober, rows, collate).digest not in there for rows in parts]
    finally:
        feed.close()
