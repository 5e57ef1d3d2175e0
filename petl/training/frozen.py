"""`train.cache_frozen`: whether a run keeps the output of its frozen blocks, and the rows of it."""

import logging

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel

from petl.data.streaming import StreamedRows
from petl.efficiency.frozen.cache import FrozenCache, Wanted, cache_frozen
from petl.efficiency.frozen.prefix import find_prefix
from petl.efficiency.frozen.store import check_space
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import made_by
from petl.training.dataloader import Splits, batched
from petl.training.runs.settings import TrainConfig

PAYS = 1.5  # passes over the train rows; a store costs the frozen blocks of one
FEW = 0.1  # fraction of the passes that may run all blocks without a warning (assumption)
logger = logging.getLogger(__name__)


def cached_blocks(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator
) -> FrozenCache | None:
    """Keep the output of a run's frozen blocks as `train.cache_frozen` says; None if they run.

    With auto they are kept where that changes nothing but rounding and the run reads them more than
    once; the log says why not otherwise. All processes call it; of those on a machine, one
    computes.

    Raises:
        InputError: they cannot be kept, and the setting is true.
    """
    if settings.cache_frozen is False:
        return None
    try:
        return _cache(model, splits, settings, accelerator)
    except InputError as error:
        if settings.cache_frozen is True:
            raise InputError(f"train.cache_frozen=true is not possible: {error}") from error
        if getattr(error, "of_interest", True):
            logger.info("the output of frozen blocks is not kept: %s", error)
    return None


class _NothingFrozen(UnsupportedError):
    """No block is frozen, as usual: nothing to report."""

    of_interest = False


def _cache(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator
) -> FrozenCache:
    if settings.steps == 0:
        raise _NothingFrozen(f"train.steps={settings.steps} trains nothing")
    if isinstance(splits.train, StreamedRows):
        raise InputError("the training examples are a stream (data.streaming=true)")
    try:
        if settings.cache_frozen == "auto" and not find_prefix(model).k:
            raise _NothingFrozen("no block is frozen below all others")  # as usual
        cache = cache_frozen(model, without_dropout=settings.cache_frozen is True)
    except UnsupportedError as error:
        raise _NothingFrozen(str(error)) from error
    try:
        # the precision of training: it is part of a store's name, and of what the blocks compute
        with accelerator.autocast():
            wanted = find(cache, splits, settings)
            # one decision for all processes: the disk fills while the first of them writes
            reason = made_by(0, lambda: why_not(wanted, splits, settings))
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


def find(cache: FrozenCache, splits: Splits, settings: TrainConfig) -> list[Wanted]:
    """Return the stores of a run: of its train, validation and test rows."""
    return [
        cache.find(part.select_columns(batched(part)), splits.collate)
        for part in parts_of(splits, settings)
    ]


def parts_of(splits: Splits, settings: TrainConfig) -> list[Dataset]:
    """Return the rows of a run in the parts that have a store each."""
    parts = [splits.known, splits.validation, splits.test if settings.test else None]
    return [part for part in parts if part is not None and len(part)]


def why_not(wanted: list[Wanted], splits: Splits, settings: TrainConfig) -> str:
    """Return why stores that could be made are not; "" if they are."""
    missing = sum(each.bytes for each in wanted if not each.is_there)
    passes = passes_of(splits, settings)
    if missing and passes < PAYS and settings.cache_frozen == "auto":
        return f"the run reads its examples {passes:.2g} times, and computing them costs as much"
    try:
        check_space(wanted[0].folder, missing)
    except InputError as error:
        return str(error)
    return ""


def passes_of(splits: Splits, settings: TrainConfig) -> float:
    """Return how often a run reads its train rows."""
    sampler = splits.sampler(settings)
    # a stream of classes is one epoch, which reads each row several times
    repeats = 1 if splits.stages is None else splits.stages.repeats
    return repeats * sampler.steps / sampler.steps_per_epoch


def _say(cache: FrozenCache, wanted: list[Wanted]) -> None:
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


def report(cache: FrozenCache | None) -> None:
    """Log how many passes of a run read the stores; a warning if many did not."""
    if cache is None:
        return
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
