"""The command `petl shrink`: prune, recover, merge, write."""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from petl.adapters.shrink.command import Work
from petl.adapters.shrink.source import ShrinkSource
from petl.cli.table import ShrinkOptions
from petl.cli.train import train
from petl.core.types import Record
from petl.errors import RunStopped
from petl.experiments.reports.shrunk import PAGE, card, page, print_shrunk
from petl.system.files.disk import write_atomic
from petl.system.processes import is_first
from petl.system.settings.command_line import how_to_continue
from petl.training.program import SIGNALLED, WrappedError
from petl.training.runs.model_card import README


def shrink(options: ShrinkOptions) -> None:
    """Make a model smaller, recover it, write it, and print what it lost."""
    trust = {"trust_remote_code": options.trust_remote_code, "other_base": options.other_base}
    source = ShrinkSource.at(options.run, options.data, options.overrides, **trust)
    names = ("sparsity", "widths", "multiple", "heads", "metric", "bias_correction")
    # measured on all processes, written by the first
    work = Work(source, {name: getattr(options, name) for name in names}, options.out)
    record = work.earlier()
    if record is not None and options.recover == 0:  # an earlier command was to recover it
        work.take(record, lambda folder: describe(record, folder))
    elif record is None:
        small, record = work.shrunk()
        if options.recover == 0:
            work.write(small, options.out, record, lambda folder: describe(record, folder))
        else:
            work.write(small, work.base, record, lambda folder: None)
    if options.recover != 0:
        recover(work, record, options)
    if is_first():
        print_shrunk(record, options.out)


def recover(work: Work, record: Record, options: ShrinkOptions) -> None:
    """Train a LoRA on the small model, merge it, and write the result."""
    try:
        train(DictConfig(work.recovery(record, options.rank, options.recover)))
    except WrappedError as passing:
        error = passing.error
        # what it says is how to resume the run alone
        if isinstance(error, RunStopped) and error.status > SIGNALLED:
            text = f"the recovery is interrupted; {how_to_continue()}"
            raise RunStopped(text, status=error.status) from error
        raise
    record["scores"]["recovered"] = work.recovered()
    work.finish(record, lambda folder: describe(record, folder))


def describe(record: Record, folder: Path) -> None:
    """Write README and page of a shrunk model into its folder."""
    write_atomic(folder / README, card(record, shlex.join(["petl", *sys.argv[1:]])))
    title = f"{record['settings']['source']}, made smaller"
    write_atomic(folder / PAGE, page(record, title))
