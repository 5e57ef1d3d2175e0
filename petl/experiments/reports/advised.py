"""What `petl advise` prints, and its page."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from petl.core.types import Record
from petl.data.tasks.scores import is_percentage, shown
from petl.experiments.reports.formatting import (
    Table,
    count_text,
    duration,
    echo,
    interval_text,
    print_table,
    score,
)
from petl.experiments.reports.page import Curve, address, line_chart, render_page
from petl.system.files.disk import write_atomic
from petl.training.runs.records import REPORT

PAGE = "advice.html"
MOST_CURVES = 6


def named(setting: Mapping[str, object]) -> str:
    """Return a setting as text: "lora, r 8, lr 0.001"."""
    return f"{setting['method']}, r {setting['rank']}, lr {setting['rate']:g}"


def gained(metric: str, gain: Mapping[str, float]) -> str:
    """Return a difference with its interval: "+0.8 points (-1.2 to +2.8)"; "nats" of a loss."""
    # points of percentages and nats are never mixed: a gain has the unit of its metric
    factor, digits, unit = (100, 1, " points") if is_percentage(metric) else (1, 3, "")
    if metric == "loss":
        unit = " nats"
    center, low, high = (f"{factor * gain[k]:+.{digits}f}" for k in ("center", "low", "high"))
    return f"{center}{unit} ({low} to {high})"


def headline(advice: Record) -> str:
    """Return the advice in a line."""
    alpha = "" if advice["alpha"] is None else f", alpha {advice['alpha']:g}"
    unit = "epoch" if "epochs" in advice else "step"
    length = count_text(advice[f"{unit}s"], unit)
    return (
        f"take {advice['method']}, rank {advice['rank']}{alpha}, learning rate "
        f"{advice['rate']:g}, {advice['blocks']} blocks, {length}"
    )


def facts_of(advice: Record) -> dict[str, str]:
    """Return what is said of the advice, by name."""
    if advice["predicted"] is None:
        rows, fewest = advice["rows"]["train"], advice["fewest_rows"]
        found = {
            "no interval": f"{rows} training rows are too few to hold some out for validation "
            f"({fewest} at least): this is the default, and nothing was tried"
        }
        if advice["unchecked"]:
            found["not checked"] = ", ".join(advice["unchecked"])
        return found | doubts_of(advice)
    metric, predicted, spent = advice["metric"], advice["predicted"], advice["seconds"]
    between = interval_text(metric, (predicted["low"], predicted["high"]))
    found = {
        f"predicted test {shown(metric)}": f"{score(metric, predicted['score'])}, "
        f"{100 * predicted['level']:.0f} % interval {between}",
        **floor_of(advice),
        "other methods": verdict(advice),
    }
    following = advice["next_best"]
    if following:
        found["next best"] = f"{named(following)}: {gained(metric, following['gain'])}"
    found |= constraints_of(advice)
    if advice["lost"] is not None:
        found["lost on other texts"] = f"{advice['lost']:.3f}"
    if advice["failed"]:
        found["the run of full length"] = f"failed, see {', '.join(advice['failed'])}"
    if advice["run"] is not None:
        found["the adapter, trained"] = (
            f"{advice['adapter']} (`petl eval {advice['run']}` scores it on the test rows, which "
            "were not touched)"
        )
    found |= doubts_of(advice)
    found["spent"] = (
        f"{duration(spent['spent'])} of processor time, {runs_of(advice):.2f} of the plain run's "
        f"{duration(spent['plain_run'])} (--cost {advice['cost']:g})"
    )
    if runs_of(advice) > advice["cost"]:
        share = spent["fixed"] / spent["plain_run"]
        found["more than --cost"] = (
            f"start and loading are {100 * share:.0f} % of that plain run, and do not shrink with "
            "the rows"
        )
    return found


def floor_of(advice: Record) -> dict[str, str]:
    """Return what is reached without an adapter, on the rows for validation; empty: unknown."""
    names = {"largest_class": "the largest class", "linear_probe": "a linear probe"}
    known = {names[k]: value for k, value in advice["floor"].items() if value is not None}
    if not known:
        return {}
    metric, predicted = advice["metric"], advice["predicted"]
    text = ", ".join(f"{name} {score(metric, value)}" for name, value in known.items())
    best = max if advice["higher_is_better"] else min
    highest = best(known.values())
    if predicted["low"] <= highest <= predicted["high"]:
        text += ": within the interval, an adapter may add nothing"
    elif best(highest, predicted["score"]) == highest:
        text += ": better than what is predicted"
    return {"without an adapter": text}


def doubts_of(advice: Record) -> dict[str, str]:
    """Return how many training rows have the input of another one; empty if none are known."""
    rows = advice["rows"]
    if not rows.get("repeated"):
        return {}
    text = f"{rows['repeated']:,} of {rows['read']:,} training rows repeat another one"
    if rows.get("contradicted"):
        text += f"; {rows['contradicted']:,} have the input of another row and another class"
    return {"doubtful rows": text}


def runs_of(advice: Record) -> float:
    """Return what was spent, in plain runs."""
    return advice["seconds"]["spent"] / advice["seconds"]["plain_run"]


def constraints_of(advice: Record) -> dict[str, str]:
    """Return by the words of each constraint how it is met, what it excludes, and what it costs."""
    found = {}
    for words, cost in advice["constraints"].items():
        without, texts = cost["without"], [cost["note"]] if cost["note"] else []
        if cost["excludes"] or not texts:
            texts.append(f"excludes {count_text(cost['excludes'], 'choice')}")
        if without:
            texts.append(
                f"without it {named(without)}: {gained(advice['metric'], without['gain'])}"
            )
        elif cost["excludes"] and not cost["note"]:
            texts[-1] += ", none of them tried"
        found[words] = "; ".join(texts)
    return found


def verdict(advice: Record) -> str:
    """Return how the advised method compares with the simplest, in a sentence."""
    lead, leader = advice["lead"], advice["leader"]
    methods = {trial["method"] for trial in advice["trials"] if not trial["excluded"]}
    excluded = "" if "lora" in methods else "; LoRA is excluded by a constraint"
    if methods == {advice["method"]}:
        return f"none was tried: the cost or the constraints left no room{excluded}"
    if lead is None:
        others = ", ".join(sorted(methods - {advice["method"]}))
        return f"none of those tried is better ({others}){excluded}"
    text = gained(advice["metric"], lead)
    if leader["method"] == advice["method"] != "lora":
        return f"{named(leader)} is better than the best LoRA: {text}"
    if leader["method"] == "lora":
        return f"{named(leader)} leads: {text}"
    return f"{named(leader)} leads by {text}: cannot be told apart, so take LoRA"


def lines_of(advice: Record) -> list[str]:
    """Return the lines that train what is advised."""
    return [line for line in (advice["command"], advice["with_config"]) if line is not None]


def print_advice(advice: Record, folder: Path) -> None:
    """Print the advice."""
    echo(headline(advice))
    for line in lines_of(advice):
        echo(f"  {line}")
    echo()
    print_table(("", ""), facts_of(advice).items())
    echo()
    echo(f"page: {folder / PAGE}")


def trials_of(advice: Record, folder: Path) -> Table:
    """Return the table of all trials, the longest and best first."""
    sign = 1 if advice["higher_is_better"] else -1
    found = sorted(advice["trials"], key=lambda t: (-t["steps"], -sign * t["validation"]))
    metric = advice["metric"]
    rows = [
        [named(trial), str(trial["steps"]), str(trial["seed"]), score(metric, trial["validation"])]
        for trial in found
    ]
    columns = ["setting", "steps", "seed", f"validation {shown(metric)}"]
    pages = {(i, 0): Path(trial["run"]) / REPORT for i, trial in enumerate(found)}
    links = {at: page for at, page in pages.items() if page.exists()}  # trials have none
    return Table(columns, rows, links)


def charts_of(advice: Record) -> Iterator[str]:
    """Yield a chart of score by steps, of settings tried at several lengths, and one by rank."""
    y = f"validation {shown(advice['metric'])}"
    by_steps: dict[str, dict[int, list[float]]] = {}
    by_rank: dict[int, float] = {}
    # ranks are compared at the length at which most were tried
    shortest = min(trial["steps"] for trial in advice["trials"])
    for trial in advice["trials"]:
        by_steps.setdefault(named(trial), {}).setdefault(trial["steps"], []).append(
            trial["validation"]
        )
        if trial["steps"] == shortest and trial["method"] == "lora":
            best = max if advice["higher_is_better"] else min
            known = by_rank.get(trial["rank"], trial["validation"])
            by_rank[trial["rank"]] = best(known, trial["validation"])
    curves = [
        Curve(name, [(steps, sum(s) / len(s)) for steps, s in sorted(found.items())])
        for name, found in by_steps.items()
        if len(found) > 1
    ]
    if curves:
        yield line_chart(curves[:MOST_CURVES], "Score by length of training", x="steps", y=y)
    if len(by_rank) > 1:
        title = f"LoRA by rank, {count_text(shortest, 'step')}"
        yield line_chart([Curve("lora", sorted(by_rank.items()))], title, x="rank", y=y)


def write_page(advice: Record, folder: Path) -> Path:
    """Write advice.html; return it."""
    has_trials = advice["predicted"] is not None
    table = trials_of(advice, folder) if has_trials else None
    page = render_page(
        "Advice",
        PAGE,
        about=headline(advice),
        lines=lines_of(advice),
        facts=facts_of(advice),
        table=table,
        runs={at: address(file, folder) for at, file in table.links.items()} if table else {},
        charts=list(charts_of(advice)) if has_trials else [],
    )
    write_atomic(folder / PAGE, page)
    return folder / PAGE
