"""Is importance of use when a model is shrunk: for the widths of the blocks, and for their ranks?

    python scripts/claims.py shrink            # five seeds; resumes where it stopped
    python scripts/claims.py shrink --quick    # one seed with few rows and steps

    python scripts/claims.py shrink --publish  # scripts/claims/shrink.json, for docs/claims.md

A LoRA is trained on the verbs of the quickstart and merged. The result is shrunk with equal widths
and with widths by importance, and each is recovered by LoRAs with equal ranks and with ranks by
importance, of the same sum. Both kinds of widths are multiples of 8, equal ones in each block and
others in sum, so that they keep nearly the same number of channels; the table has both. Test
accuracies of all are compared by seed.
"""

import statistics
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from petl.adapters.shrink.command import Work
from petl.adapters.shrink.source import ShrinkSource
from petl.cli.train import train
from petl.experiments.reports.formatting import Table, echo
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.training.compose import compose
from petl.training.retain.measure import interval_of
from petl.training.runs.records import is_finished

NAME, RESULT = "shrink", "shrink.json"
PUBLISHED = Path(__file__).with_name(RESULT)
TITLE = "widths and ranks by importance make better small models than equal ones of the same size"
SEEDS, SPARSITIES = tuple(range(5)), (0.3, 0.5, 0.7)
WIDTHS, RANKS = ("even", "by_block"), ("equal", "by importance")
DENSE, BASELINE, CHANNELS = "dense", "even, equal ranks", "channels"
QUICK = ("data.train_rows=256", "data.test_rows=256", "train.steps=8")
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # by sparsity, seed and contender


def run(folder: Path, *, jobs: int = 1, quick: bool = False) -> None:
    """Train what is not finished, write the result, and print it.

    Args:
        folder: of the runs; a stopped trial resumes in it.
        jobs: not used: the runs of a seed depend on one another.
        quick: one seed and sparsity, few rows and steps.
    """
    place = folder / (f"quick-{NAME}" if quick else NAME)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for sparsity in SPARSITIES[1:2] if quick else SPARSITIES:
        for seed in SEEDS[:1] if quick else SEEDS:
            dense = trained(place / f"dense-{seed}", seed, quick=quick)
            scores = found.setdefault(str(sparsity), {}).setdefault(str(seed), {})
            for widths in WIDTHS:
                out = place / f"{widths}-{sparsity}-{seed}"
                scores |= contenders(dense, out, sparsity, widths)
            # after each seed, so that a stopped trial leaves what there is
            write_atomic(place / RESULT, as_json(found, in_order=True))
    for sparsity, by_seed in found.items():
        table(by_seed).print(f"test accuracy at sparsity {sparsity}")
    echo(f"written to {place / RESULT}")


def trained(folder: Path, seed: int, *, quick: bool) -> Path:
    """Train the dense run, if it is not finished; return its folder."""
    words = ["+method=lora", f"train.run={folder}", f"train.seed={seed}", "train.resume=auto"]
    words.append("train.precision=no")
    if not is_finished(folder):
        train(compose([*words, "train.linear_probe=false", *(QUICK if quick else ())]))
    return folder


def contenders(dense: Path, out: Path, sparsity: float, widths: str) -> dict[str, float]:
    """Return test accuracies of models of one kind of widths, and how many channels they keep.

    Args:
        dense: the run that is shrunk.
        out: beside which the shrunk model and its recoveries are kept.
    """
    settings: dict[str, Any] = {"sparsity": sparsity, "widths": widths, "heads": False}
    settings |= {"multiple": 8, "metric": "angular"}  # the defaults of `petl shrink`
    work = Work(ShrinkSource.at(str(dense), None, []), settings, out)
    record = work.earlier()
    if record is None:
        small, record = work.shrunk()
        work.write(small, work.base, record, lambda folder: None)
    scores = {name: values["accuracy"] for name, values in record["scores"].items()}
    channels = sum(len(block["channels"]) for block in record["blocks"])
    found = {
        DENSE: scores["dense"],
        f"{widths}, not recovered": scores["shrunk"],
        f"{widths}, {CHANNELS}": channels,
    }
    for ranks in RANKS:
        blocks = record["blocks"]
        if ranks == "equal":
            blocks = [{**block, "importance": 1.0} for block in blocks]
        cfg = work.recovery({**record, "blocks": blocks}, 8, None)
        # beside OUT.train, which has one recovery
        run = out.with_name(f"{out.name}, {ranks}")
        cfg["train"]["run"] = str(run)
        if not is_finished(run):
            train(cfg)
        found[f"{widths}, {ranks.replace('equal', 'equal ranks')}"] = work.recovered(run)[
            "accuracy"
        ]
    return found


def table(by_seed: Mapping[str, Mapping[str, float]]) -> Table:
    """Return means over seeds, and differences from equal widths and ranks with 95 % intervals."""
    names = [DENSE, *(f"{widths}, not recovered" for widths in WIDTHS)]
    names += [f"{w}, {r}" for w, r in product(WIDTHS, ("equal ranks", "by importance"))]
    rows = []
    for name in names:
        values = [scores[name] for scores in by_seed.values()]
        pairs = [(1, scores[name] - scores[BASELINE]) for scores in by_seed.values()]
        difference = statistics.fmean(each for _, each in pairs)
        limits = interval_of(pairs, difference, fewest=2)
        around = " ({:+.2f} to {:+.2f})".format(*(100 * x for x in limits)) if limits else ""
        text = "" if name == BASELINE else f"{100 * difference:+.2f}{around}"
        # the same for all seeds
        kept = next(iter(by_seed.values())).get(f"{name.split(',')[0]}, {CHANNELS}")
        channels = "" if kept is None else f"{kept:,.0f}"
        rows.append([name, channels, f"{100 * statistics.fmean(values):.2f} %", text])
    head = ["widths, ranks of the recovery", "channels", "accuracy", "less equal ones, points"]
    return Table(head, rows)


def publish(folder: Path, assets: Path) -> bool:
    """Copy the scores of a folder beside this file; False: it has none."""
    file = folder / NAME / RESULT
    if file.exists():
        write_atomic(PUBLISHED, as_json(read_json(file, dict[str, Any]), in_order=True))
    return file.exists()


def is_published() -> bool:
    """Return True if there is something for the page."""
    return PUBLISHED.exists()


def section() -> Iterator[str]:
    """Yield the paragraphs of the page, from the published scores."""
    yield f"## {NAME}"
    yield f"**{TITLE.capitalize()}.**"
    yield (
        "The paper (Wang et al. 2025, arXiv:2409.13199): widths by the importance of blocks make "
        "better pruned language models, and ranks by it recover them better."
    )
    yield (
        "The task: a LoRA of MiniLM on WordNet verb definitions is merged and shrunk, with widths "
        "that are equal or by importance; LoRAs with ranks that are equal or by importance recover "
        "it. Differences are those of test accuracy by seed, with the 95 % interval of their mean."
    )
    if not is_published():
        recoveries = len(SPARSITIES) * len(SEEDS) * len(WIDTHS) * len(RANKS)
        yield (
            f"Not tried yet: `python scripts/claims.py {NAME}`, {len(SEEDS)} runs that are shrunk "
            f"and {recoveries} that recover."
        )
        return
    for sparsity, by_seed in read_json(PUBLISHED, dict[str, Any]).items():
        of_all = f"{len(by_seed)} of {len(SEEDS)} seeds"
        yield f"{100 * float(sparsity):g} % of the MLP channels removed, {of_all}:"
        yield table(by_seed).markdown()
