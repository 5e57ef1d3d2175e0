"""The records of section `job`: times of whole jobs relative to Trainer's, with their goals."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.clocks import Spread
from bench.jobs.definitions import GOALS, GROUPED, PLAIN, SFT, Settings, Variant, jobs
from bench.jobs.figure import Curve, draw
from bench.jobs.runs import ROOT, Runner
from bench.records import Record
from petl.training.runs.environment import git_revision

PARTS = ("training", "job")
BASES = (PLAIN, GROUPED)
Results = dict[int, dict[str, Any]]  # of a variant, by seed


def measure(settings: Settings, progress: Callable[[str], Any]) -> list[Record]:
    """Do the runs that are not finished, by turns; return a record for each variant of a job.

    Raises:
        InputError: an unknown job or variant, or a package is missing.
        RunStopped: a run failed; the same command goes on after the finished ones.
    """
    records = []
    for job in jobs(settings.names):
        runner = Runner(job, settings, torch.get_num_threads(), progress)
        runner.prepare()
        if not settings.report:
            run(runner)
        if job.name == "decoder" and SFT not in [variant.name for variant in job.variants]:
            progress(f"job: {SFT} is left out: trl is not installed (pip install trl)")
        say_revisions(runner)
        curves = curves_of(runner)
        records += records_of(runner, curves)
        if curves:
            draw(job.title, runner.about["metric"], curves, runner.folder / "curves.svg")
    return records


def run(runner: Runner) -> None:
    """Choose rates, do the timed runs by turns, then those of the curves."""
    variants, settings = runner.variants, runner.settings
    if settings.tunes:
        for arm in dict.fromkeys(variant.arm for variant in variants):
            runner.tune(arm)
    for seed in settings.seeds:
        for variant in variants:
            runner.run(variant, runner.rates_of(variant), seed)
    if settings.tunes:
        for variant in variants:
            runner.run(variant, runner.rates_of(variant), None)


def records_of(runner: Runner, curves: Mapping[str, Curve]) -> list[Record]:
    """Return the record of each variant that has a finished run."""
    reached = seconds_to_score(curves, runner.about["metric"])
    found = {variant: results_of(runner, variant) for variant in runner.variants}
    by_name = {variant.name: results for variant, results in found.items()}
    rows = runner.about["rows"]
    shape = f"{runner.job.title}, {rows['train']:,} rows, {rows['test']:,} of test"
    return [
        Record(
            "job",
            shape,
            variant.name,
            is_own=variant.is_petl,
            ratios=ratios(results, by_name),
            facts={
                **goals(runner, variant, ratios(results, by_name)),
                **facts(runner, list(results.values())),
                **reached.get(variant.name, {}),
                **chosen_rates(runner, variant),
            },
            note="" if variant.arm in runner.tuned else "rates not tuned",
        )
        for variant, results in found.items()
        if results
    ]


def goals(runner: Runner, variant: Variant, measured: Mapping[str, Spread]) -> dict[str, float]:
    """Return the goals of the ratios that are measured; few rows have none."""
    own = {} if runner.settings.quick else GOALS.get((runner.job.name, variant.name), {})
    return {f"goal {name}": goal for name, goal in own.items() if name in measured}


def say_revisions(runner: Runner) -> None:
    """Say which finished runs were not done by this version: they are not done again."""
    now = git_revision(ROOT)
    found = {r.get("git") for v in runner.variants for r in results_of(runner, v).values()}
    others = sorted(str(revision) for revision in found - {now})
    if others:
        runner.progress(
            f"job: {runner.job.name} has runs of {', '.join(others)}, and this is {now}: another "
            "--job-folder measures anew"
        )


def results_of(runner: Runner, variant: Variant) -> Results:
    """Return the finished timed runs of a variant by seed."""
    rates = runner.rates_of(variant)
    known = {seed: runner.result(variant, rates, seed) for seed in runner.settings.seeds}
    return {seed: result for seed, result in known.items() if result is not None}


def ratios(results: Results, by_name: Mapping[str, Results]) -> dict[str, Spread]:
    """Return the ratios of times to those of each variant of Trainer, of the same seeds."""
    found = {}
    for base in BASES:
        others = by_name.get(base, {})
        common = [seed for seed in results if seed in others]
        if common and others is not results:
            for part in PARTS:
                values = [results[seed][part] / others[seed][part] for seed in common]
                found[f"{part} / {base}"] = Spread.of(values)
    return found


def facts(runner: Runner, results: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians of times, the largest memory and the scores of a variant."""
    metric = runner.about["metric"]
    scores = [result["scores"][metric] for result in results]
    factor = 100 if metric == "accuracy" else 1
    name = f"{metric} %" if metric == "accuracy" else metric
    return {
        **{f"{part} s": statistics.median(r[part] for r in results) for part in PARTS},
        "peak RSS MB": max(result["peak"] for result in results) / 1e6,
        name: factor * statistics.mean(scores),
        **({f"{name}, s.d.": factor * statistics.stdev(scores)} if len(scores) > 1 else {}),
        "seeds": len(results),
    }


def chosen_rates(runner: Runner, variant: Variant) -> dict[str, float]:
    """Return the learning rates of a variant, if they were chosen."""
    if variant.arm not in runner.tuned:
        return {}
    lr, head_lr = runner.rates_of(variant)
    return {"rate": lr, **({"head rate": head_lr} if runner.job.has_head else {})}


def seconds_to_score(curves: Mapping[str, Curve], metric: str) -> dict[str, dict[str, float]]:
    """Return by variant the processor seconds to a validation score, if it is reached.

    The score is the best one that each variant with adapters in all blocks reaches.
    """
    sign = -1 if metric == "loss" else 1
    best = [max(sign * score for _, score in c) for name, c in curves.items() if "fast" not in name]
    if not best:
        return {}
    least = min(best)
    reached = f"{100 * least:.1f} %" if metric == "accuracy" else f"{metric} {sign * least:.2f}"
    title = f"s to {reached}"
    found = {}
    for name, curve in curves.items():
        first = next((seconds for seconds, score in curve if sign * score >= least), None)
        found[name] = {} if first is None else {title: first}
    return found


def curves_of(runner: Runner) -> dict[str, Curve]:
    """Return processor seconds and validation scores of each variant at its rates."""
    found = {}
    for variant in runner.variants:
        result = runner.result(variant, runner.rates_of(variant), None)
        if result is not None:
            metric = runner.about["metric"]
            found[variant.name] = [(p["seconds"], p["scores"][metric]) for p in result["points"]]
    return found
