"""The grid: each task with each method, rank, learning rate and seed, and the table of its scores.

The runs of a task and a method are a unit: they train eight at a time over one base, in one
process. Once a unit is finished, its scores are lines of the table, and its folders are deleted.
"""

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import pandas as pd

from advice.tasks import TASKS, Task
from petl.core.registry import METHODS
from petl.errors import RunStopped
from petl.experiments.reports.formatting import duration
from petl.experiments.sweeps.study import AT_THE_END, TOGETHER, Runs
from petl.system.files.disk import write_atomic
from petl.training.runs.records import is_finished, read_results

DATA = "data"  # the folder of the files of all tasks, in that of the runs
TABLE = Path(__file__).with_name("grid.csv")
AT_A_TIME = 8
SEEDS = range(3)
FACTORS = (1 / 9, 1 / 3, 1, 3, 9)  # of the method's default learning rate
RANKS = (2, 4, 8, 16, 32)
METHOD_RANKS = {  # Compacter's bottleneck has at least its four blocks
    "lora": RANKS,
    "mola": RANKS,
    "adapter": RANKS,
    "mos": RANKS,
    "compacter": (4, 8, 16, 32, 64),
}
COMMON = (
    *("train.epochs=null", "train.linear_probe=false", "train.score_before=false"),
    *("retain.data=null", "train.validation_share=0.2", "train.save_steps=null"),
    f"train.eval_steps={AT_THE_END}",
)
logger = logging.getLogger("petl.advice")  # below petl, whose messages the command prints


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        rate: learning rate.
    """

    task: str
    method: str
    rank: int
    rate: float
    seed: int

    def words(self, task: Task, data: Path, folder: Path) -> list[str]:
        """Settings of `petl train`."""
        own = [word.replace("{data}", str(data)) for word in task.words]
        return [
            *(f"+method={self.method}", f"method.r={self.rank}", *own, *COMMON),
            *(f"train.lr={self.rate:g}", f"train.seed={self.seed}", f"train.run={folder}"),
            "train.resume=auto",
        ]


@dataclass(frozen=True)
class Unit:
    """The runs of a task and a method.

    Attributes:
        folder: of their folders and logs.
        data: of the files of all tasks.
    """

    task: Task
    method: str
    folder: Path
    data: Path

    @cached_property
    def cells(self) -> dict[Path, Cell]:
        """The runs by their folders."""
        default = METHODS[self.method].default_lr({})
        return {
            self.folder / f"{rank}-{number}-{seed}": Cell(
                self.task.name, self.method, rank, float(f"{default * factor:.2g}"), seed
            )
            for rank, (number, factor), seed in product(
                METHOD_RANKS[self.method], enumerate(FACTORS), SEEDS
            )
        }

    def train(self) -> float:
        """Make the runs that are not finished; return the processor seconds of the process.

        Raises:
            RunStopped: some of them did not finish.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        due = {folder: cell for folder, cell in self.cells.items() if not is_finished(folder)}
        runs = [
            {"overrides": cell.words(self.task, self.data, folder), "log": f"{folder}.log"}
            for folder, cell in due.items()
        ]
        before = os.times().children_user
        given = json.dumps(Runs(together=AT_A_TIME, runs=runs))
        subprocess.run(TOGETHER, input=given, text=True, check=False)
        missing = [folder for folder in self.cells if not is_finished(folder)]
        if missing:
            raise RunStopped(
                f"{len(missing)} of {len(self.cells)} runs did not finish, such as {missing[0]}: "
                f"see {missing[0]}.log; the same command continues",
                status=1,
            )
        return os.times().children_user - before

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield the lines of the table."""
        for folder, cell in self.cells.items():
            scores = read_results(folder)
            metric, after = scores["metric"], scores["after"]
            yield {
                **asdict(cell),
                "metric": metric,
                "validation": f"{scores['validation']:.5g}",
                "validation_loss": f"{scores['validation_scores']['loss']:.5g}",
                "test": f"{after[metric]:.5g}",
                "test_loss": f"{after['loss']:.5g}",
                "parameters": scores["adapter_parameters"],
                "tokens": scores["tokens"],
            }


def units(folder: Path, names: list[str]) -> list[Unit]:
    """Return the units that the table does not have, method by method."""
    done = set(read_table().groupby(["task", "method"]).groups) if TABLE.exists() else set()
    tasks = [task for task in TASKS if not names or task.name in names]
    return [
        Unit(task, method, folder / task.name / method, folder / DATA)
        for method in METHOD_RANKS
        for task in tasks
        if (task.name, method) not in done
    ]


def train(folder: Path, names: list[str]) -> None:
    """Make all runs of the grid that are not in the table, and add their scores to it."""
    todo = units(folder, names)
    for number, unit in enumerate(todo, start=1):
        begun = time.monotonic()
        seconds = unit.train()
        table = [read_table()] if TABLE.exists() else []
        write_atomic(TABLE, pd.concat([*table, pd.DataFrame(unit.rows())]).to_csv(index=False))
        shutil.rmtree(unit.folder)
        logger.info(
            "[%d/%d] %s, %s: %.0f processor seconds, %s",
            *(number, len(todo), unit.task.name, unit.method, seconds),
            duration(time.monotonic() - begun),
        )


def read_table() -> pd.DataFrame:
    """Return the table of the repository."""
    return pd.read_csv(TABLE, dtype={"validation": str, "test": str})
