"""The results of `petl eval`: scores on the terminal, and a folder with tables and a page."""

import csv
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from petl.adapters.export.saved_adapter import SavedAdapter, scores_of
from petl.data.tasks.scores import COUNTS
from petl.experiments.reports.formatting import echo, print_table
from petl.experiments.reports.formatting import score as format_score
from petl.experiments.reports.page import render_page
from petl.experiments.reports.predictions_section import Analysis, analyze, section_of
from petl.system.files.disk import write_atomic
from petl.training.runs.predicted_classes import never_predicted
from petl.training.runs.records import PREDICTIONS

SAME = 1e-6  # relative above 1: repeated evaluations of an adapter differ by less (assumption)
PAGE = "index.html"
logger = logging.getLogger(__name__)


def print_evaluation(
    saved: SavedAdapter, scores: Mapping[str, float], names: Sequence[str]
) -> None:
    """Print scores; those on the test set of a run next to those that the run ended with.

    Args:
        names: of the files; empty: the test set.
    """
    # other files than the run's test set have nothing to compare with
    if names or saved.run is None:
        print_table(("score", f">{', '.join(names)}"), [(k, exact(k, scores[k])) for k in scores])
        return
    then = scores_of(saved.run)
    # another version may have saved other scores
    rows = [(k, exact(k, scores[k]), exact(k, then[k]) if k in then else "") for k in scores]
    print_table(("score", ">now", ">scores.json"), rows)
    # `not <=`: also for a NaN
    changed = [
        k
        for k in scores
        if k in then and not abs(then[k] - scores[k]) <= SAME * max(1, abs(then[k]))
    ]
    if not then:
        echo("there are no test scores of the run to compare with")
    # before the general message: other examples explain any difference
    elif set(changed) & {*COUNTS}:
        echo(
            "the run was scored on other test examples (their number differs): these scores "
            "cannot be compared with scores.json"
        )
    elif changed:
        echo(
            f"different from scores.json: {', '.join(changed)}; the cause may be another device, "
            "precision or version"
        )


def exact(name: str, value: float) -> str:
    """Format a score with six decimals; a count without."""
    return format_score(name, value) if name in COUNTS else f"{value:.6f}"


def write_evaluation(
    saved: SavedAdapter, folder: Path, scores: Mapping[str, float], names: Sequence[str]
) -> None:
    """Write tables and a page about the predictions in a folder."""
    found = analyze(folder / PREDICTIONS)
    for name, table in tables_of(found).items():
        text = io.StringIO()
        # the default of the csv module is \r\n
        csv.writer(text, lineterminator="\n").writerows(table)
        write_atomic(folder / name, text.getvalue())
    # readable in an editor, in any script
    lines = (json.dumps(line, ensure_ascii=False) for line in found.worst)
    write_atomic(folder / "worst.jsonl", "".join(f"{line}\n" for line in lines))
    missed = never_predicted(folder / PREDICTIONS)
    if missed:
        echo(missed)
    page = render_page(
        f"Evaluation of {(saved.run or saved.adapter).absolute().name}",
        "evaluation.html",
        data=", ".join(names) or "test set of the run",
        scores=[(name, format_score(name, value)) for name, value in scores.items()],
        section=section_of(folder),
    )
    write_atomic(folder / PAGE, page)
    logger.info("predictions and tables in %s; page: %s", folder, folder / PAGE)


def tables_of(found: Analysis) -> dict[str, Iterable[Sequence[object]]]:
    """The tables of an analysis that are not empty, with their headers, by the name of a file."""
    tables: dict[str, Iterable[Sequence[object]]] = {}
    if found.classes:
        scores = [(c.name, c.precision, c.recall, c.f1, c.examples) for c in found.by_class()]
        tables["classes.csv"] = [("class", "precision", "recall", "f1", "examples"), *scores]
        # rows are labels, columns are predictions
        rows = [
            [label, *(found.confusion[label, name] for name in found.classes)]
            for label in found.classes
        ]
        tables["confusion.csv"] = [("label", *found.classes), *rows]
    if found.calibration_error is not None:
        # bins have equal width, from 0 to 1
        size = 1 / len(found.bins)
        bins = [
            (
                f"{i * size:g}",
                f"{(i + 1) * size:g}",
                b.count,
                b.confidence / b.count,
                b.correct / b.count,
            )
            for i, b in enumerate(found.bins)
            # an empty bin has no mean
            if b.count
        ]
        header = ("from", "to", "predictions", "mean confidence", "right")
        tables["calibration.csv"] = [
            header,
            *bins,
            ("expected calibration error", "", "", "", found.calibration_error),
        ]
    return tables
