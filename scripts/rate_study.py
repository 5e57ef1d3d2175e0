"""Compare methods that train in a script's own loop; `petl study` does so for `petl train`.

Each method trains with every learning rate on the first seed; the rate with the lowest validation
loss trains the other seeds too. Test scores are computed with each run and choose nothing. Runs are
kept in FOLDER/runs.json: the same command resumes.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petl.cli.arguments import POSITIVE, SEED, each, folder_to_write
from petl.errors import InputError
from petl.system.files.disk import write_json
from petl.system.files.read import read_json


@dataclass
class Scores:
    """What one run reached.

    Attributes:
        validation: loss on the validation rows; lower is better.
        test: loss on the test rows.
        parameters: trained ones.
        step: CPU seconds of a training step, the median.
        more: further test scores by name.
    """

    validation: float
    test: float
    parameters: int
    step: float
    more: dict[str, float] = field(default_factory=dict)


Train = Callable[[str, float, int], Scores]  # of a method's name, a learning rate and a seed


@dataclass(frozen=True)
class RateStudy:
    """Methods, learning rates and seeds, and where the runs are kept."""

    folder: Path
    names: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]

    def run(self, train: Train, settings: Mapping[str, Any]) -> None:
        """Train what is not in the folder, and print the tables.

        Args:
            settings: of all runs, as JSON has them; those in the folder must have the same.

        Raises:
            InputError: the folder has runs with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "runs.json"
        kept = read_json(file, dict) if file.is_file() else {"settings": dict(settings), "runs": {}}
        if kept["settings"] != dict(settings):
            raise InputError(
                f"{file} is of another study, with settings {kept['settings']}, not "
                f"{dict(settings)}: use the same, or another folder"
            )
        runs: dict[str, Any] = kept["runs"]

        def scores(name: str, rate: float, seed: int) -> Scores:
            key = f"{name}, rate {rate:g}, seed {seed}"
            if key not in runs:
                runs[key] = asdict(train(name, rate, seed))
                write_json(file, kept)
                print(f"{key}: {runs[key]}", flush=True)
            return Scores(**runs[key])

        tried = {
            n: {rate: scores(n, rate, self.seeds[0]) for rate in self.rates} for n in self.names
        }
        best = {name: lowest(by) for name, by in tried.items()}
        reached = {n: [scores(n, best[n], seed) for seed in self.seeds] for n in self.names}
        print(self.table(reached, best), self.rate_table(tried, best), sep="\n\n")

    def table(self, reached: Mapping[str, Sequence[Scores]], best: Mapping[str, float]) -> str:
        """The test scores by method, in Markdown."""
        first = next(iter(reached.values()))[0]
        head = ["method", "test loss", "by seed", *first.more]
        rows = [[*head, "learning rate", "parameters", "CPU s/step"], ["---"] * (len(head) + 3)]
        for name, all_scores in reached.items():
            losses = [scores.test for scores in all_scores]
            row = [name, mean_text(losses), ", ".join(f"{loss:.4f}" for loss in losses)]
            row += [mean_text([scores.more[k] for scores in all_scores]) for k in first.more]
            step = statistics.median(scores.step for scores in all_scores)
            rows.append([*row, f"{best[name]:g}", f"{all_scores[0].parameters:,}", f"{step:.3f}"])
        return markdown(rows)

    def rate_table(
        self, tried: Mapping[str, Mapping[float, Scores]], best: Mapping[str, float]
    ) -> str:
        """The validation losses by method and learning rate, in Markdown; a star at the chosen."""
        rows = [["validation loss at", *(f"{rate:g}" for rate in self.rates)]]
        rows.append(["---"] * len(rows[0]))
        for name, by_rate in tried.items():
            cells = (f"{s.validation:.4f}{' *' * (r == best[name])}" for r, s in by_rate.items())
            rows.append([name, *cells])
        return markdown(rows)


def lowest(tried: Mapping[float, Scores]) -> float:
    """The learning rate with the lowest validation loss; one that is not a number is the worst."""
    losses = {rate: scores.validation for rate, scores in tried.items()}
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def mean_text(values: Sequence[float]) -> str:
    """Mean and standard deviation; one value alone."""
    several = len(values) > 1 and all(map(math.isfinite, values))
    deviation = f" ± {statistics.stdev(values):.4f}" if several else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a table as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fit(model: nn.Module, losses: Iterable[Callable[[], Tensor]], steps: int, rate: float) -> float:
    """Train what asks for gradients, with AdamW and a linear decay.

    Args:
        losses: functions that return the loss of a step, one for each step.
        steps: their number.

    Returns:
        The CPU seconds of a step, the median.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    seconds = []
    model.train()
    for loss in losses:
        start = time.process_time()
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.process_time() - start)
    model.eval()
    return statistics.median(seconds)


def add_arguments(command: argparse.ArgumentParser, rates: Sequence[float]) -> None:
    """Add the arguments that the studies have in common."""
    command.add_argument("folder", type=folder_to_write, help="where models and scores are kept")
    command.add_argument("--seeds", type=each(SEED), default=[0, 1, 2], help="default: 0,1,2")
    listed = ",".join(f"{rate:g}" for rate in rates)
    command.add_argument(
        "--rates", type=each(POSITIVE), default=list(rates), help=f"learning rates; {listed}"
    )


def count(model: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
