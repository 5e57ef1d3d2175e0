"""What `petl squeeze` prints: levels of the layers, and the found ones against even ones."""

from pathlib import Path

from petl.adapters.search.records import PICTURE, SearchResult
from petl.experiments.reports.formatting import echo, print_table, score, size

MEASURES = {"kl": "divergence from the adapter, in nats", "loss": "loss, in nats"}


def print_squeezed(found: SearchResult, original_bytes: int, out: Path) -> None:
    """Print the table of the layers, the scores and what the search gained.

    Args:
        original_bytes: size of the file of weights that was squeezed.
        out: the folder that was written.
    """
    record = found.record
    what = record.settings.what
    rows = [
        (name, f"{even:g}", f"{even_bytes:,}", f"{value:g}", f"{value_bytes:,}")
        for name, even, even_bytes, value, value_bytes in found.table
    ]
    print_table(("unit", f">even {what}", ">bytes", f">found {what}", ">bytes"), rows)
    echo()
    fitness = {"original": None, "even": record.even_fitness, "found": found.fitness}
    sizes = {"original": original_bytes, "even": found.even_bytes, "found": found.bytes}
    metric = found.metric
    lines = []
    for name, value in fitness.items():
        cells = "" if value is None else f"{value:.5f}"
        lines.append((name, f"{sizes[name]:,}", cells, score(metric, found.scores[name][metric])))
    print_table(("levels", ">bytes", f">{record.settings.metric}", f">test {metric}"), lines)
    echo()
    echo(f"{record.settings.metric}: {MEASURES[record.settings.metric]}, on {found.calibration}")
    echo(verdict(found))
    echo(f"{size(original_bytes)} -> {size(found.bytes)} in {out}, picture in {out / PICTURE}")


def verdict(found: SearchResult) -> str:
    """Return what the search gained over the even levels, in a sentence."""
    record, metric = found.record, found.record.settings.metric
    if record.search is None:
        return (
            f"{record.settings.bytes:,} bytes hold every unit at its highest level: there was "
            "nothing to search"
        )
    generations = len(record.search.history)
    if found.fitness < record.even_fitness:
        return (
            f"the search beats the even levels at equal bytes: {metric} {found.fitness:.5f} "
            f"against {record.even_fitness:.5f}, after {generations} generations"
        )
    return (
        f"{generations} generations found nothing better than the even levels, which were written"
    )
