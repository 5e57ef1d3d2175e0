"""What `petl merge`, `petl export` and the tools for deltas print: how outputs compare."""

from petl.adapters.export.checked_folder import Difference, Written
from petl.experiments.reports.formatting import echo, size


def print_written(written: Written, name: str) -> None:
    """Print what was written and how its outputs compare with those of the adapted model."""
    echo(f"{name} in {written.folder}, {size(written.bytes)}")
    print_difference(written.difference)


def print_difference(difference: Difference) -> None:
    """Print how outputs compare with those of the adapted model."""
    echo(f"outputs differ by {difference.relative:.1e} of their norm,", end=" ")
    echo(f"{difference.largest:.1e} at most;", end=" ")
    echo(f"{100 * difference.same:.1f} % have the same highest logit")
    echo(f"for comparison: the adapter itself changes them by {difference.effect:.1e}")
