"""What `petl merge`, `petl export` and the tools for deltas print: how outputs compare."""

from petl.adapters.export.checked_folder import Change, Difference, OutputFolder
from petl.experiments.reports.formatting import echo, size

NOTHING = 1e-6  # of the norm of the outputs: rounding
POINTS = 0.02  # of a score in 0..1 that a changed adapter may lose without a warning


def print_written(written: OutputFolder, name: str) -> None:
    """Print what was written and how its outputs compare with those of the adapted model."""
    echo(f"{name} in {written.folder}, {size(written.bytes)}")
    print_difference(written.difference)


def print_difference(difference: Difference) -> None:
    """Print how outputs compare with those of the adapted model."""
    echo(f"outputs differ by {difference.relative:.1e} of their norm,", end=" ")
    echo(f"{difference.largest:.1e} at most;", end=" ")
    if difference.cosine is None:
        echo(f"{100 * difference.same:.1f} % have the same highest logit")
    else:
        echo(f"the cosines of texts by {difference.cosine:.1e}")
    echo(f"for comparison: the adapter itself changes them by {difference.effect:.1e}")
    if difference.effect < NOTHING:
        echo("WARNING: the adapter has no effect: was it trained, and are these its files?")


def print_change(change: Change, remedy: str) -> None:
    """Print what a changed adapter does, and warn of a loss of more than 2 points.

    Args:
        remedy: what loses less.
    """
    print_difference(change.difference)
    if not change.metric:
        echo("not scored: an adapter without its run has no held-out rows")
        return
    echo(f"{change.metric} on held-out rows: {change.before:.4f} -> {change.after:.4f}")
    if change.lost > POINTS:
        echo(f"WARNING: it loses {100 * change.lost:.1f} points; {remedy}")
