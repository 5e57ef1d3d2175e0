"""Compare ranks by importance with equal and with random ranks, at equal parameters.

    python scripts/compare_ranks.py runs/ranks --jobs 2
    python scripts/compare_ranks.py runs/ranks-smol model=smollm2 data=hamlet train.steps=200

Trains LoRA with equal ranks, with ranks by the importance of blocks (+ranks=cfsp), and with the
same ranks in a random order of the blocks, beside IncreLoRA and MoLA of at most as many parameters,
each over three seeds; then writes FOLDER/index.html and prints mean and standard deviation of the
test score. Further words are settings of `petl train`, for every run. Finished runs are kept: the
same command resumes a stopped comparison.
"""

import argparse
import json
import logging
import random
import statistics
from pathlib import Path

import yaml

from petl.experiments.reports.comparison import compare
from petl.experiments.reports.comparison_report import write_page
from petl.experiments.sweeps.study import Contender, Study, slug
from petl.system.files.paths import method_preset
from petl.system.settings.command_line import add_config_dir
from petl.training import program as app
from petl.training.ranks.allocation import pattern_of
from petl.training.ranks.file import read_ranks
from petl.training.runs.records import read_results

R, ALPHA = 8, 16  # of LoRA with equal ranks


def random_methods(folder: Path, measured: Path, draws: int) -> list[Contender]:
    """Write a method for each draw: LoRA with the measured ranks in a random order of the blocks.

    Args:
        folder: of the configurations.
        measured: folder of a run with ranks.json.
    """
    blocks = [block for block in read_ranks(measured)["blocks"] if block["rank"] is not None]
    paths, ranks = [block["path"] for block in blocks], [block["rank"] for block in blocks]
    (folder / "method").mkdir(parents=True, exist_ok=True)
    names = []
    for draw in range(1, draws + 1):
        order = random.Random(draw).sample(ranks, len(ranks))
        of_path = sorted(zip(paths, order, strict=True), key=lambda pair: -len(pair[0]))
        patterns = {
            "rank_pattern": {pattern_of(path): rank for path, rank in of_path},
            "alpha_pattern": {pattern_of(path): ALPHA * rank / R for path, rank in of_path},
        }
        method = {**method_preset("lora"), "r": R, "lora_alpha": ALPHA, **patterns}
        name = f"lora_random_{draw}"
        (folder / "method" / f"{name}.yaml").write_text(
            f"# LoRA with the ranks of {measured} in random order {draw}.\n"
            + yaml.safe_dump(method, sort_keys=False)
        )
        # the sum of its ranks is that of equal ranks already
        names.append(Contender(f"{name} train.budget=null"))
    return names


def main() -> None:
    """Train what is not finished, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=3, help="random orders (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("overrides", nargs="*", metavar="SETTING")
    given = parser.parse_intermixed_args()
    app.log_to_stderr()
    folder, configs = given.folder, given.folder / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    add_config_dir(str(configs))

    def train(contenders: list[Contender], *more: str) -> None:
        Study(folder, contenders, given.seeds, [], [*given.overrides, *more], given.jobs).run()

    lora = [f"lora method.r={R} method.lora_alpha={ALPHA}"]
    equal, measured = Contender(lora[0]), Contender(f"{lora[0]} +ranks=cfsp")
    train([equal, measured])
    first = folder / "runs" / slug(equal.name) / f"seed-{given.seeds[0]}"
    budget = read_results(first)["adapter_parameters"]
    others = [Contender(f"{name} train.budget={budget}") for name in ("increlora", "mola")]
    drawn = folder / "runs" / slug(measured.name) / f"seed-{given.seeds[0]}"
    randomly = random_methods(configs, drawn, given.draws)
    train([*randomly, *others])
    print(write_page(compare([folder / "runs"]), folder, {}))
    rows = {}
    for contender in (equal, measured, *randomly, *others):
        runs = [folder / "runs" / slug(contender.name) / f"seed-{seed}" for seed in given.seeds]
        results = [read_results(run) for run in runs]
        scores = [result["after"][result["metric"]] for result in results]
        rows[contender.name] = {
            "metric": results[0]["metric"],
            "mean": statistics.mean(scores),
            "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "scores": scores,
            "adapter_parameters": results[0]["adapter_parameters"],
        }
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    logging.getLogger("petl").setLevel(logging.INFO)
    main()
