"""The trials of `petl advise`, the choice among them, and what is left in its folder.

    trials/NAME-steps-N-seed-S/   runs of a rung; scored on validation rows, never on test rows
    last/NAME-seed-S/             runs of full length
    configs/method/advised.yaml   the advice, for --config-dir
    schedule.json                 rungs, what was measured, seconds that were spent
    advice.json, advice.html      what was found

The trials of a rung train in one pass, in this process. Finished runs are kept, and rungs that were
planned stay as they are: the same command resumes a stopped one.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import NotRequired

from datasets import Dataset
from omegaconf import DictConfig, OmegaConf

from petl.core.types import Record
from petl.data.base import read_from, refuse_stream
from petl.data.models.loading import load_processor
from petl.errors import InputError, RunStopped
from petl.experiments.advice.candidates import SIMPLEST, needs, shortlist, within, words_of
from petl.experiments.advice.evidence import (
    LEVEL,
    Evidence,
    RowErrors,
    Setting,
    Trial,
    possible,
    row_error,
)
from petl.experiments.advice.rounds import (
    PlannedRounds,
    PlannedRun,
    make_rounds,
    planned,
    setting_of,
)
from petl.experiments.advice.rows import doubtful, largest_class, probe
from petl.experiments.advice.schedule import (
    FEWEST_STEPS,
    Budget,
    Seconds,
    first_steps,
    probe_fits,
)
from petl.experiments.reports.advised import PAGE, named
from petl.experiments.reports.entries import quality_of, validation_of
from petl.experiments.reports.formatting import count_text, duration
from petl.experiments.sweeps.study import AT_THE_END, slug
from petl.system.files.disk import as_json, remove, write_atomic
from petl.system.files.read import read_json
from petl.system.settings.command_line import (
    config_dir_words,
    how_to_continue,
    in_shell,
    preset_of,
    quoted,
)
from petl.training import program as app
from petl.training.compose import compose
from petl.training.dataloader import Splits, digest, encode_splits
from petl.training.distributed.launch import alone
from petl.training.distributed.launch import start as start_device
from petl.training.features import features_of, orders_of
from petl.training.loop import Stepwise
from petl.training.runs.records import ADAPTER, is_finished, read_results
from petl.training.runs.resume import differences, identity, summary
from petl.training.runs.run_config import read_config
from petl.training.together.runs import RunJob, train_runs
from petl.training.wrapping import Bases

SCHEDULE, ADVICE, RECIPE = "schedule.json", "advice.json", "advised"
TRIALS, CONFIGS = "trials", "configs"  # folders
FEWEST_ROWS = 60  # of which a part for validation says something
SHARE, ENOUGH = 0.2, 1000  # of the training rows for validation, and rows that are enough
AT_A_TIME = 8  # trials of a pass
RETAINED = 64  # texts that are measured with --lost, however short a trial is; assumption
FREE = ("train.steps", "train.seed", "train.lr")  # what tells the runs of an advice apart
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdviceRequest:
    """What was asked for.

    Attributes:
        overrides: settings of `petl train` for every run, without a method.
        folder: of the advice.
        cost: in plain runs.
        need: names of capabilities and formats.
        bytes: of the file of the adapter, at most.
        lost: on retained texts, at most, in nats per token (drift of models that do not write).
        seconds: of the processor for a training, at most.
    """

    overrides: list[str]
    folder: Path
    cost: float
    need: list[str] = field(default_factory=list)
    bytes: int | None = None
    lost: float | None = None
    seconds: float | None = None


class Planned(PlannedRounds):
    """The content of schedule.json.

    Attributes:
        request: all that was asked for, and the settings of the runs.
        seconds: as measured by the first trial, and by the last rung; None: not yet.
        spent: processor seconds so far.
        probe: the score of a linear probe; None: it is impossible. Absent: not yet, or no room.
    """

    request: Record
    seconds: dict[str, float] | None
    spent: float
    probe: NotRequired[float | None]


@dataclass(frozen=True)
class Sizes:
    """How much there is to train on.

    Attributes:
        train, validation, test: rows.
        share: of the training rows, for validation.
        steps: of a run of full length.
        batch: rows of a step.
    """

    train: int
    validation: int
    test: int
    share: float
    steps: int
    batch: int


@dataclass
class Advisor:
    """Makes the trials that a cost has room for, and says what they say.

    Args:
        trial: begins the work of a trial, for `RunJob`.
        start: that of a run of the last round, which has a page.
        clock: processor seconds of this process since its start.
    """

    request: AdviceRequest
    trial: Callable[[DictConfig, Bases], Stepwise[float]]
    start: Callable[[DictConfig, Bases], Stepwise[float]]
    clock: Callable[[], float] = time.process_time

    def run(self) -> Record:
        """Return the advice, also in advice.json.

        Raises:
            InputError: no method meets the constraints, or another command's folder.
            RunStopped: all trials failed, or a signal ended them.
        """
        self.began, self.wall = self.clock(), time.monotonic()
        self.config = read_config(compose([f"+method={SIMPLEST}", *self.request.overrides]))
        self.request.folder.mkdir(parents=True, exist_ok=True)
        with alone():
            self.device = start_device(self.config.train.seed, self.config.precision)
        data = read_from(self.config.data)
        refuse_stream(data.train, "petl advise")  # its length is unknown
        assert isinstance(data.train, Dataset)
        constraints = needs(self.request.need, data.task.peft_task_type)
        is_enough = len(data.train) >= FEWEST_ROWS
        share = min(SHARE, ENOUGH / len(data.train)) if is_enough else 0.0
        self.common = self._common(share) if is_enough else []
        run = read_config(compose([f"+method={SIMPLEST}", *self.request.overrides, *self.common]))
        self.doubtful = doubtful(data.task, data.train)
        processor = load_processor(run.model, data.task)
        features = features_of(run.resolved)
        orders = orders_of(features)
        splits = encode_splits(data, processor, run.train, self.device, orders)
        # first, so that no other refusal leaves the advice of another command without a word
        self.planned = self._read(identity(run.resolved), rows_of(splits))
        # of a command that is resumed, what was spent before counts too
        self.before, self.has_trained = self.planned["spent"], False
        if self.request.bytes is not None:
            constraints.append(within(self.request.bytes, self.request.overrides, splits))
        self.list = shortlist(constraints)
        if not is_enough:
            self.note()
            return self._written(self._prior(len(data.train)))
        self.sizes = sizes_of(splits, run.train.batch_size, share, splits.sampler(run.train).steps)
        self.largest = largest_class(splits)
        self.probe = partial(probe, run, splits, features, self.device)
        try:
            self._try_all()
        finally:
            self.note()
        return self._written(self._found())

    # What was planned

    def _read(self, settings: Record, rows: str) -> Planned:
        request = {
            **{k: v for k, v in asdict(self.request).items() if k not in ("folder", "overrides")},
            "rows": rows,
            **{k: v for k, v in settings.items() if k not in FREE},
        }
        # as JSON gives it back, and without what was not asked for
        request = {key: value for key, value in request.items() if value not in (None, [])}
        new = Planned(request=request, seconds=None, rungs=[], last=None, spent=0.0)
        file = self.request.folder / SCHEDULE
        if not file.exists():
            return new
        found = read_json(file, Planned)
        # another limit chooses among the same trials, if they measured what it limits
        is_lost_known = "lost" in found["request"] and "lost" in request
        limit = {"lost": request["lost"]} if is_lost_known else {}
        others = differences({**found["request"], **limit}, request)
        if others and (found["rungs"] or (self.request.folder / ADVICE).exists()):
            raise InputError(
                f"{self.request.folder} has the advice of another command ({summary(others)}): use "
                "the same options, settings and rows, or another --out"
            )
        if others:  # which ended after its first trial at the latest
            remove(self.request.folder / TRIALS)
            return new
        if found["request"] != request:
            self._forget()
            found.update(request=request, last=None)
        return found

    def _forget(self) -> None:
        """Remove the advice that was for another limit, whatever becomes of this command."""
        for name in (ADVICE, PAGE, CONFIGS):
            remove(self.request.folder / name)

    def note(self) -> None:
        """Write schedule.json, with what was spent; a command that trains nothing adds nothing."""
        if self.has_trained:
            self.planned["spent"] = self.spent()
        write_atomic(self.request.folder / SCHEDULE, as_json(self.planned))

    @property
    def seconds(self) -> Seconds:
        """What runs cost, once the first trial is made."""
        assert self.planned["seconds"] is not None
        return Seconds(**self.planned["seconds"])

    @cached_property
    def full(self) -> int:
        """The steps of a run of full length, which --seconds may limit.

        Raises:
            InputError: too few steps are left.
        """
        limit = self.request.seconds
        if limit is None:
            return self.sizes.steps
        fixed, step = self.seconds.begin + self.seconds.run, self.seconds.step * self.longer
        steps = math.floor((limit - fixed) / step)
        if steps < min(FEWEST_STEPS, self.sizes.steps):
            needed = fixed + step * min(FEWEST_STEPS, self.sizes.steps)
            raise InputError(
                f"--seconds {limit:g} leaves {count_text(max(0, steps), 'step')} of {SIMPLEST}, "
                f"of which {FEWEST_STEPS} need {needed:.0f} processor seconds here: give more"
            )
        return min(steps, self.sizes.steps)

    @property
    def longer(self) -> float:
        """Steps of a training on all rows, per step of one without those for validation."""
        return 1 / (1 - self.sizes.share) if self.config.train.steps is None else 1.0

    @property
    def unit(self) -> float:
        """Processor seconds of the plain run: all rows, the user's length, one test scoring."""
        # a pass without gradients takes about a third of a step
        scored = self.sizes.test / self.sizes.batch / 3
        steps = self.sizes.steps * self.longer + scored
        return self.seconds.begin + self.seconds.of(1, round(steps))

    @property
    def probe_cost(self) -> float:
        """What a linear probe costs, in plain runs: a pass over rows takes a third of a step."""
        passes = (self.sizes.train + self.sizes.validation) / self.sizes.batch / 3
        return (self.seconds.run + passes * self.seconds.step) / self.unit

    # The runs

    def _common(self, share: float) -> list[str]:
        own = [word.lstrip("+~").partition("=")[0] for word in self.request.overrides]
        if self.request.lost is not None:
            retained = [] if "retain.rows" in own else [f"retain.rows={RETAINED}"]
        else:  # texts that retain.mix trains on stay
            is_given = any(name.partition(".")[0] == "retain" for name in own)
            retained = [] if is_given else ["retain.data=null"]
        return [
            *("train.linear_probe=false", "train.score_before=false", "train.test=false"),
            *(f"train.eval_steps={AT_THE_END}", f"train.validation_share={share:.4g}"),
            *("train.keep_checkpoints=1", "train.resume=auto", *retained),
        ]

    def folder_of(self, run: PlannedRun, *, last: bool = False) -> Path:
        """Return the folder of a run."""
        method, rank, rate = run["setting"]
        name = slug(f"{method}-r{rank}-lr{rate:g}")
        if last:
            return self.request.folder / "last" / f"{name}-seed-{run['seed']}"
        return self.request.folder / TRIALS / f"{name}-steps-{run['steps']}-seed-{run['seed']}"

    def words(self, run: PlannedRun, folder: Path) -> list[str]:
        """Return the settings of `petl train` of a run."""
        return [
            *words_of(setting_of(run)),
            *self.request.overrides,
            *self.common,
            *(f"train.steps={run['steps']}", f"train.seed={run['seed']}"),
            f"train.run={quoted(str(folder))}",
        ]

    def _make(self, runs: Sequence[PlannedRun], *, last: bool = False) -> float:
        """Make the runs that are not finished, in one pass; return their processor seconds."""
        begun = self.clock()
        jobs = []
        for run in runs:
            folder = self.folder_of(run, last=last)
            if is_finished(folder):
                continue
            folder.parent.mkdir(parents=True, exist_ok=True)
            words = self.words(run, folder)
            log = folder.with_name(f"{folder.name}.log")
            begin = self.start if last else self.trial
            jobs.append(RunJob(words, partial(compose, words), log, begin))
        self.has_trained |= bool(jobs)
        signalled = train_runs(jobs, AT_A_TIME)
        if signalled:
            status = app.SIGNALLED + signalled
            raise RunStopped(f"interrupted; {how_to_continue()}", status=status)
        failed = [job for job in jobs if job.error is not None]
        # such as a rate at which the loss is not finite
        for job in failed:
            kind = "the run of full length" if last else "a trial"
            logger.warning("%s failed, and is left out: see %s", kind, job.log)
        if len(failed) == len(runs) and not self.results:
            every = "the only run" if len(runs) == 1 else f"all {len(runs)} runs"
            raise RunStopped(f"{every} failed, see {failed[0].log}: {failed[0].error}")
        del jobs, failed
        gc.collect()  # models, which refer to themselves
        return self.clock() - begun

    def spent(self) -> float:
        """Return the processor seconds so far, those of a command that is resumed included."""
        return self.before + self.clock()

    def _try_all(self) -> None:
        """Make the first trial, the rungs and the last round."""
        first = planned(self.list.allowed[0], 0, first_steps(self.sizes.steps))
        if self.planned["seconds"] is None:
            self._measure(first)
        is_due = not self.planned["rungs"] and "probe" not in self.planned
        if is_due and probe_fits(self.request.cost, self.probe_cost):
            self._say("a linear probe, scored on the rows for validation", None)
            self.has_trained = True
            self.planned["probe"] = self.probe()
            self.note()
        make_rounds(self, self.planned, first, self.list, self.budget)

    def _measure(self, first: PlannedRun) -> None:
        """Make the first trial, which measures what a step costs."""
        self._say(
            f"a first trial of {count_text(first['steps'], 'step')}, which measures what a step "
            "costs",
            None,
        )
        remove(self.folder_of(first))  # of one that was stopped, the seconds are not known
        taken = self._make([first])
        scores = read_results(self.folder_of(first))
        if self.request.lost is not None and lost_of(scores) == -math.inf:
            raise InputError(
                f"--lost {self.request.lost:g}: what such a model loses on other texts was not "
                f"measured (retain.data={self.config.resolved['retain']['data']}); leave it "
                "out, or set retain.data"
            )
        step = scores["cpu_seconds"] / scores["steps"]
        rest = taken - scores["cpu_seconds"]
        self.planned["seconds"] = asdict(Seconds(self.began, rest, step))

    @property
    def budget(self) -> Budget:
        """What the cost leaves for trials, once the first one is made."""
        return Budget(self.request.cost, self.unit, self.full)

    def make(self, runs: Sequence[PlannedRun], number: int | None) -> None:
        """Make the runs of a rung, which measures a pass of several, or of the last round."""
        if number is None:
            names = ", ".join(named(setting_of(run)._asdict()) for run in runs)
            left = self.seconds.of(len(runs), self.full)
            self._say(f"the last round, {count_text(self.full, 'step')}: {names}", left)
            self._make(runs, last=True)
            return
        steps, budget = runs[0]["steps"], self.budget
        length = count_text(steps, "step")
        self._say(
            f"trials, round {number + 1} of {budget.rungs}: {len(runs)} of {length}",
            budget.cost * budget.unit - self.spent(),
        )
        due = [run for run in runs if not is_finished(self.folder_of(run))]
        taken = self._make(runs)
        if len(due) > 1:
            self.planned["seconds"] = asdict(self.seconds.measured(len(due), steps, taken))
            self.note()

    def _say(self, text: str, left: float | None) -> None:
        """Log what begins, and how long all will take at the speed so far."""
        pace = (time.monotonic() - self.wall) / max(1e-9, self.clock() - self.began)
        rest = "" if left is None else f"; about {duration(max(0.0, left) * pace)} left"
        logger.info("%s%s", text, rest)

    # What they say

    @property
    def results(self) -> dict[Path, tuple[PlannedRun, Record]]:
        """All finished runs with a finite score: by their folders, with their scores.json."""
        last = self.planned["last"] or []
        runs = {self.folder_of(run): run for rung in self.planned["rungs"] for run in rung}
        runs |= {self.folder_of(run, last=True): run for run in last}
        found = {
            folder: (run, read_results(folder))
            for folder, run in runs.items()
            if is_finished(folder)
        }
        return {folder: each for folder, each in found.items() if score_of(each[1]) > -math.inf}

    @property
    def evidence(self) -> Evidence:
        """What the finished runs say so far.

        Raises:
            InputError: none of them keeps --lost.
            RunStopped: none of them has a finite score.
        """
        trials, lost = [], {}
        scores: Record = {}
        results = self.results
        if not results:
            raise RunStopped(
                f"no trial in {self.request.folder / TRIALS} has a finite validation score: "
                "look for values that are not finite in the rows, and in the losses of the logs",
                status=1,
            )
        for run, scores in results.values():
            setting = setting_of(run)
            score, loss = quality_of(scores, validation_of(scores))
            trials.append(Trial(setting, run["seed"], run["steps"], score, loss))
            lost[setting] = max(lost_of(scores), lost.get(setting, -math.inf))
        excluded = {setting for found in self.list.excluded.values() for setting in found}
        if self.request.lost is not None:
            excluded |= {setting for setting, value in lost.items() if value > self.request.lost}
            if lost.keys() <= excluded:
                raise InputError(
                    f"--lost {self.request.lost:g}: every setting that was tried lost "
                    f"more, {min(lost.values()):.3f} at least; give more, or set retain.mix"
                )
        shown, metric, sizes = validation_of(scores), scores["metric"], self.sizes
        # without test rows, what is predicted are as many new ones as there are for validation
        counts = (sizes.validation, sizes.test or sizes.validation)
        errors = [row_error(metric, shown, count) for count in counts]
        return Evidence(trials, RowErrors(*errors, sizes.validation), self.full, SIMPLEST, excluded)

    def _found(self) -> Record:
        evidence, results = self.evidence, self.results
        best, following = evidence.best, evidence.next_best
        scores = next(iter(results.values()))[1]
        prediction, variances = evidence.predicted()
        sign = 1 if scores["higher_is_better"] else -1
        # a sign that turns swaps the ends
        ends = sorted((sign * prediction.low, sign * prediction.high))
        least, most = possible(scores["metric"], sign > 0)
        center, low, high = (
            min(most, max(least, value)) for value in (sign * prediction.center, *ends)
        )
        last = [self.folder_of(run, last=True) for run in self.planned["last"] or []]
        made = {folder for folder in last if folder in results}
        own = next((f for f in results if f in made and setting_of(results[f][0]) == best), None)
        lost = -math.inf if own is None else lost_of(results[own][1])
        return {
            **self._line(best, self.full / self.sizes.steps),
            "run": own and str(own),
            "adapter": own and str(own / ADAPTER),
            "failed": [f"{folder}.log" for folder in last if not is_finished(folder)],
            "metric": scores["metric"],
            "higher_is_better": scores["higher_is_better"],
            "predicted": {
                "score": center,
                "low": low,
                "high": high,
                "level": LEVEL,
                "degrees_of_freedom": prediction.degrees,
                "variances": variances,
            },
            # differences are gains: of a loss, by how much it is lower
            "leader": evidence.ranked()[0]._asdict(),
            "lead": evidence.gain and evidence.gain._asdict(),
            "next_best": following
            and {**following._asdict(), "gain": evidence.difference(following, best)._asdict()},
            "constraints": self._constraints(evidence),
            "lost": lost if math.isfinite(lost) else None,
            "trials": [
                {**setting_of(run)._asdict(), "seed": run["seed"], "steps": run["steps"]}
                | {"validation": sign * score_of(scores), "run": str(folder)}
                | {"excluded": setting_of(run) in evidence.excluded}
                for folder, (run, scores) in results.items()
            ],
            "floor": {"largest_class": self.largest, "linear_probe": self.planned.get("probe")},
            "rows": {**asdict(self.sizes), **self.doubtful},
            "cost": self.request.cost,
            "seconds": {
                "spent": self.planned["spent"],
                "plain_run": self.unit,
                "fixed": self.seconds.begin + self.seconds.run,
            },
        }

    def _constraints(self, evidence: Evidence) -> Record:
        """Return by the words of each constraint what it excludes and costs, and how it is met."""

        def entry(count: int, settings: Iterable[Setting], note: str = "") -> Record:
            found = evidence.forgone(settings)
            without = found and {**found[0]._asdict(), "gain": found[1]._asdict()}
            return {"excludes": count, "without": without, "note": note}

        excluded = self.list.excluded
        found = {k: entry(len(v), excluded.get(k, [])) for k, v in self.list.reasons.items()}
        limit, full = self.request.lost, self.full
        if limit is not None:
            lost = [(run, lost_of(scores)) for run, scores in self.results.values()]
            own = [(r["steps"], value) for r, value in lost if setting_of(r) == evidence.best]
            steps, value = max(own)
            notes = [f"measured {value:.3f} at {steps:,} of {count_text(full, 'step')}"]
            notes += [
                f"{named(setting_of(run)._asdict())} lost {value:.3f} at full length"
                for run, value in lost
                if value > limit and run["steps"] == full
            ]
            more = {setting_of(run) for run, value in lost if value > limit}
            found[f"--lost {limit:g}"] = entry(len(more), more, "; ".join(notes))
        if self.request.seconds is not None:
            text = f"{full:,} of {count_text(self.sizes.steps, 'step')}"
            found[f"--seconds {self.request.seconds:g}"] = entry(0, [], text)
        return found

    def _prior(self, rows: int) -> Record:
        """Return the advice without a trial: the usual setting of the first method allowed."""
        return {
            **self._line(self.list.allowed[0], 1.0),
            "predicted": None,
            "unchecked": [
                f"--{name} {value:g}"
                for name in ("lost", "seconds")
                if (value := getattr(self.request, name)) is not None
            ],
            "rows": {"train": rows, **self.doubtful},
            "fewest_rows": FEWEST_ROWS,
            "cost": self.request.cost,
            "seconds": {"spent": self.clock()},
        }

    def _line(self, setting: Setting, length: float) -> Record:
        """Return a setting with the line that trains it; writes its YAML.

        Args:
            length: of the training, as a share of the user's.
        """
        train = self.config.train
        own = {"epochs": train.epochs} if train.steps is None else {"steps": train.steps}
        chosen = {k: v if length == 1 else float(f"{v * length:.3g}") for k, v in own.items()}
        if "steps" in chosen:
            chosen["steps"] = int(chosen["steps"])
        changed = [f"train.{name}={value}" for name, value in chosen.items() if length < 1]
        names = tuple(f"train.{name}=" for name in chosen) if changed else ()
        kept = [word for word in self.request.overrides if not (names and word.startswith(names))]
        file = self.request.folder / CONFIGS / "method" / f"{RECIPE}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "defaults": [f"{setting.method}@method", "_self_"],
            "recipe": RECIPE,
            "method": {"r": setting.rank},
            "train": {"lr": setting.rate, **chosen},
        }
        write_atomic(file, f"# @package _global_\n{OmegaConf.to_yaml(OmegaConf.create(content))}")
        recipe = [f"+method={RECIPE}", *kept, *changed]
        return {
            **setting._asdict(),
            "alpha": preset_of(setting.method).get("lora_alpha"),
            "blocks": "all",
            **chosen,
            "command": in_shell([*config_dir_words(), *words_of(setting), *kept, *changed]),
            "config": str(file),
            # Hydra takes one such folder, and the user's may have what the settings name
            "with_config": None
            if config_dir_words()
            else in_shell(["--config-dir", str(file.parents[1]), *recipe]),
        }

    def _written(self, advice: Record) -> Record:
        advice["request"] = self.planned["request"]
        write_atomic(self.request.folder / ADVICE, as_json(advice))
        return advice


def score_of(scores: Record) -> float:
    """Return the validation score of a run, higher is better; -inf without a finite one."""
    return quality_of(scores, validation_of(scores))[0]


def lost_of(scores: Record) -> float:
    """Return what a run lost on retained texts; -inf if that was not measured."""
    found = scores.get("retained") or {}
    return next((found[name] for name in ("lost", "drift") if name in found), -math.inf)


def sizes_of(splits: Splits, batch: int, share: float, steps: int) -> Sizes:
    """Return how many rows and steps there are."""
    assert splits.validation is not None, "train.eval_steps is set"
    return Sizes(len(splits.known), len(splits.validation), len(splits.test), share, steps, batch)


def rows_of(splits: Splits) -> str:
    """Return what tells the rows of one command from those of another: counts, and a digest."""
    parts = {
        name: rows
        for name, rows in (
            ("train", splits.known),
            ("validation", splits.validation),
            ("test", splits.test),
        )
        if rows is not None and len(rows)
    }
    content = "".join(digest(rows) for rows in parts.values())
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in parts.items())
    return f"{counts} ({sha256(content.encode()).hexdigest()[:8]})"
