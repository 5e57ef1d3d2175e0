"""A comparison as one HTML page, one markdown table, and pictures of what each score costs."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petl.files.disk import replace
from petl.reports.charts import Point, draw_costs
from petl.reports.comparison import Comparison, Entry
from petl.reports.formatting import size
from petl.reports.html import embedded, page
from petl.reports.summary import is_share, shown

HTML, MARKDOWN, PICTURE = "index.html", "results.md", "costs.png"
FEW = 3  # seeds, below which nothing is said of an order
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """Cells in words; the first column is a name, the others are numbers."""

    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))


def write_page(
    comparisons: Sequence[Comparison], folder: Path, rates: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write index.html, results.md and, with matplotlib, pictures; the files written.

    Each comparison is a section. `rates` is what a study notes of the learning rates that it tried,
    see `petl.sweeps.study`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    several = len(comparisons) > 1
    names = [f"costs-{i}.png" if several else PICTURE for i in range(1, len(comparisons) + 1)]
    pictures = [draw(each, folder / name) for each, name in zip(comparisons, names, strict=True)]
    tables = [tables_of(each, rates) for each in comparisons]
    texts = [markdown(*section) for section in zip(comparisons, tables, strict=True)]
    if several:
        titles = (title_of(each) for each in comparisons)
        texts = [f"## {title}\n\n{text}" for title, text in zip(titles, texts, strict=True)]
    replace(folder / MARKDOWN, "\n".join(texts))
    replace(folder / HTML, html(comparisons, tables, pictures))
    written = [folder / HTML, folder / MARKDOWN, *(p for found in pictures for p in found)]
    logger.info("written: %s", ", ".join(map(str, written)))
    return written


def title_of(comparison: Comparison) -> str:
    models = dict.fromkeys(run.settings["model.name"] for run in comparison.runs)
    return f"{comparison.topic} on {', '.join(models)}"


def draw(comparison: Comparison, file: Path) -> list[Path]:
    """Draw what each score costs; the file, or none without matplotlib."""
    unit = ", %" if is_share(comparison.metric) else ""
    return draw_costs(
        {what: points(comparison, what) for what in costs(comparison)},
        file,
        score=f"{comparison.rows} {comparison.metric}{unit}",
        higher_is_better=comparison.higher_is_better,
    )


def tables_of(comparison: Comparison, rates: Mapping[str, Any] | None) -> dict[str, "Table"]:
    """The tables of a section by their headings."""
    tables = {"Results": results(comparison), "Each seed": each_seed(comparison)}
    if rates:
        tables["Learning rates"] = rates_tried(comparison.metric, rates)
    return tables


# The tables


def results(comparison: Comparison) -> Table:
    """One row for each entry, the best first."""
    baseline = comparison.baseline
    columns = ["method", f"{comparison.rows} {comparison.metric}", "rate", "parameters", "file"]
    columns += ["s a step"] if comparison.on_device else ["s a step", "CPU s a step"]
    columns += ["peak memory"]
    columns += [f"against {baseline.name}", "seeds"] if baseline else []
    rows = []
    for entry in comparison.entries:
        row = [entry.name, score_of(comparison, entry), f"{entry.lr:.3g}", f"{entry.parameters:,}"]
        row += [size(entry.file_bytes), f"{entry.step_seconds:.3f}"]
        row += [] if comparison.on_device else [f"{entry.step_cpu_seconds:.3f}"]
        row += [size(entry.peak_bytes)]
        if baseline:
            gains = comparison.gains(entry)
            told = "" if entry is baseline or not gains else gain(comparison, gains)
            row += [told, comparison.verdict(entry)]
        rows.append(row)
    for name, label in (("linear_probe", "linear probe"), ("before", "before training")):
        found = comparison.reference(name)
        if found:
            spread = statistics.stdev(found) if len(found) > 1 and name != "before" else None
            cells = [label, with_spread(comparison.metric, statistics.fmean(found), spread)]
            rows.append(cells + [""] * (len(columns) - 2))
    return Table(columns, rows)


def each_seed(comparison: Comparison) -> Table:
    """The score of every run."""
    seeds = sorted({run.seed for run in comparison.runs})
    rows = []
    for entry in comparison.entries:
        by_seed = {run.seed: run.score for run in entry.runs}
        cells = [shown(comparison.metric, by_seed[s]) if s in by_seed else "" for s in seeds]
        rows.append([entry.name, *cells])
    return Table(["method", *(f"seed {seed}" for seed in seeds)], rows)


def rates_tried(metric: str, rates: Mapping[str, Any]) -> Table:
    """The score on held-out train rows of each learning rate, that of the best with a star."""
    tried = sorted({rate for one in rates.values() for rate in one["validation"]}, key=float)
    rows = []
    for name, one in rates.items():
        scores = one["validation"]
        cells = [shown(metric, scores[r]) if r in scores else "failed" for r in tried]
        stars = [" *" if float(rate) == one["taken"] else "" for rate in tried]
        rows.append([name, *(cell + star for cell, star in zip(cells, stars, strict=True))])
    return Table([f"validation {metric} at", *tried], rows)


def score_of(comparison: Comparison, entry: Entry) -> str:
    return with_spread(comparison.metric, entry.mean, entry.spread)


def with_spread(metric: str, mean: float, spread: float | None) -> str:
    if spread is None:
        return shown(metric, mean)
    return f"{shown(metric, mean).removesuffix(' %')} ± {shown(metric, spread)}"


def gain(comparison: Comparison, gains: Sequence[float]) -> str:
    """The mean of gains, and the least and the most."""
    factor = 100 if is_share(comparison.metric) else 1
    digits = 1 if factor == 100 else 3
    mean, low, high = (
        f"{factor * g:+.{digits}f}" for g in (statistics.fmean(gains), min(gains), max(gains))
    )
    return f"{mean} ({low} to {high})" if len(gains) > 1 else mean


# The sentences


def summary(comparison: Comparison) -> list[str]:
    """What the table says, in sentences; a tie is called one."""
    told = []
    baseline = comparison.baseline
    if baseline is not None and min(len(entry.runs) for entry in comparison.entries) < FEW:
        told.append(f"Fewer than {FEW} seeds: too few to tell these apart.")
    elif baseline is not None:
        others = [entry for entry in comparison.entries if entry is not baseline]
        better = [e for e in others if min(comparison.gains(e), default=0) > 0]
        worse = [e for e in others if max(comparison.gains(e), default=0) < 0]
        rest = [e for e in others if e not in better and e not in worse]
        for entries, words in (
            (better, f"better than {baseline.name} with every seed"),
            (rest, f"not told apart from {baseline.name}, the seeds do not agree"),
            (worse, f"below {baseline.name} with every seed"),
        ):
            if entries:
                told.append(f"{', '.join(entry.name for entry in entries)}: {words}.")
    uneven = comparison.uneven()
    if uneven:
        told.append(f"Not only methods differ between these runs: {'; '.join(uneven)}.")
    error = standard_error(comparison)
    if error is not None:
        told.append(
            f"One standard error of a score over these test rows is {100 * error:.1f} points, "
            "whatever the seeds: a difference below twice that may be chance in the choice of rows."
        )
    return told


def standard_error(comparison: Comparison) -> float | None:
    """Of the best accuracy, from the number of test rows alone; None for other scores."""
    if comparison.metric != "accuracy" or comparison.rows != "test":
        return None
    rows, share = comparison.runs[0].scores["after"]["rows"], comparison.entries[0].mean
    return math.sqrt(share * (1 - share) / rows)


def circumstances(comparison: Comparison) -> dict[str, str]:
    """How the runs were made, by what it is called."""
    runs, first = comparison.runs, comparison.runs[0]
    environments = [run.environment for run in runs]
    started = sorted(environment["started"] for environment in environments)
    versions = {e["packages"].get("petl"): None for e in environments}
    revisions = {e["git"]: None for e in environments}
    machine = " · ".join(dict.fromkeys(run.device for run in runs))
    cores = f", {first.environment['cores']} cores" if not comparison.on_device else ""
    threads = sorted({e["threads"] for e in environments})
    after = [run.scores["after"] or {} for run in runs]
    counts = sorted({scores["rows"] for scores in after if "rows" in scores})
    rows = f", {' or '.join(f'{count:.0f}' for count in counts)} test rows" if counts else ""
    packages = ("torch", "transformers", "peft")
    return {
        "model": first.settings["model.name"],
        "data": f"{first.settings['data.name']}{rows}",
        "machine": f"{machine}{cores}, {', '.join(map(str, threads))} threads a run",
        "from, to": f"{started[0]}, {started[-1]}",
        "petl": ", ".join(f"{v}" for v in versions) + " at " + ", ".join(map(str, revisions)),
        "packages": ", ".join(f"{p} {first.environment['packages'][p]}" for p in packages),
        "such as": first.environment["command"],
    }


# The files


def markdown(comparison: Comparison, tables: Mapping[str, Table]) -> str:
    """The tables, the sentences, and how the runs were made."""
    first, *others = (table.markdown() for table in tables.values())
    told = "\n".join(f"- {sentence}" for sentence in summary(comparison))
    made = "\n".join(f"- {name}: {text}" for name, text in circumstances(comparison).items())
    return "\n\n".join([first, told, *others, made]) + "\n"


def costs(comparison: Comparison) -> list[str]:
    """What a score is set against in the pictures."""
    clock = "seconds a step" if comparison.on_device else "CPU seconds a step"
    return ["adapter parameters, thousands", "adapter file, MB", clock, "peak memory, MB"]


def points(comparison: Comparison, what: str) -> list[Point]:
    """Each entry's score against one of `costs`."""
    of: dict[str, Any] = {
        "adapter parameters, thousands": lambda e: e.parameters / 1e3,
        "adapter file, MB": lambda e: e.file_bytes / 1e6,
        "seconds a step": lambda e: e.step_seconds,
        "CPU seconds a step": lambda e: e.step_cpu_seconds,
        "peak memory, MB": lambda e: e.peak_bytes / 1e6,
    }
    factor = 100 if is_share(comparison.metric) else 1
    return [
        Point(e.name, of[what](e), factor * e.mean, factor * (e.spread or 0.0))
        for e in comparison.entries
    ]


def html(
    comparisons: Sequence[Comparison],
    tables: Sequence[Mapping[str, Table]],
    pictures: Sequence[Sequence[Path]],
) -> str:
    """The page, pictures included, so that the file can be passed on alone."""
    titles = [title_of(each) for each in comparisons]
    sections = [
        {
            "title": title if len(titles) > 1 else "",
            "tables": own,
            "summary": summary(each),
            "images": [embedded(path) for path in drawn],
            "made": circumstances(each),
        }
        for title, each, own, drawn in zip(titles, comparisons, tables, pictures, strict=True)
    ]
    return page(titles[0] if len(titles) == 1 else "Runs side by side", BODY, sections=sections)


BODY = """\
{% for section in sections %}
{% if section.title %}<h1>{{ section.title }}</h1>{% endif %}
{% for name, table in section.tables.items() %}
<h2>{{ name }}</h2>
<div class="wide"><table>
<tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if loop.first %}
<ul>{% for sentence in section.summary %}<li>{{ sentence }}</li>{% endfor %}</ul>
{% for image in section.images %}
<h2>What a score costs</h2>
<img alt="score against what it costs" src="{{ image }}">
{% endfor %}
{% endif %}
{% endfor %}
<h2>How this was made</h2>
<dl>
{% for name, text in section.made.items() %}
<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
{% endfor %}
"""
