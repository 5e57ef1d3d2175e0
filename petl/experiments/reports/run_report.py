"""The results of a run: the scores printed at its end, and the page report.html.

The page is made from the files in the run's folder alone, so it can be written again later.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from petl.core.model.heat_map import HEAT_MAPS, HeatMap
from petl.core.types import Record
from petl.data.models.sources import RandomInit
from petl.data.tasks import TASKS, task_class
from petl.data.tasks.scores import is_beside, is_percentage, shown
from petl.errors import InputError
from petl.experiments.reports.formatting import (
    count_text,
    duration,
    echo,
    interval,
    interval_text,
    print_table,
    sample_size,
    score,
    size,
)
from petl.experiments.reports.page import (
    address,
    bar_chart,
    chart,
    embed_png,
    line_chart,
    render_page,
)
from petl.experiments.reports.predictions_section import section_of
from petl.system.files.disk import check_links, write_atomic
from petl.system.files.read import read_json, read_text
from petl.training.features import charts_of, sections_of
from petl.training.features.section import Curve, Section
from petl.training.runs.card_code import placed
from petl.training.runs.config import names_of
from petl.training.runs.predicted_classes import never_predicted
from petl.training.runs.records import (
    ADAPTER,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    PREDICTIONS,
    REPORT,
    SCORES,
    is_finished,
    read_environment,
    read_log,
    read_results,
    read_scores,
    read_stored,
)
from petl.training.runs.run_folder import Run
from petl.training.runs.settings import adamr_text

LABELS = {  # of the evaluations in scores.json
    "before": "before training",
    "linear_probe": "linear probe (head only, frozen backbone)",
    "after": "adapted",
}
OWN_CHARTS = {"loss", "validation"}  # of the log: drawn first, together
AUXILIARY = ("aux_loss", "Auxiliary loss", "auxiliary loss (weighted)")
# of the loop; those of method, loss and features are before them
CHARTS = (
    ("grad_norm", "Gradient norm", "gradient norm (before clipping)"),
    ("lr", "Learning rate", "learning rate of the adapter"),
)
NOT_DRAWN = {"excess", "step", "epoch", "tokens", "padding", "seconds"}
MIN_SECONDS = 1e-3  # activities that took less are left out of the chart of times


# On the terminal


def print_summary(run: Run) -> None:
    """Print the scores of a finished run, its cost and where its adapter is (main process only)."""
    # every process calls this; only one writes
    if not run.accelerator.is_main_process:
        return
    scores = run.scores
    title = " · ".join(names_of(run.config.resolved))
    header, *rows = _score_rows(scores)
    if scores["after"]:
        print_table([header[0], *(f">{name}" for name in header[1:])], rows, title)
    else:
        echo(f"{title}: not scored on the test set (train.test=false)")
    sections = sections_of(run.path, run.config.resolved, scores)
    missed = never_predicted(run.path / PREDICTIONS, run.config.resolved)
    others = (each.line for each in sections)
    for line in interval_line(scores), missed, validation_line(scores), *others:
        if line:
            echo(line)
    if isinstance(run.config.model, RandomInit):
        echo("the base model has random weights: it was not pretrained")
    cost = (
        f"trainable parameters: {scores['trainable_parameters']:,}; adapter file: "
        f"{size(scores['adapter_bytes'])}; training time: {duration(scores['seconds'])}"
    )
    if scores["unit"] == "tokens":  # images and audio clips are never padded
        cost += f"; padding: {100 * scores['padding']:.1f} % of the computed positions"
    # lines are not wrapped, so that paths can be copied
    echo(cost)
    if scores.get("coverage"):
        echo(scores["coverage"]["summary"])
    echo(f"saved in {run.path / ADAPTER}")
    echo(f'to load it: import petl; model = petl.load(base, "{run.path / ADAPTER}")')
    if run.tracker and run.tracker.closing():
        echo(run.tracker.closing())


def _score_rows(scores: Record) -> list[list[str]]:
    """Header and rows of the table of test scores, the task's metric first."""
    # `get`: train.test=false saves None, other keys may be absent
    evaluated = {label: scores[key] for key, label in LABELS.items() if scores.get(key)}
    # a dict as an ordered set: the first column is the metric that selects the best checkpoint
    names = {scores["metric"]: None} if "metric" in scores else {}
    names |= dict.fromkeys(name for values in evaluated.values() for name in values)
    columns = [name for name in names if name != "lr" and not is_beside(name)]
    rows = [
        [label, *(score(name, values[name]) if name in values else "" for name in columns)]
        for label, values in evaluated.items()
    ]
    # all evaluations are on the same test set
    counted = sample_size(next(iter(evaluated.values()), {}))
    return [["test scores" + (counted and f", {counted}"), *map(shown, columns)], *rows]


def interval_line(scores: Record) -> str:
    """The interval of the task's metric on the test examples; "" for metrics without one."""
    metric, after = scores["metric"], scores["after"]
    limits = interval(metric, after[metric], after) if after else None
    if limits is None:
        return ""
    found = interval_text(metric, limits)
    return f"adapted {shown(metric)}: 95 % interval {found}, for the choice of examples"


def validation_line(scores: Record) -> str:
    """The best score on the validation examples, and their number; "" without any."""
    if scores["validation"] is None:
        return ""
    from petl.experiments.reports.entries import validation_of  # of runs that validate

    metric, found = scores["metric"], validation_of(scores)
    counted = sample_size(found)
    best = score(metric, scores["validation"])
    return f"best validation {shown(metric)}: {best}" + (counted and f" ({counted})")


# On a page


def write_report(run: Run) -> None:
    """Write the report of a finished run (main process only)."""
    if run.accelerator.is_main_process:
        write_page(run.path)


def write_page(folder: Path) -> Path:
    """Write report.html into the folder of a run, finished or not; return the file.

    Raises:
        InputError: it is not the folder of a run, or a link in it leads out of it.
    """
    # reads nothing yet: each file is read when a section needs it
    record = RunRecord(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    check_links(folder)  # the page contains what these files contain
    header, *rows = _score_rows(record.scores)
    write_atomic(  # atomic: a page that is being read is never incomplete
        folder / REPORT,
        render_page(
            " · ".join(names_of(record.config)),
            "run.html",
            about=about(record),
            links=links(record),
            summary=summary(record),
            lines=[each.line for each in record.sections if each.line],
            header=header,
            rows=rows,
            facts=facts(record),
            charts=charts(record),
            clock=clock(record),
            time=time_chart(record),
            sections=[drawn(each, folder) for each in record.sections],
            heat_maps=record.heat_maps,
            plots=[(plot_title(file), embed_png(file)) for file in record.plots],
            section=section_of(folder),
            loading=record.loading,
            config=yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True),
            environment=environment(record),
        ),
    )
    return folder / REPORT


@dataclass(frozen=True)
class RunRecord:
    """The files of a run's folder, parsed; a file that does not exist yet counts as empty."""

    folder: Path

    @cached_property
    def config(self) -> Record:
        """The configuration of the run."""
        return read_stored(self.folder / CONFIG)

    @cached_property
    def scores(self) -> Record:
        """scores.json."""
        if not (self.folder / SCORES).exists():
            return {}
        # an unfinished run lacks the keys that `read_results` checks
        return read_results(self.folder) if is_finished(self.folder) else read_scores(self.folder)

    @cached_property
    def environment(self) -> Record:
        """environment.json."""
        return read_environment(self.folder) if (self.folder / ENVIRONMENT).exists() else {}

    @cached_property
    def metrics(self) -> list[Record]:
        """The lines of metrics.jsonl."""
        file = self.folder / METRICS
        return read_log(file) if file.exists() else []

    def series(self, key: str) -> list[tuple[float, float]]:
        """A metric of the log as points (step, value), without values that are not finite."""
        points = ((line["step"], line[key]) for line in self.metrics if key in line)
        return [point for point in points if math.isfinite(point[1])]

    def validation_series(self, name: str) -> list[tuple[float, float]]:
        """A score or the loss on the validation examples, as `series`."""
        lines = (line for line in self.metrics if name in line.get("validation", {}))
        points = ((line["step"], line["validation"][name]) for line in lines)
        return [point for point in points if math.isfinite(point[1])]

    @property
    def validation_scores(self) -> list[str]:
        """Names of the scores on the validation examples, without the loss."""
        lines: list[Record] = [line.get("validation", {}) for line in self.metrics]
        names = dict.fromkeys(name for line in lines for name in line)
        return [name for name in names if name not in ("lr", "loss") and not is_beside(name)]

    @property
    def times(self) -> dict[str, float]:
        """Seconds by activity, the longest first."""
        split = self.scores.get("time_split", {})
        spent = {name: seconds for name, seconds in split.items() if seconds >= MIN_SECONDS}
        return dict(sorted(spent.items(), key=lambda item: -item[1]))

    @cached_property
    def heat_maps(self) -> list[HeatMap]:
        """What the method did, by layer."""
        return read_heat_maps(self.folder)

    @cached_property
    def sections(self) -> list[Section]:
        """Parts of the page of what the run did besides training."""
        return sections_of(self.folder, self.config, self.scores)

    @property
    def plots(self) -> list[Path]:
        """The plots of the folder that no other part of the page shows."""
        files = sorted(file for file in self.folder.glob("*.png") if file.is_file())
        # those are drawn on the page itself
        drawn = {each.name for each in self.heat_maps}
        shown = ((*each.drawn, *each.pictures) for each in self.sections)
        drawn |= {Path(name).stem for names in shown for name in names}
        return [file for file in files if file.stem not in drawn]

    @property
    def loading(self) -> str:
        """The lines of Python that load the adapter."""
        readme = self.folder / ADAPTER / "README.md"
        text = placed(read_text(readme), str(readme.parent.absolute())) if readme.exists() else ""
        # not a regular expression: some need a time that grows with the square of the length
        _, *blocks = f"\n{text}".split("\n```python\n")
        return "".join(block.partition("\n```")[0] + "\n" for block in blocks)

    @property
    def last_step(self) -> int:
        """The last step in the log; 0 without one."""
        return self.metrics[-1]["step"] if self.metrics else 0


def read_heat_maps(run: Path) -> list[HeatMap]:
    """Read heat_maps.json of a run's folder; empty without the file.

    Raises:
        InputError: it cannot be read, or is no list of heat maps.
    """
    file = run / HEAT_MAPS
    if not file.exists():
        return []
    maps = [HeatMap(**entries) for entries in read_json(file, list[HeatMap])]
    for i, each in enumerate(maps):
        # empty for a map without rows, which is refused as well
        widths = {len(row) for row in each.cells}
        if len(each.cells) != len(each.rows) or widths != {len(each.columns)}:
            raise InputError(
                f"{file} cannot be used: [{i}].cells has not the {len(each.rows)} rows of "
                f"{len(each.columns)} values of its names"
            )
    return maps


def about(record: RunRecord) -> str:
    """Return the name of the run's folder, and when the run started."""
    started = record.environment.get("started", "").replace("T", " ")
    name = f"run {record.folder.absolute().name}"
    return f"{name}, started {started}" if started else name


def links(record: RunRecord) -> dict[str, str]:
    """Return the addresses of the run's folder and of its files, by name."""
    names = (ADAPTER, CONFIG, SCORES, METRICS, ENVIRONMENT)
    files = {name: record.folder / name for name in names if (record.folder / name).exists()}
    found = {"folder of the run": record.folder, **files}
    # relative addresses: the folder may be moved
    return {name: address(file, record.folder) for name, file in found.items()}


def summary(record: RunRecord) -> str:
    """Return the outcome of the run in one sentence."""
    scores = record.scores
    # written at the end of a run
    if "metric" not in scores:
        return f"The run is not finished; its log ends at step {record.last_step}."
    metric, after = scores["metric"], scores["after"]
    if not after:
        best = validation_line(scores).capitalize()
        return f"{best}. The test set was not scored (train.test=false)."
    examples = f"{after['rows']:,.0f} test examples" if "rows" in after else "the test examples"
    title = metric.capitalize() if shown(metric) == metric else shown(metric)
    result = f"{title} on {examples}: {score(metric, after[metric])}"
    others = [
        f"{score(metric, scores[key][metric])} {name}"
        for key, name in (("before", "before training"), ("linear_probe", "with a linear probe"))
        if scores.get(key)
    ]
    limits = interval(metric, after[metric], after)
    if limits is not None:
        result += f", 95 % interval {interval_text(metric, limits)}"
    return f"{result} ({', '.join(others)})." if others else f"{result}."


def facts(record: RunRecord) -> dict[str, str]:
    """Return sizes, length and cost of a finished run, by label."""
    scores = record.scores
    # the run has not finished training
    if "steps" not in scores:
        return {}
    trained, own = scores["trainable_parameters"], scores["adapter_parameters"]
    has_head = trained > own
    rows = {
        "trainable parameters": f"{trained:,}{' (including a trained head)' if has_head else ''}",
        "adapter parameters": f"{own:,}",
        **({"coverage": scores["coverage"]["summary"]} if scores.get("coverage") else {}),
        "adapter file": f"{size(scores['adapter_bytes'])} ({scores['adapter_bytes']:,} bytes)",
        "length": f"{count_text(scores['steps'], 'step')}, {scores['tokens']:,} {scores['unit']}",
        "time in the training loop": f"{duration(scores['seconds'])}, "
        f"{duration(scores['cpu_seconds'])} of processor time",
        "peak memory (RSS)": size(scores["peak_rss_bytes"]),
    }
    for key, value in scores.get("method", {}).items():
        label = key.replace("_", " ").replace("bytes", "size")
        rows[label] = size(value) if "bytes" in key else score(key, value)
    if scores["unit"] == "tokens":  # images and audio clips are never padded
        rows["padding"] = f"{100 * scores['padding']:.1f} % of the computed positions"
    if "peak_device_bytes" in scores:
        rows["peak memory (device)"] = size(scores["peak_device_bytes"])
    if scores["best_step"] is not None:
        # the best on the validation examples, which need not be the last step
        rows["saved checkpoint"] = f"step {scores['best_step']:,}, {validation_line(scores)}"
    head = f", of the head {scores['head_lr']:.3g}" if has_head and scores.get("head_lr") else ""
    rows["peak learning rate"] = f"{scores['lr']:.3g}{head}"
    optimizer = adamr_text(record.config["train"])
    if optimizer is not None:
        rows["optimizer"] = optimizer
    return rows


def environment(record: RunRecord) -> dict[str, str]:
    """Return machine, versions and command of the run, by label."""
    values = record.environment
    if not values:
        return {}
    device = "" if values["device"] == "cpu" else f"{values['device']}; "
    start = values.get("init_from")
    return {
        "command": values["command"],
        **({"initial adapter": start} if start else {}),
        "started": values["started"],
        "machine": f"{device}{values['processor']}; cores: {values['cores']}, threads per process: "
        f"{values['threads']}, processes: {values['processes']}",
        "platform": f"{values['platform']}, Python {values['python']}",
        "petl revision": str(values["git"]),
        "packages": ", ".join(
            f"{name} {version}" for name, version in values["packages"].items() if version
        ),
    }


def clock(record: RunRecord) -> str:
    """Return how the times were measured."""
    if record.environment.get("device", "cpu") == "cpu":
        return "Wall-clock time, main process."
    return (
        "Device time between events in the stream of the main process; data is the time in which "
        "the device waited for data."
    )


# Plots


def plot_title(file: Path) -> str:
    """Return the heading of a plot: `ranks.png` gives "Ranks"."""
    return file.stem.replace("_", " ").capitalize()


def charts(record: RunRecord) -> list[str]:
    """Return a chart of each metric in the log against the optimizer step, as SVG."""
    task = record.scores.get("task")
    unit = task_class(task).loss_unit if task in TASKS else ""
    best_step = record.scores.get("best_step")
    kept = None if best_step is None else (f"saved checkpoint (step {best_step:,})", best_step)
    # training and validation loss share one chart, to show overfitting
    losses = [
        Curve("training", record.series("loss")),
        Curve("validation", record.validation_series("loss")),
    ]
    # empty if the run was stopped before its first log line
    drawn = [_chart(losses, "Loss", f"training loss{unit}", marked=kept)]
    for name in record.validation_scores:
        factor = 100 if is_percentage(name) else 1
        points = [(step, factor * value) for step, value in record.validation_series(name)]
        title = f"Validation {name.replace('_', ' ')}"
        label, maximum = (f"{name} (%)", 100.0) if factor == 100 else (name, None)
        drawn.append(_chart([Curve(name, points)], title, label, maximum=maximum, marked=kept))
    # metrics of methods and losses, which the loop does not know by name
    named = {key: words for key, *words in (AUXILIARY, *charts_of(record.config), *CHARTS)}
    own = dict.fromkeys(key for line in record.metrics for key in line)
    # first those that are declared, in that order
    for key in dict.fromkeys((*named, *own)):
        if key not in OWN_CHARTS | NOT_DRAWN:
            words = key.replace("_", " ")
            title, label = named.get(key, (words.capitalize(), words))
            drawn.append(_chart([Curve(key, record.series(key))] if title else [], title, label))
    return [chart for chart in drawn if chart]


def _chart(
    curves: list[Curve],
    title: str,
    label: str,
    marked: tuple[str, float] | None = None,
    maximum: float | None = None,
) -> str:
    """A chart of those curves that have points; "" if none has."""
    full = [curve for curve in curves if curve.points]
    if not full:
        return ""
    x = "optimizer step"
    return line_chart(full, title, x=x, y=label, marked=marked, maximum=maximum)


def drawn(section: Section, folder: Path) -> tuple[Section, list[str], list[str]]:
    """Return a section with its charts as SVG and its pictures as data URLs."""
    pictures = [embed_png(folder / name) for name in section.pictures]
    return section, [chart(each) for each in section.charts], pictures


def time_chart(record: RunRecord) -> str:
    """Return a chart of the time by activity, as SVG; "" before the run is finished."""
    if not record.times:
        return ""
    return bar_chart(record.times, "Time by activity", x="time (seconds)", unit="s")
