"""Score against processor time of adapters in all blocks, in the upper ones, and beside them.

    python scripts/placements.py runs/placements                  # resumes where it was stopped
    python scripts/placements.py runs/placements --page docs/results.md --figure placements.svg

LoRA in all blocks, the upper half, third and sixth, and the last one, with the frozen blocks run in
each step and read from a store, and SHERL: at one number of parameters, each with the learning rate
that scores best on validation rows, over several seeds. It is a `petl study`, whose page is
FOLDER/index.html; the table, which goes between the marks of the folder's name in a page, and the
figure add the time. The seconds are those of training: filling a store comes before it, once for
all runs that share it. Settings of `petl train` may follow.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from bench.jobs.figure import seconds_axis
from page_marks import filled

from petl.cli.arguments import POSITIVE, SEED, each, file_to_read, file_to_write, folder_to_write
from petl.core.spec.blocks import last_blocks
from petl.data.models.sources import read_source
from petl.data.tasks.scores import is_percentage
from petl.errors import InputError
from petl.experiments.reports.comparison import compare
from petl.experiments.reports.comparison_report import write_page
from petl.experiments.reports.formatting import Table, mean_text
from petl.experiments.reports.page import Point, pareto_front
from petl.experiments.sweeps.study import Contender, Study, slug
from petl.training import program as app
from petl.training.compose import compose
from petl.training.runs.records import is_finished, read_results

SHARES = ("top:0.5", "top:0.33", "top:0.17", "top:1")
BUDGET = 331_776  # parameters of LoRA at rank 8 in all blocks of MiniLM
SETTINGS = ("train.buckets=auto", "train.score_before=false", f"train.budget={BUDGET}")
ALL, RUN, READ, SIDE = "all blocks", "blocks run", "from the store", "sherl"


@dataclass(frozen=True)
class Placement:
    """A contender of the study.

    Attributes:
        name: which blocks have adapters.
        label: the number of these blocks, or the method, in the figure.
        kind: `RUN` or `READ`: how the frozen blocks below are computed.
        words: of the contender.
    """

    name: str
    label: str
    kind: str
    words: str


@dataclass(frozen=True)
class Row:
    """What the finished runs of a placement give, one value for each seed."""

    placement: Placement
    metric: str
    higher_is_better: bool
    lr: float
    parameters: int
    scores: Sequence[float]
    seconds: Sequence[float]

    @property
    def score(self) -> float:
        """The mean score."""
        return statistics.fmean(self.scores)

    @property
    def median(self) -> float:
        """The median of the processor seconds of training."""
        return statistics.median(self.seconds)


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_intermixed_args()
    app.log_to_stderr()
    return app.reported(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Train what is not finished, unless a page or figure is asked for; print the table."""
    given = placements(blocks_of(arguments.settings))
    study = Study(
        folder=arguments.folder,
        contenders=[Contender(placement.words) for placement in given],
        seeds=arguments.seeds,
        rates=arguments.rates,
        overrides=[*SETTINGS, *arguments.settings],
    )
    try:
        if not (arguments.page or arguments.figure):
            study.run()
    finally:
        rows = rows_of(study, given)
        if rows:
            write_page(compare([study.folder / "runs"]), study.folder, study.tried)
            print(table(rows).markdown())
    if not rows:
        raise InputError(f"{study.folder} has no finished run: run the study without --page first")
    if arguments.page:
        block = table(rows).markdown()
        text = filled(arguments.page.read_text(), study.folder.name, block)
        arguments.page.write_text(text)
    if arguments.figure:
        draw(rows, arguments.figure)


def blocks_of(settings: Sequence[str]) -> int:
    """Return the number of blocks of the model that settings of `petl train` select."""
    source: Any = read_source(compose(["+method=lora", *settings]).model)
    return source.config().num_hidden_layers


def placements(blocks: int) -> list[Placement]:
    """Return the placements for a model with this many blocks; equal ones once."""
    found = [Placement(ALL, str(blocks), RUN, "lora")]
    for count in dict.fromkeys(len(last_blocks(share, blocks)) for share in SHARES):
        where = f"lora method.layers_to_transform=top:{count}"
        name = "last block" if count == 1 else f"last {count} of {blocks} blocks"
        found.append(Placement(name, str(count), READ, f"{where} train.cache_frozen=true"))
        found.append(Placement(name, str(count), RUN, f"{where} train.cache_frozen=false"))
    return [*found, Placement(SIDE, SIDE, RUN, "sherl")]


def rows_of(study: Study, given: Sequence[Placement]) -> list[Row]:
    """Return a row for each placement that has finished runs."""
    found = []
    for placement in given:
        name = slug(Contender(placement.words).name)
        runs = [study.folder / "runs" / name / f"seed-{seed}" for seed in study.seeds]
        results = [read_results(run) for run in runs if is_finished(run)]
        if results:
            found.append(_row(placement, results))
    return found


def _row(placement: Placement, results: Sequence[dict[str, Any]]) -> Row:
    first = results[0]
    metric = first["metric"]
    return Row(
        placement,
        metric,
        first["higher_is_better"],
        first["lr"],
        first["adapter_parameters"],
        [result["after"][metric] for result in results],
        [result["cpu_seconds"] for result in results],
    )


def table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table, with times relative to the first."""
    columns = ["adapters", "frozen blocks", f"test {rows[0].metric}", "seeds", "learning rate",
               "parameters", "CPU s of training", "relative"]  # fmt: skip
    lines = [
        [
            row.placement.name,
            row.placement.kind,
            mean_text(row.metric, list(row.scores)),
            str(len(row.scores)),
            f"{row.lr:g}",
            f"{row.parameters:,}",
            f"{row.median:.1f}",
            f"{row.median / rows[0].median:.2f}",
        ]
        for row in rows
    ]
    return Table(columns, lines)


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Return time and score of each row."""
    return [Point(row.placement.name, row.median, row.score, 0.0) for row in rows]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw score against processor seconds as an SVG file, with the Pareto front."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    metric = rows[0].metric
    factor, unit = (100, " (%)") if is_percentage(metric) else (1, "")
    # without a salt and a date of its own, the same runs give the same file
    with mpl.rc_context({"svg.hashsalt": "placements", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for kind, marker in ((RUN, "s"), (READ, "o")):
            own = [row for row in rows if row.placement.kind == kind]
            spread = [statistics.stdev(r.scores) * factor if len(r.scores) > 1 else 0 for r in own]
            scores = [row.score * factor for row in own]
            seconds = [row.median for row in own]
            axes.errorbar(seconds, scores, yerr=spread, fmt=marker, capsize=2, label=kind)
            for row, x, y in zip(own, seconds, scores, strict=True):
                axes.annotate(
                    row.placement.label, (x, y), (5, 5), textcoords="offset points", fontsize=9
                )
        best = pareto_front(points_of(rows), higher_is_better=rows[0].higher_is_better)
        front = [p.cost for p in best], [factor * p.score for p in best]
        axes.step(*front, where="post", color="0.6", zorder=0)
        seconds_axis(axes)
        axes.set(
            xlabel="processor seconds of training, median over seeds",
            ylabel=f"test {metric}{unit}, mean over seeds",
        )
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        title = "numbers: blocks with adapters; those below:"
        axes.legend(title=title, title_fontsize=8, fontsize=8, frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command_line.add_argument
    add("folder", metavar="FOLDER", type=folder_to_write, help="new, or to be resumed")
    add("settings", metavar="SETTING", nargs="*", help="of `petl train`, for every run")
    add("--seeds", type=each(SEED), default="0,1,2", metavar="S,S", help="(0,1,2)")
    add("--rates", type=each(POSITIVE), default="5e-4,1e-3,2e-3", metavar="R,R", help="to try")
    add("--page", type=file_to_read, metavar="FILE", help="update the table of a page")
    add("--figure", type=file_to_write, metavar="FILE", help="draw score against time as SVG")
    return command_line


if __name__ == "__main__":
    sys.exit(main())
