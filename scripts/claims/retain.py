"""What loses less: replay, self-distillation, CorDA, lower rates, fewer blocks, less strength.

    python scripts/claims.py retain            # five seeds of two jobs; resumes where it stopped
    python scripts/claims.py retain --quick    # one seed of one job with few rows

    python scripts/claims.py --publish FOLDER  # scripts/claims/retain.json, and the picture

FOLDER/retain/retain.json has the points of each finished seed: seeds that are there are not trained
again, be it with the file alone, as it is published.

Each contender is trained at several rates, or evaluated at several strengths, and gives a curve of
what was lost against the test loss. Contenders are compared at two test losses, those of LoRA at a
low rate and at one in the middle, by linear interpolation on the curve of each seed, which begins
at the base.
The bundled texts are divided in two by a hash: one half is measured, the other is for replay and
for the calibration of CorDA.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from claims.texts import write_lines, write_verbs
from petl.adapters.deltas.adapters import new_folder
from petl.adapters.deltas.measured import splits_of
from petl.adapters.export.saved_adapter import find
from petl.core.strengths import at_strength
from petl.experiments.reports.formatting import Table, echo
from petl.experiments.sweeps.study import Contender, Study
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.retain.compare import retained
from petl.training.retain.measure import interval_of
from petl.training.retain.page import TEXTS
from petl.training.retain.texts import BUNDLED, halves, read_texts
from petl.training.runs.records import read_results

NAME, RESULT, PICTURE, TURNED = "retain", "retain.json", "retain.svg", "strengths.json"
PUBLISHED = Path(__file__).with_name(RESULT)
RATES = (3e-4, 1e-3, 3e-3)
AT = (3e-4, 1e-3)  # rates of LoRA whose test losses are those at which all are compared
STRENGTHS = (0.25, 0.5, 0.75)
LORA, STRENGTH = "LoRA, by rate", "LoRA at 3e-3, by strength"
SEEDS = tuple(range(5))
FEWEST = 3  # seeds of each job that a page shows
CALIBRATION = "method.calibration_data"
Point = tuple[float, float]  # test loss, and what was lost, in nats per token
Curve = Mapping[str, Mapping[str, Point]]  # by seed, then by rate or strength
Found = Mapping[str, Mapping[str, Curve]]  # by job, then by contender

CONTENDERS = {  # by label: name of the folder, and words of `petl train`, at each of the rates
    LORA: ("lora", ("+method=lora",)),
    "replay, retain.mix=0.05": (
        "replay-0.05",
        ("+method=lora", "retain.mix=0.05", "retain.mix_data={data}/replayed.jsonl"),
    ),
    "replay, retain.mix=0.2": (
        "replay-0.2",
        ("+method=lora", "retain.mix=0.2", "retain.mix_data={data}/replayed.jsonl"),
    ),
    "self-distillation, +loss=distill": ("distill", ("+method=lora", "+loss=distill")),
    "CorDA, knowledge preserved": (
        "corda",
        (
            *("+method=corda", "method.corda_method=kpm"),
            *("+data@method.calibration_data.data=files", f"{CALIBRATION}.data.task=causal_lm"),
            f"{CALIBRATION}.data.train={{data}}/replayed.jsonl",
            f"{CALIBRATION}.data.test={{data}}/replayed.jsonl",
            *(f"{CALIBRATION}.num_samples=48", "method.factors_cache={data}/factors"),
        ),
    ),
    "upper third of the blocks": (
        "upper",
        ("+method=lora", "method.layers_to_transform=top:0.33"),
    ),
}


@dataclass(frozen=True)
class Placed(Contender):
    """A contender with a short name, which its folder has.

    Attributes:
        settings: of `petl train`.
    """

    settings: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """The settings."""
        return [*self.settings]


@dataclass(frozen=True)
class Job:
    """A task that contenders learn.

    Attributes:
        overrides: of `petl train`; {data} is the folder of the files.
        quick: further ones of a quick trial.
    """

    title: str
    overrides: tuple[str, ...]
    quick: tuple[str, ...] = ()


COMMON = (
    # eager attention: at these lengths a step in bf16 takes 0.85 of the time of sdpa's on a CPU
    *("model=smollm2", "model.attn=eager", "train.precision=auto", "train.linear_probe=false"),
    *("train.epochs=1", "retain.data={data}/measured.jsonl"),
    *("retain.rows=32", "retain.max_length=128"),
)
JOBS = {
    "verbs": Job(
        "definitions of WordNet verbs with their class as plain text: 600 rows",
        (
            *("data=files", "data.task=causal_lm", "data.train={data}/verbs-train.jsonl"),
            *("data.test={data}/verbs-test.jsonl", "data.max_length=48", "data.train_rows=600"),
            *("data.test_rows=200", "train.batch_size=32"),
        ),
        (
            *("data.train_rows=16", "data.test_rows=8", "data.max_length=32"),
            *("train.batch_size=8", "retain.rows=8", "retain.max_length=32"),
        ),
    ),
    "reasoning": Job(
        "word problems and sums as chat (reasoning-gym): 160 rows",
        (
            *("data=reasoning", "data.train_rows=160", "data.test_rows=48"),
            *("data.max_length=160", "train.batch_size=8", "train.buckets=null"),
        ),
    ),
}


def run(folder: Path, *, jobs: int = 1, quick: bool = False) -> None:
    """Train what is not finished, write the result and its picture, and print it.

    Args:
        folder: of the runs; a stopped trial resumes in it.
        jobs: runs at a time.
        quick: one job with few rows, one seed and two rates.
    """
    place = folder / ("quick-retain" if quick else NAME)
    data = place / "data"
    if not data.exists():
        with new_folder(data) as draft:
            write_data(draft)
    file = place / RESULT
    found: dict[str, dict[str, dict[str, dict[str, Point]]]] = {}
    if file.exists():
        found = read_json(file)
    seeds, rates = ((0,), RATES[1:]) if quick else (SEEDS, RATES)
    trained = {name: job for name, job in JOBS.items() if job.quick or not quick}
    for seed in seeds:
        for name, job in trained.items():
            known = found.setdefault(name, {})
            if str(seed) in known.get(STRENGTH, {}):
                continue
            points = curves(place / name, job, data, seed, rates, jobs=jobs, quick=quick)
            for label, own in points.items():
                known[label] = {**known.get(label, {}), str(seed): own}
            # after each seed, so that a stopped trial leaves what there is
            write_atomic(file, as_json(found, in_order=True))
    draw(found, place / PICTURE)
    for title, each in tables(found, AT[1:] if quick else AT):
        each.print(title)
    echo(f"written to {place / RESULT} and {place / PICTURE}")


def write_data(folder: Path) -> None:
    """Write the verbs, and the two halves of the bundled texts."""
    write_verbs(folder)
    for name, texts in zip(
        ("measured", "replayed"), halves(read_texts([BUNDLED], NAME)), strict=True
    ):
        write_lines(folder / f"{name}.jsonl", texts)


def curves(
    folder: Path,
    job: Job,
    data: Path,
    seed: int,
    rates: Sequence[float],
    *,
    jobs: int,
    quick: bool,
) -> dict[str, dict[str, Point]]:
    """Return the points of each contender with one seed, by rate or strength."""

    def placed(words: str) -> str:
        return words.replace("{data}", str(data.absolute()))

    def settings(label: str, words: Sequence[str], rate: float) -> tuple[str, ...]:
        # the base is the same for all: one run scores it
        before = str(label == LORA and rate == rates[0]).lower()
        return *map(placed, words), f"train.lr={rate:g}", f"train.score_before={before}"

    of_rate = {
        (label, rate): Placed(f"{name} lr={rate:g}", settings(label, words, rate))
        for label, (name, words) in CONTENDERS.items()
        for rate in rates
    }
    overrides = [placed(word) for word in (*COMMON, *job.overrides, *(job.quick if quick else ()))]
    study = Study(folder, [*of_rate.values()], [seed], [], overrides, jobs)
    study.run()
    runs = {key: study._final(each, seed, None).folder for key, each in of_rate.items()}
    base = {"base": (read_results(runs[LORA, rates[0]])["before"]["loss"], 0.0)}
    found: dict[str, dict[str, Point]] = {label: {**base} for label in (*CONTENDERS, STRENGTH)}
    for (label, rate), run in runs.items():
        found[label][f"{rate:g}"] = point_of(run)
    strongest = runs[LORA, rates[-1]]
    found[STRENGTH] |= {**by_strength(strongest), "1": point_of(strongest)}
    return found


def point_of(run: Path) -> Point:
    """Return the point of a finished run."""
    scores = read_results(run)
    return scores["after"]["loss"], scores["retained"]["lost"]


def by_strength(run: Path) -> dict[str, Point]:
    """Return the points of an adapter below its strength, which are kept in its folder."""
    file = run / TURNED
    if file.exists():
        return {key: (loss, lost) for key, (loss, lost) in read_json(file).items()}
    saved = find(run)
    texts = [json.loads(line)["text"] for line in (run / TEXTS).open(encoding="utf-8")]
    length = yaml.safe_load((run / "config.yaml").read_text())["retain"]["max_length"]
    settings, model = saved.run_config.train, saved.model()
    accelerator = start(settings.seed, saved.run_config.precision)
    splits = splits_of(saved, accelerator)
    evaluator = Evaluator(model, splits, accelerator, settings.eval_batch_size)
    found: dict[str, Point] = {}
    for strength in STRENGTHS:
        with at_strength(model, strength), accelerator.autocast():
            loss = evaluator.rows(splits.test)["loss"]
            measured: Any = retained(model, texts, saved.processor, max_length=length)
            found[f"{strength:g}"] = loss, measured.lost
    write_atomic(file, as_json(found, in_order=True))
    return found


# Comparison


def lost_at(points: Mapping[str, Point], loss: float) -> float | None:
    """Return what is lost at a test loss, by linear interpolation; None where it is not reached.

    Of several crossings, the least.
    """
    ordered = [*points.values()]
    crossings = []
    for (one, lost), (other, more) in pairwise(ordered):
        if min(one, other) <= loss <= max(one, other):
            share = (loss - one) / (other - one) if other != one else 0.0
            crossings.append(lost + share * (more - lost))
    return min(crossings, default=None)


def compared(contenders: Mapping[str, Curve], rate: float) -> dict[str, list[float | None]]:
    """Return what each contender loses at the test loss of LoRA at a rate, by seed."""
    targets = {seed: points[f"{rate:g}"][0] for seed, points in contenders[LORA].items()}
    return {
        label: [lost_at(points, targets[seed]) for seed, points in curve.items()]
        for label, curve in contenders.items()
    }


def tables(found: Found, rates: Sequence[float]) -> Iterator[tuple[str, Table]]:
    """Yield the comparisons of all jobs, each with its title."""
    for name, contenders in found.items():
        count = len(contenders[LORA])
        for rate in rates:
            yield (
                f"{name}: {JOBS[name].title}; at the test loss of LoRA with lr={rate:g}; {count} "
                f"seed{'s' if count > 1 else ''}",
                table(contenders, rate),
            )


def table(contenders: Mapping[str, Curve], rate: float) -> Table:
    """Return the comparison: mean over seeds, and the difference from LoRA with its interval."""
    values = compared(contenders, rate)
    rows: dict[tuple[float, str], list[str]] = {}  # by what is lost
    for label, found in values.items():
        pairs = [
            (own, lora)
            for own, lora in zip(found, values[LORA], strict=True)
            if own is not None and lora is not None
        ]
        if len(pairs) < len(found):
            # behind all others
            text = f"reached by {len(pairs)} of {len(found)} seeds"
            rows[math.inf, label] = [label, text, ""]
            continue
        means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
        differences = [(1, own - lora) for own, lora in pairs]
        limits = interval_of(differences, means[0] - means[1], fewest=2)
        around = " ({:+.3f} to {:+.3f})".format(*limits) if limits else ""
        text = "" if label == LORA else f"{means[0] - means[1]:+.3f}{around}"
        rows[means[0], label] = [label, f"{means[0]:+.3f}", text]
    columns = ["contender", "lost at LoRA's test loss (nats)", "less LoRA's, 95 %"]
    return Table(columns, [rows[key] for key in sorted(rows)])


def publish(folder: Path, assets: Path) -> bool:
    """Copy the points of a folder beside this file, and draw them; False: it has none."""
    file = folder / NAME / RESULT
    if not file.exists():
        return False
    found: dict[str, dict[str, Curve]] = read_json(file)
    write_atomic(PUBLISHED, as_json(found, in_order=True))
    assets.mkdir(parents=True, exist_ok=True)
    draw(found, assets / PICTURE)
    return True


def page() -> str:
    """Return the part of the page about forgetting, from the published points."""
    found: Found = read_json(PUBLISHED)
    seeds = {name: len(found.get(name, {}).get(LORA, {})) for name in JOBS}
    if min(seeds.values()) < FEWEST:
        counts = " and ".join(f"{count} of {name}" for name, count in seeds.items())
        return (
            f"The comparison is being made: {counts} of {len(SEEDS)} seeds are there, and its "
            f"tables come with {FEWEST} of each."
        )
    compared = (f"{title}:\n\n{each.markdown()}" for title, each in tables(found, AT))
    picture = f"![Test loss, and loss on other texts](../assets/claims/{PICTURE})"
    return "\n\n".join([picture, *compared])


def draw(found: Found, file: Path) -> None:
    """Draw the curves of all jobs, means over the seeds, as an SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * max(1, len(found)) + 3.2, 4.0), layout="constrained")
    places = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, contenders) in zip(places, found.items(), strict=True):
        for label, curve in contenders.items():
            keys = [*next(iter(curve.values()))]
            of_key = ([points[key] for points in curve.values()] for key in keys)
            points = [[*map(statistics.fmean, zip(*each, strict=True))] for each in of_key]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("test loss (nats per token)", fontsize=9)
        axes.set_ylabel("lost on other texts (nats per token)", fontsize=9)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    with mpl.rc_context({"svg.hashsalt": NAME, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
