"""`train.cache_frozen`: whether a run keeps the output of its frozen blocks, and the rows of it."""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from datasets import Dataset

from petl.efficiency.frozen.rewrite import StoreFrozen, cache_frozen
from petl.errors import InputError
from petl.system.collectives import made_by
from petl.training.dataloader import Splits, batched
from petl.training.features import Context, RunFeature
from petl.training.runs.settings import TrainConfig

if TYPE_CHECKING:
    from petl.efficiency.frozen.cache import CacheRequest, FrozenCache

FEW = 0.1  # fraction of the passes that may run all blocks without a warning (assumption)
logger = logging.getLogger(__name__)


class FrozenStore(RunFeature):
    """Keeps the output of the frozen blocks of a run.

    With auto it is kept where that changes nothing but rounding and the run reads it more than
    once; the log says why not otherwise. Of the processes on a machine, one computes.
    """

    cache: "FrozenCache | None" = None

    def before_training(self, context: Context) -> None:
        """Open the stores of the run.

        Raises:
            InputError: the output cannot be kept, and the setting is true.
        """
        nothing = nothing_frozen(context)
        if nothing and self.settings is not True:  # as usual: there is nothing to report
            return
        try:
            task = context.splits.task
            if not task.tensors_by_row:
                raise InputError(f"data.task={task.name} has several texts a row")
            if nothing:
                raise InputError(nothing)
            self.cache = _cache(context)
        except InputError as error:
            if self.settings is True:
                raise InputError(f"train.cache_frozen=true is not possible: {error}") from error
            logger.info("the output of frozen blocks is not kept: %s", error)

    def after_training(self, context: Context, step: int) -> Mapping[str, object]:
        """Log how many passes read the stores; a warning if many did not."""
        cache = self.cache
        if cache is None:
            return {}
        total = cache.hits + cache.misses
        # single ones are no fault: a segmented loss tries its head on a token, once
        if cache.misses > total * FEW:
            logger.warning(
                "%d of %d passes skipped the frozen blocks; the last that did not: %s",
                cache.hits,
                total,
                cache.reason,
            )
        else:
            logger.info("%d of %d passes skipped the frozen blocks", cache.hits, total)
        return {}


def nothing_frozen(context: Context) -> str:
    """Return why a run has no frozen blocks whose output could be kept; "" if it has."""
    if context.settings.steps == 0:
        return "train.steps=0 trains nothing"
    return StoreFrozen().refusal(context.model)


def _cache(context: Context) -> "FrozenCache":
    from petl.efficiency.frozen.store import why_not  # of runs with frozen blocks

    model, splits, settings = context.model, context.splits, context.settings
    if not isinstance(splits.train, Dataset):
        raise InputError("the training examples are a stream (data.streaming=true)")
    cache = cache_frozen(model, without_dropout=settings.cache_frozen is True)
    try:
        # the precision of training: it is part of a store's name, and of what the blocks compute
        with context.accelerator.autocast():
            wanted = find(cache, splits, settings)
            # one decision for all processes: the disk fills while the first of them writes
            missing = sum(each.bytes for each in wanted if not each.is_there)
            passes = math.inf if settings.cache_frozen is True else splits.passes(settings)
            reason = made_by(0, lambda: why_not(missing, wanted[0].folder, passes))
            if reason:
                raise InputError(reason)
            _say(cache, wanted)
            for each in wanted:
                cache.open(each)
    # KeyboardInterrupt too: a model that outlives the run must not keep swapped blocks
    except BaseException:
        cache.close()
        raise
    return cache


def find(cache: "FrozenCache", splits: Splits, settings: TrainConfig) -> list["CacheRequest"]:
    """Return the stores of a run: of its train, validation and test rows."""
    return [
        cache.find(part.select_columns(batched(part)), splits.collate)
        for part in splits.parts(settings)
    ]


def _say(cache: "FrozenCache", wanted: list["CacheRequest"]) -> None:
    k, size = cache.k, sum(each.bytes for each in wanted) / 1e6
    rows = sum(len(each.contents.keys) for each in wanted)
    logger.info(
        "blocks 0 to %d of %d are frozen: their output for %d different examples is %s %s "
        "(%.1f MB)",
        k - 1,
        len(cache.prefix.blocks),
        rows,
        "read from" if all(each.is_there for each in wanted) else "computed once and kept in",
        cache.folder,
        size,
    )
    if cache.left_out:
        logger.warning(
            "train.cache_frozen=true leaves out the dropout below block %d: %s",
            k,
            ", ".join(cache.left_out),
        )
