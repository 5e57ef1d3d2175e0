"""The grid: each task with each method, rank, learning rate and seed, and the table of its scores.

The runs of a task and a method are a unit: they train eight at a time over one base. Beside the
runs of full length there are the short trials that advice may make, which have no test score. Once
a unit is finished, its scores are lines of the table, and its folders are deleted. A run that is
not finished is begun again, so that a stop costs eight runs at most.
"""

import gc
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import pandas as pd

from advice.tasks import TASKS, Task
from petl.cli.train import trial
from petl.errors import Diverged, InputError, RunStopped, UnsupportedError
from petl.experiments.advice.candidates import OTHERS, RANKS, SIMPLEST, at, words_of
from petl.experiments.advice.evidence import Setting
from petl.experiments.advice.schedule import LAST_SHARE, first_steps
from petl.experiments.reports.formatting import duration
from petl.experiments.sweeps.study import AT_THE_END
from petl.system.files.disk import write_atomic
from petl.training import program as app
from petl.training.compose import compose
from petl.training.runs.records import PREDICTIONS, is_finished, read_results
from petl.training.together.runs import RunJob, train_runs

DATA = "data"  # the folder of the files of all tasks, in that of the runs
TABLE = Path(__file__).with_name("grid.csv")
AT_A_TIME, PASS = 8, 16  # runs that train together; of which there are models at a time
SEEDS = range(3)
REFUSALS = (InputError, UnsupportedError)
METHOD_RANKS = {SIMPLEST: RANKS, **{method: (rank,) for method, rank in OTHERS.items()}}
COMMON = (
    *("train.epochs=null", "train.linear_probe=false", "train.score_before=false"),
    *("retain.data=null", "train.validation_share=0.2", "train.save_steps=null"),
    # a quarter less than in float32 of what a step of the encoder takes, where there is AMX
    *(f"train.eval_steps={AT_THE_END}", "train.precision=auto"),
)
logger = logging.getLogger("petl.advice")  # below petl, whose messages the command prints


def tried(method: str, powers: Sequence[int]) -> set[Setting]:
    """Return the settings of a method that advice may try in short trials."""
    around = [power for power in powers if abs(power) <= 1]
    if method != SIMPLEST:
        # of the smallest further rates, where files of LoRA are too large
        some = around if method == "compacter" else [0]
        return {at(method, OTHERS[method], power) for power in some}
    settings = {at(method, 8, power) for power in powers} | {at(method, rank) for rank in (2, 32)}
    # of rank 4 where files of rank 8 are too large
    return settings | {at(method, 4, power) for power in around}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        rate: learning rate.
        steps: its length; without a test score if that is less than the task's.
    """

    task: str
    method: str
    rank: int
    rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"r{self.rank}-lr{self.rate:g}-steps{self.steps}-seed{self.seed}"

    def words(self, task: Task, data: Path, folder: Path) -> list[str]:
        """Return the settings of `petl train`."""
        own = [word.replace("{data}", str(data)) for word in task.words]
        return [
            *words_of(Setting(self.method, self.rank, self.rate)),
            *own,
            *COMMON,
            f"train.test={str(self.steps == task.steps).lower()}",
            *(f"train.steps={self.steps}", f"train.seed={self.seed}", f"train.run={folder}"),
            "train.resume=auto",
        ]


FIELDS = Cell.__annotations__


@dataclass(frozen=True)
class Unit:
    """The runs of a task and a method.

    Attributes:
        folder: of their folders and logs.
        data: of the files of all tasks.
        done: names of those that the table has.
    """

    task: Task
    method: str
    folder: Path
    data: Path
    done: Collection[str] = ()

    @cached_property
    def cells(self) -> dict[Path, Cell]:
        """The runs by their folders."""
        full, method = self.task.steps, self.method
        found = [
            (at(method, rank, power), full, seed)
            for rank, power, seed in product(METHOD_RANKS[method], self.task.powers, SEEDS)
        ]
        # advice gives each of its first trials one seed, and two to those of the last rung
        short, half = first_steps(full), round(LAST_SHARE * full)
        lengths = [(short, 0), *((half, seed) for seed in (0, 1) if half > short)]
        found += [
            (setting, *length)
            for setting in sorted(tried(method, self.task.powers))
            for length in lengths
        ]
        cells = [Cell(self.task.name, *setting, steps, seed) for setting, steps, seed in found]
        return {self.folder / cell.name: cell for cell in cells if cell.name not in self.done}

    def train(self) -> float:
        """Make the runs that are not finished; return the processor seconds of that.

        A method that refuses the task's model has rows without scores: advice does not try it.

        Raises:
            RunStopped: a signal ended them, or some failed for another reason than their rate.
        """
        begun = time.process_time()
        self.folder.mkdir(parents=True, exist_ok=True)
        due = [folder for folder in self.cells if not is_finished(folder)]
        failed = [
            problem
            for first in range(0, len(due), PASS)
            for problem in self._train(due[first : first + PASS])
        ]
        refused = [error for _, error in failed if isinstance(error, REFUSALS)]
        if len(refused) == len(self.cells):
            logger.warning("%s, %s: refused: %s", self.task.name, self.method, refused[0])
        elif failed:
            log, error = failed[0]
            raise RunStopped(
                f"{len(failed)} of {len(self.cells)} runs failed, such as {log}: {error}; the same "
                "command continues"
            )
        return time.process_time() - begun

    def _train(self, folders: Sequence[Path]) -> list[tuple[Path, BaseException]]:
        """Make runs; return the log and error of those that failed for other reasons than a rate.

        Raises:
            RunStopped: a signal ended them.
        """
        jobs = []
        for folder in folders:
            words = self.cells[folder].words(self.task, self.data, folder)
            jobs.append(RunJob(words, partial(compose, words), Path(f"{folder}.log"), trial))
        signalled = train_runs(jobs, AT_A_TIME)
        if signalled:
            status = app.SIGNALLED + signalled
            raise RunStopped("interrupted; the same command continues", status=status)
        found = [
            (job.log, job.error.with_traceback(None))  # which holds models
            for job in jobs
            if job.error and not isinstance(job.error, Diverged)
        ]
        del jobs
        gc.collect()  # models, which refer to themselves
        return found

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield the lines of the table; a run that diverged has no scores."""
        for folder, cell in self.cells.items():
            scores = scores_of(folder, self.task.block) if is_finished(folder) else {}
            yield {**asdict(cell), **scores}


def scores_of(folder: Path, block: int) -> dict[str, object]:
    """Return what the table has of a finished run.

    Args:
        block: tokens of a row of running text, see `Task`.
    """
    scores = read_results(folder)
    metric, validation, test = scores["metric"], scores["validation_scores"], scores["after"]
    found = {"metric": metric, **evaluated("validation", metric, validation)}
    if test:
        found |= evaluated("test", metric, test)
        counted = "rows" if "rows" in test else "tokens"
        rows = (folder / PREDICTIONS).read_bytes().count(b"\n")
        rows = round(test["tokens"] / (block - 1)) if block else rows
        # where tokens are counted, rows of both parts have as many on average
        found["test_rows"] = rows
        found["validation_rows"] = round(rows * validation[counted] / test[counted])
    return {**found, "parameters": scores["adapter_parameters"], "bytes": scores["adapter_bytes"]}


def evaluated(part: str, metric: str, scores: Mapping[str, float]) -> dict[str, object]:
    """Return the columns of an evaluation; without a loss, the squared errors stand for it."""
    loss = scores["loss"] if "loss" in scores else scores["mse"]
    return {part: f"{scores[metric]:.5g}", f"{part}_loss": f"{loss:.5g}"}


def units(folder: Path, names: list[str]) -> list[Unit]:
    """Return the units of which the table lacks runs, task by task."""
    done: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in read_table()[[*FIELDS]].to_dict("records") if TABLE.exists() else []:
        cell = Cell(**row)
        done[cell.task, cell.method].add(cell.name)
    tasks = [task for task in TASKS if not names or task.name in names]
    found = [
        Unit(task, m, folder / task.name / m, folder / DATA, done[task.name, m])
        for task in tasks
        for m in METHOD_RANKS
    ]
    return [unit for unit in found if unit.cells]


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
    return pd.read_csv(TABLE)
