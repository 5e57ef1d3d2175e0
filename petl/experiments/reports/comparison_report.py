"""The report of a comparison: an HTML page, its tables in markdown, charts of score and cost."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from petl.data.tasks.scores import PROPORTIONS, is_percentage
from petl.errors import markdown as escaped
from petl.experiments.reports.answers import Differences
from petl.experiments.reports.comparison import Comparison, Entry
from petl.experiments.reports.formatting import (
    Table,
    count_text,
    interval,
    interval_text,
    mean_text,
    sample_size,
    score,
    seeds_text,
    size,
)
from petl.experiments.reports.page import Point, address, cost_chart, cost_legend, render_page
from petl.system.files.disk import write_atomic
from petl.training.runs.records import REPORT

HTML, MARKDOWN = "index.html", "results.md"
DEVIATIONS = 4  # of a seed's score from the others, beyond which it is named
LOST = {  # entries of `retained` in scores.json, as columns and axes
    "lost": "lost on other texts (nats per token)",
    "drift": "drift of features on other texts",
}
MIN_SEEDS = 3  # below this, the sentences do not rank the entries (assumption)
Seed = TypeVar("Seed", int, str)
logger = logging.getLogger(__name__)


def write_page(
    comparisons: Sequence[Comparison],
    folder: Path,
    learning_rates: Mapping[str, object] | None = None,
    answers: Differences | None = None,
    failures: Sequence[str] = (),
) -> list[Path]:
    """Write index.html, results.md and the charts as SVG files; return the files.

    Each comparison is a section.

    Args:
        learning_rates: the content of a study's rates.json, see `petl.experiments.sweeps.study`.
        answers: where the predictions of two runs differ, for a last section of the page.
        failures: sentences on what a study has no finished runs of.
    """
    # not a draft: a comparison is often written again into the same folder
    folder.mkdir(parents=True, exist_ok=True)
    tables = [tables_of(each, learning_rates) for each in comparisons]
    said = [
        [*failures, *summary(each), *about_rates(each.metric, learning_rates)]
        for each in comparisons
    ]
    texts = [markdown(*section) for section in zip(comparisons, tables, said, strict=True)]
    if len(comparisons) > 1:
        titles = (title_of(each) for each in comparisons)
        texts = [
            f"## {escaped(title)}\n\n{text}" for title, text in zip(titles, texts, strict=True)
        ]
    charts = [charts_of(each) for each in comparisons]
    write_atomic(folder / MARKDOWN, "\n".join(texts))
    write_atomic(folder / HTML, html(comparisons, tables, said, charts, folder, answers))
    written = [folder / HTML, folder / MARKDOWN]
    for i, drawn in enumerate(charts, start=1):
        # files are numbered only if their names would collide
        number = f"-{i}" if len(comparisons) > 1 else ""
        for name, chart in drawn.items():
            written.append(folder / f"{name}{number}.svg")
            write_atomic(written[-1], chart)
    logger.info("written: %s", ", ".join(map(str, written)))
    return written


def title_of(comparison: Comparison) -> str:
    """Return the heading of a section: data set, what tells its examples from others', models."""
    models = dict.fromkeys(run.model for run in comparison.runs)
    examples = f" ({comparison.examples})" if comparison.examples else ""
    return f"{comparison.topic}{examples} on {', '.join(models)}"


def tables_of(
    comparison: Comparison, learning_rates: Mapping[str, object] | None
) -> dict[str, Table]:
    """Return the tables of a section by heading."""
    tables = {"Results": results(comparison), "Each seed": each_seed(comparison)}
    if learning_rates:
        tables["Learning rates"] = learning_rates_tried(comparison.metric, learning_rates)
    return tables


# The tables


def results(comparison: Comparison) -> Table:
    """Return a table with one row for each entry, the best first."""
    baseline = comparison.baseline
    counted = sample_size(comparison.runs[0].evaluation)
    columns = ["method", f"{comparison.split} {comparison.metric}" + (counted and f", {counted}")]
    has_interval = limits_of(comparison, comparison.entries[0]) is not None
    columns += ["95 % interval"] if has_interval else []
    # a column only where something was measured
    measured = [name for name in LOST if any(entry.lost(name) for entry in comparison.entries)]
    columns += [LOST[name] for name in measured]
    columns += ["seeds", "learning rate", "parameters", "adapter file", "s/step"]
    # columns here and cells below must stay in the same order
    columns += [] if comparison.on_device else ["CPU s/step"]
    columns += ["peak memory"]
    columns += [f"vs {baseline.name}", "by seed"] if baseline else []
    rows = []
    for entry in comparison.entries:
        row = [entry.name, mean_text(comparison.metric, entry.scores)]
        limits = limits_of(comparison, entry)
        row += [interval_text(comparison.metric, limits)] if limits else []
        row += [lost_text(entry.lost(name)) for name in measured]
        # seeds differ in the rate with train.find_lr
        lowest, highest = entry.lrs[0], entry.lrs[-1]
        rates = f"{lowest:.3g}" + (f" to {highest:.3g}" if highest > lowest else "")
        row += [str(len(entry.runs)), rates]
        row += [f"{entry.parameters:,}", size(entry.file_bytes), of_step(entry.step_seconds)]
        row += [] if comparison.on_device else [of_step(entry.step_cpu_seconds)]
        row += [size(entry.peak_bytes)]
        if baseline:
            gains = [] if entry is baseline else comparison.gains(entry)
            # empty: the baseline itself, or no seed in common
            difference = mean_gain(comparison, gains) if gains else ""
            row += [difference, comparison.verdict(entry)]
        rows.append(row)
    for name, label in (
        ("linear_probe", "linear probe (head only, frozen backbone)"),
        ("before", "before training"),
    ):
        references = comparison.reference(name)
        for model, scores in references.items():
            of_model = f"{label}, {model}" if len(references) > 1 else label
            # before training, only the random initialization of a head differs between seeds
            values = scores if name != "before" else [statistics.fmean(scores)]
            cells = [of_model, mean_text(comparison.metric, values), *[""] * (len(columns) - 2)]
            # references have no cost of their own
            cells[columns.index("seeds")] = str(len(scores))
            rows.append(cells)
    # an entry of several seeds has no single report to link to
    single = [(i, e.runs[0]) for i, e in enumerate(comparison.entries) if len(e.runs) == 1]
    return Table(columns, rows, {(i, 0): run.path / REPORT for i, run in single})


def lost_text(values: Sequence[float]) -> str:
    """Format what was lost, the mean over seeds; "" if it is not known."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3f}{spread}"


def of_step(seconds: float | None) -> str:
    """Format the seconds of a step; "" without steps."""
    return "" if seconds is None else f"{seconds:.3f}"


def limits_of(comparison: Comparison, entry: Entry) -> tuple[float, float] | None:
    """Return Wilson's interval of the mean score of an entry; None without one."""
    # every run was scored on the same number of examples
    return interval(comparison.metric, entry.mean, entry.runs[0].evaluation)


def each_seed(comparison: Comparison) -> Table:
    """Return a table with the score of every run, one column for each seed."""
    seeds = sorted({run.seed for run in comparison.runs})
    rows, reports = [], {}
    for i, entry in enumerate(comparison.entries):
        by_seed = {run.seed: run for run in entry.runs}
        cells = [score(comparison.metric, by_seed[s].score) if s in by_seed else "" for s in seeds]
        rows.append([entry.name, *cells])
        # column 0 is the name
        found = ((j, by_seed[seed]) for j, seed in enumerate(seeds, start=1) if seed in by_seed)
        reports |= {(i, j): run.path / REPORT for j, run in found}
    return Table(["method", *(f"seed {seed}" for seed in seeds)], rows, reports)


def learning_rates_tried(metric: str, tried: Mapping[str, Any]) -> Table:
    """Return a table of the validation score at each learning rate; a star marks the taken one.

    The score is a mean over as many seeds as are given behind it.

    Args:
        tried: the content of a study's rates.json.
    """
    # JSON keys are strings, sorted here as numbers
    known = {r for e in tried.values() for r in (*e["validation"], *e.get("failed", ()))}
    rates = sorted(known, key=float)
    rows = []
    for name, entry in tried.items():
        cells = [_tried(metric, rate, entry) for rate in rates]
        # a study writes the rates that it has tried in six digits
        edge = f" ({entry['edge']} tried)" if entry.get("edge") else ""
        stars = [f" *{edge}" if rate == f"{entry['taken']:g}" else "" for rate in rates]
        rows.append([name, *(cell + star for cell, star in zip(cells, stars, strict=True))])
    return Table([f"validation {metric} by learning rate (* taken)", *rates], rows)


def _tried(metric: str, rate: str, entry: Mapping[str, Any]) -> str:
    """Format the score at a rate; "" if the method was not trained with it."""
    if rate not in entry["validation"]:
        return "failed" if rate in entry.get("failed", ()) else ""
    count = entry.get("seeds", {}).get(rate)  # studies of earlier versions have none
    seeds = f", {count_text(count, 'seed')}" if count else ""
    return score(metric, entry["validation"][rate]) + seeds


def mean_gain(comparison: Comparison, gains: Sequence[float]) -> str:
    """Format the mean of differences, and the smallest and largest: "+9.0 (+8.0 to +10.0)"."""
    # percentage points: the unit stands in the column of scores
    factor = 100 if is_percentage(comparison.metric) else 1
    digits = 1 if factor == 100 else 3
    mean, low, high = (
        f"{factor * g:+.{digits}f}" for g in (statistics.fmean(gains), min(gains), max(gains))
    )
    return f"{mean} ({low} to {high})" if len(gains) > 1 else mean


# The sentences


def summary(comparison: Comparison) -> list[str]:
    """Return sentences on which entries differ from the baseline, and on what limits that."""
    sentences = [*ranking(comparison), *about_sign(comparison), *about_seeds(comparison)]
    confounders = comparison.confounders()
    if confounders:
        sentences.append(f"These runs also differ in other settings: {'; '.join(confounders)}.")
    found = [run.scores["retained"] for run in comparison.runs if run.scores.get("retained")]
    # how many rows a run measures follows its cost
    measured = dict.fromkeys((each["rows"], each.get("tokens")) for each in found)
    if len(measured) > 1:
        texts = (
            f"{rows}" + ((tokens and f" of {tokens:,} tokens") or "") for rows, tokens in measured
        )
        sentences.append(
            f"What was lost was not measured on the same texts in all runs ({'; '.join(texts)}): "
            "retain.rows=N gives each run the same ones."
        )
    devices = dict.fromkeys(run.device for run in comparison.runs)
    if len(devices) > 1:
        sentences.append(f"Times and memory are those of different devices: {'; '.join(devices)}.")
    if comparison.examples:
        sentences.append(
            f"Scored on these examples only: {comparison.examples}. Scores on other examples are "
            "in sections of their own, since they cannot be compared with these."
        )
    if comparison.unscored:
        sentences.append(f"Runs left out because they have no test scores: {comparison.unscored}.")
    if limits_of(comparison, comparison.entries[0]) is not None:
        kind = "is Wilson's, " if comparison.metric in PROPORTIONS else "is "
        sentences.append(
            f"The 95 % interval {kind}for the choice of the {comparison.split} examples, however "
            "many seeds there are; it does not contain the spread over seeds."
        )
    return sentences


def ranking(comparison: Comparison) -> list[str]:
    """Return sentences on which entries are better than the baseline in the seeds of both."""
    baseline = comparison.baseline
    if baseline is None:
        return []
    others = [(e.name, comparison.gains(e)) for e in comparison.entries if e is not baseline]
    if not others:
        return []
    # the weakest comparison decides, since all stand in one list
    if min(len(gains) for _, gains in others) < MIN_SEEDS:
        return [
            f"Fewer than {MIN_SEEDS} seeds that a method shares with {baseline.name}: too few to "
            "rank these methods."
        ]
    groups: dict[str, list[str]] = {}
    for name, gains in others:
        if not any(gains):
            text = f"equal to {baseline.name} in every seed"
        elif min(gains) > 0 or max(gains) < 0:
            text = f"{'better' if gains[0] > 0 else 'worse'} than {baseline.name} in every seed"
        else:
            text = f"no clear difference to {baseline.name} (the seeds disagree)"
        # methods with the same outcome share a sentence
        groups.setdefault(text, []).append(name)
    said = [f"{', '.join(names)}: {text}." for text, names in groups.items()]
    fewest = min((len(gains) for _, gains in others if min(gains) > 0 or max(gains) < 0), default=0)
    if fewest:
        said.append(
            f"Of two methods that are equally good, one is the better in all of {fewest} seeds by "
            f"chance in 1 of {2 ** (fewest - 1)} comparisons."
        )
    return said


def about_sign(comparison: Comparison) -> list[str]:
    """Return a sentence on differences that are positive where the score is lower."""
    baseline = comparison.baseline
    if baseline is None or comparison.higher_is_better or len(comparison.entries) < 2:
        return []
    return [
        f"{comparison.metric} is better when it is lower: + in the differences to {baseline.name} "
        "means better, that is lower."
    ]


def about_seeds(comparison: Comparison) -> list[str]:
    """Return sentences on what ± means, where it is unknown, and on seeds that differ."""
    entries, sentences = comparison.entries, []
    single = [entry.name for entry in entries if len(entry.runs) == 1]
    # otherwise no cell has a ±
    if len(single) < len(entries):
        sentences.append("± is the standard deviation over the seeds of a method.")
    if single:
        sentences.append(f"1 seed: no spread is known of {', '.join(single)}.")
    sentences += [
        f"Seed {seed} of {entry.name} is more than {DEVIATIONS} standard deviations from its other "
        "seeds: look at that run before you trust the mean."
        for entry in entries
        for seed in outlying({run.seed: run.score for run in entry.runs})
    ]
    by_seeds: dict[str, list[str]] = {}
    for entry in entries:
        by_seeds.setdefault(seeds_text(entry.seeds), []).append(entry.name)
    if len(by_seeds) > 1:
        which = "; ".join(f"{', '.join(names)}: {seeds}" for seeds, names in by_seeds.items())
        differences = "; differences are over the seeds that both have" * bool(comparison.baseline)
        sentences.append(
            f"The seeds differ ({which}), so the means are over different seeds{differences}."
        )
    return sentences


def about_rates(metric: str, tried: Mapping[str, object] | None) -> list[str]:
    """Return a sentence on how a study has chosen among learning rates."""
    if not tried:
        return []
    equal = f"; rates with the same {metric} are compared by their validation loss"
    return [
        f"Learning rates are compared by their validation {metric}{equal * (metric != 'loss')}. "
        "Of those that are not told apart from the best, the lowest is taken."
    ]


def outlying(scores: Mapping[Seed, float]) -> list[Seed]:
    """Return the seeds whose score is far from those of the others, of at least four seeds."""
    found = []
    for seed, value in scores.items():
        others = [other for number, other in scores.items() if number != seed]
        if len(others) >= MIN_SEEDS:
            spread = statistics.stdev(others)
            if spread and abs(value - statistics.fmean(others)) > DEVIATIONS * spread:
                found.append(seed)
    return found


def circumstances(comparison: Comparison) -> dict[str, str]:
    """Return model, data, machine and versions of the runs, by label."""
    runs, first = comparison.runs, comparison.runs[0]
    environments = [run.environment for run in runs]
    started = sorted(environment["started"] for environment in environments)
    versions = {e["packages"].get("petl"): None for e in environments}
    revisions = {e["git"]: None for e in environments}
    # dicts and `dict.fromkeys` remove repetitions and keep the order
    machine = " · ".join(dict.fromkeys(run.device for run in runs))
    count = count_text(first.environment["cores"], "core")
    cores = f", {count}" if not comparison.on_device else ""
    threads = sorted({e["threads"] for e in environments})
    unit = "thread" if threads == [1] else "threads"
    counted = sample_size(first.evaluation)  # the same for all runs
    packages = ("torch", "transformers", "peft")
    return {
        "model": first.model,
        "data": f"{comparison.topic}, {comparison.split} examples" + (counted and f": {counted}"),
        "machine": f"{machine}{cores}, {', '.join(map(str, threads))} {unit} per run",
        "started": started[0] if len(started) == 1 else f"{started[0]} to {started[-1]}",
        "petl": ", ".join(f"{v}" for v in versions) + " at " + ", ".join(map(str, revisions)),
        "packages": ", ".join(f"{p} {first.environment['packages'][p]}" for p in packages),
        "example command": first.environment["command"],
    }


# The files


def markdown(comparison: Comparison, tables: Mapping[str, Table], said: Sequence[str]) -> str:
    """Return the tables, the sentences and the circumstances in markdown."""
    # the sentences follow the table of results, as on the page
    first, *others = (table.markdown() for table in tables.values())
    sentences = "\n".join(f"- {escaped(sentence)}" for sentence in said)
    rest = "\n".join(
        f"- {name}: {escaped(text)}" for name, text in circumstances(comparison).items()
    )
    return "\n\n".join([first, sentences, *others, rest]) + "\n"


def charts_of(comparison: Comparison) -> dict[str, str]:
    """Return charts of the score against each cost, and their legend, as SVG by file name."""
    factor = 100 if is_percentage(comparison.metric) else 1
    label = f"{comparison.split} {comparison.metric}" + (" (%)" if factor == 100 else "")
    charts = {}
    for name, (title, x, costs) in costs_of(comparison).items():
        points = [
            # no error bar for a single seed
            None
            if cost is None
            else Point(entry.name, cost, factor * entry.mean, factor * (entry.spread or 0.0))
            for entry, cost in zip(comparison.entries, costs, strict=True)
        ]
        if not any(points):
            continue
        charts[name] = cost_chart(
            points,
            title,
            x=x,
            y=label,
            higher_is_better=comparison.higher_is_better,
            maximum=100.0 if factor == 100 else None,
        )
    charts["legend"] = cost_legend([entry.name for entry in comparison.entries])
    return charts


def costs_of(comparison: Comparison) -> dict[str, tuple[str, str, Sequence[float | None]]]:
    """Return title, axis label and the entries' values of each cost, by file name."""
    entries = comparison.entries
    if comparison.on_device:
        step = "seconds per step", [entry.step_seconds for entry in entries]
    else:  # processor time: other processes on the machine change it little
        step = "CPU seconds per step", [entry.step_cpu_seconds for entry in entries]
    return {
        "parameters": (
            "Score and adapter size",
            "adapter parameters (thousands)",
            [entry.parameters / 1e3 for entry in entries],
        ),
        "file": (
            "Score and file size",
            "adapter file (MB)",
            [entry.file_bytes / 1e6 for entry in entries],
        ),
        "step": ("Score and step time", *step),
        **{
            name: (
                "Learned and lost",
                x,
                [statistics.fmean(lost) if (lost := e.lost(name)) else None for e in entries],
            )
            for name, x in LOST.items()
        },
        "memory": (
            "Score and peak memory",
            "peak memory (MB)",
            [entry.peak_bytes / 1e6 for entry in entries],
        ),
    }


def html(
    comparisons: Sequence[Comparison],
    tables: Sequence[Mapping[str, Table]],
    said: Sequence[Sequence[str]],
    charts: Sequence[Mapping[str, str]],
    folder: Path,
    answers: Differences | None = None,
) -> str:
    """Return the page for a folder; it loads no other file, and links to the runs' reports."""
    titles = [title_of(each) for each in comparisons]
    sections = [
        {
            "title": title if len(titles) > 1 else "",
            # a single section needs no heading below the page's title
            "tables": [(name, table, _links(table, folder)) for name, table in own.items()],
            "summary": sentences,
            "charts": drawn.values(),
            "circumstances": circumstances(each),
        }
        for title, each, own, sentences, drawn in zip(
            titles, comparisons, tables, said, charts, strict=True
        )
    ]
    runs = [run for each in comparisons for run in each.runs]
    # the date of an ISO 8601 time
    dates = sorted(run.environment["started"][:10] for run in runs)
    between = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = count_text(len(runs), "run")
    return render_page(
        titles[0] if len(titles) == 1 else "Comparison of runs",
        "comparison.html",
        about=f"comparison {folder.absolute().name}: {count}, started {between}",
        links={"tables as markdown": address(folder / MARKDOWN, folder)},
        sections=sections,
        answers=answers,
    )


def _links(table: Table, folder: Path) -> dict[tuple[int, int], str]:
    """Return the addresses of a table's reports, of those that exist."""
    found = {at: file for at, file in table.links.items() if file.is_file()}
    return {at: address(file, folder, back=HTML) for at, file in found.items()}
