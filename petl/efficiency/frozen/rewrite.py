"""`petl.cache_frozen`: the output of a model's frozen blocks, computed once for each row."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from petl.core.parameters import check_module
from petl.core.support import Capability
from petl.efficiency.frozen.prefix import FrozenPrefix, find_prefix
from petl.efficiency.rewrite import AUTO, Rewrite, Value
from petl.errors import InputError, UnsupportedError
from petl.system.files.paths import cache_folder, path_of

if TYPE_CHECKING:
    from petl.efficiency.frozen.cache import FrozenCache


class StoreFrozen(Rewrite):
    """`cache_frozen` as a rewrite: passes compute all blocks until its `FrozenCache` is filled.

    With True as value, dropout below the first trained block is left out.
    """

    capability = Capability.STORE
    # of a sharded model, which hooks gather, no process has the weights
    lacks = {
        Capability.FSDP: "it is sharded over processes, and no process has its weights",
        Capability.EXTRA_LOSS: "an extra loss may read every block",
    }
    saves = "the output of frozen blocks is computed once"
    value = AUTO
    needs_rows = True

    def refusal(self, model: nn.Module, value: Value = AUTO) -> str:
        """Return why the output of frozen blocks cannot be kept, whatever the rows."""
        try:
            prefix_of(model)
        except UnsupportedError as error:
            return str(error)
        return ""

    def change(self, model: nn.Module, value: Value = AUTO) -> int:
        """Attach a `FrozenCache` in petl's cache; return the number of frozen blocks."""
        return cache_frozen(model, without_dropout=value is True).k

    def undo(self, model: nn.Module) -> None:
        """Detach it."""
        from petl.efficiency.frozen.feed import feed_of  # as in `cache_frozen`

        feed = feed_of(model)
        if feed is not None:
            feed.close()


def prefix_of(model: nn.Module) -> FrozenPrefix:
    """Return the frozen blocks of a model, one or more.

    Raises:
        UnsupportedError: there are none, or a store of them is attached; or as `find_prefix`.
    """
    reason = Rewrite.refusal(StoreFrozen(), model)
    if reason:
        raise UnsupportedError(reason)
    prefix = find_prefix(model)
    if not prefix.k:
        raise UnsupportedError(f"no block is frozen below all others: {prefix.reason}")
    if "petl_feed" in vars(prefix.blocks[0]):
        kind = type(prefix.base).__name__
        raise UnsupportedError(f"blocks of {kind} are cached already: close that cache first")
    return prefix


def cache_frozen(
    model: nn.Module, folder: str | Path | None = None, *, without_dropout: bool = False
) -> "FrozenCache":
    """Keep the output of the frozen blocks below the first trained one, and read it in all passes.

    Where nothing trains below block k, blocks 0 to k-1 are a fixed function of a row:

    >>> cache = petl.cache_frozen(model, "frozen")  # after petl.wrap
    >>> cache.fill(train_rows, collate)  # computes these rows, or finds them in the folder
    >>> ...  # train in any loop, or by Trainer
    >>> cache.close()

    A pass uses stored states if all its rows are there. Other passes run as they would without:
    those with new rows, with a key-value cache (generation) or with hidden states or attentions as
    outputs. Results equal those without a store up to rounding, since the kernels of a product
    depend on the size of a batch; runs that read one store are equal to the digit.

    A model may be compiled after that, without fullgraph: the look-up of a batch's rows is outside
    of the graphs, of which a pass from the store has only those above the frozen blocks.

    Args:
        model: with adapters in its upper blocks, or none; on its device.
        folder: of stores, each named by weights, config, k, precision and rows; null: the folder
            "frozen" of petl's cache ($PETL_CACHE).
        without_dropout: allow dropout below block k, which stored rows do not get.

    Raises:
        UnsupportedError: no block is frozen below the first trained one, or the model has no
            single list of blocks, is quantized or sharded.
        InputError: `folder` is no folder, nor a path where one could be made.
    """
    from petl.efficiency.frozen.cache import FOLDER, FrozenCache  # of models with frozen blocks

    check_module(model, "petl.cache_frozen")
    where = cache_folder() / FOLDER if folder is None else folder_of(folder)
    return FrozenCache(model, prefix_of(model), where, without_dropout=without_dropout)


def folder_of(folder: object) -> Path:
    """Return the path of a folder of stores, which need not be there yet."""
    if not isinstance(folder, str | Path):
        raise InputError(
            f"folder={folder!r} of petl.cache_frozen is not a path: give the folder of the stores"
        )
    path = path_of("folder", str(folder))
    file = next((each for each in (path, *path.parents) if each.exists()), path)
    if file.exists() and not file.is_dir():
        raise InputError(
            f"folder={folder} of petl.cache_frozen: {file} is a file, so no store can be below it; "
            "give a folder, which need not be there yet"
        )
    return path
