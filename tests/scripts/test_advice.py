"""The evidence of advice: replayed on tables whose true scores are known, and the grid's runs."""

import math
import signal
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from advice import grid, page
from advice.grid import METHOD_RANKS, Unit
from advice.replay import (
    COSTS,
    ENDS,
    RULES,
    Case,
    cases,
    coverage,
    mean_regrets,
    read,
    tables,
)
from advice.tasks import TASKS
from comparable import write_run

from petl.errors import Diverged, InputError, RunStopped
from petl.experiments.advice.candidates import Constraint, at, needs, shortlist
from petl.experiments.advice.evidence import Setting

FULL, SHORT = 100, (20, 50)
POWERS = (-2, -1, 0, 1, 2)
SIZES = {"lora": 1000, "mola": 4000, "adapter": 900, "mos": 950, "compacter": 60}  # of a rank
BEST = at("lora", 8)


def settings():
    """Every setting of the grid."""
    for method, ranks in METHOD_RANKS.items():
        for rank, power in product(ranks, POWERS):
            yield at(method, rank, power)


def quiet(setting):
    """Scores without noise: LoRA of rank 8 at its default rate is the best by far."""
    distance = abs(math.log(setting.rate / BEST.rate)) + abs(math.log(setting.rank / 8))
    return 0.45 - 0.04 * distance - (setting.method != "lora") * 0.1


def lines(task, score, *, metric="accuracy", short=True, counts=(300, 1000)):
    """The lines of a task; `score(setting, steps, seed)` returns validation and test scores."""
    found = []
    for setting in settings():
        for steps, seed in product((*SHORT, FULL) if short else (FULL,), range(3)):
            validation, test = score(setting, steps, seed)
            scores = {"metric": metric, "validation": validation, "validation_loss": -validation}
            scores |= {"validation_rows": counts[0], "test_rows": counts[1]}
            scores |= {"test": test if steps == FULL else math.nan}
            size = SIZES[setting.method] * setting.rank
            place = {"task": task, **setting._asdict(), "steps": steps, "seed": seed}
            found.append({**place, **scores, "bytes": size})
    return pd.DataFrame(found)


def known_of(*args, **more):
    """A task whose table has these lines."""
    (found,), _ = read(lines(*args, **more))
    return found


def noisy(rng, level, spread=0.1, counts=(300, 1000)):
    """Accuracies of rows that are right or wrong, of runs that agree on most of them (probit)."""
    ease = [rng.normal(size=count) for count in counts]

    def score(setting, steps, seed):
        own = level(setting) + rng.normal(scale=spread) - 4 / steps
        return [
            float(np.mean(own + 1.2 * rows + rng.normal(scale=0.7, size=len(rows)) > 0))
            for rows in ease
        ]

    return score


def test_without_noise_the_best_of_all_that_is_tried_is_advised():
    known = known_of("one", lambda setting, steps, seed: [quiet(setting) - 1 / steps] * 2)
    found = [case for case in cases(known) if case.procedure == ENDS]
    free = [case for case in found if case.constraint == "none"]
    assert {case.advised for case in free} == {BEST}
    assert [case.regret for case in free] == [0, 0, 0]
    # files of rank 8 are too large; of rank 4, this is the best rate
    small = [case for case in found if case.constraint == "--bytes of LoRA r 4"]
    assert {case.advised for case in small} == {at("lora", 4)}
    assert {case.regret for case in small} == {0}
    # what is smaller than the smallest LoRA
    least = [case for case in found if case.constraint == "--bytes below LoRA r 2"]
    assert {case.advised.method for case in least} == {"compacter"}
    assert all(case.regret >= 0 for case in cases(known))


def test_the_regret_is_what_the_best_has_more_on_test_rows():
    def score(setting, steps, seed):
        above = setting == at("lora", 16, 1)  # which advice does not try
        return quiet(setting) + 0.3 * above, quiet(setting) + 0.011 + 0.2 * above

    known = known_of("one", score)
    wanted = quiet(at("lora", 16, 1)) + 0.2 - quiet(BEST)
    found = [case for case in cases(known) if (case.procedure, case.constraint) == (ENDS, "none")]
    assert [case.regret for case in found] == pytest.approx([wanted] * 3)
    fixed = RULES["LoRA r 16 at 1e-3"]
    (title, table), _ = tables([known])
    assert title == "regret in points, 1 tasks"
    shown = {row[0]: row[1] for row in table.rows}
    expected = 100 * (quiet(at("lora", 16, 1)) + 0.2 - quiet(fixed))
    assert float(shown["LoRA r 16 at 1e-3"]) == pytest.approx(expected, abs=0.06)


def test_a_table_has_the_short_runs_that_advice_makes_and_no_method_that_a_model_refuses():
    table = lines("one", lambda setting, steps, seed: [quiet(setting) - 1 / steps] * 2)
    # as the grid makes them
    made = (table["steps"] == FULL) | (table["seed"] < table["steps"].map({20: 1, 50: 2}))
    table.loc[table["method"] == "mos", ["validation", "test", "bytes"]] = math.nan
    (known,), _ = read(table[made])
    found = [*cases(known)]
    assert {(case.procedure, case.turn) for case in found} == {*product([ENDS, *COSTS], range(3))}
    assert all(math.isfinite(case.regret) for case in found)
    assert "mos" not in {case.advised.method for case in found}


def test_another_method_is_advised_where_it_is_surely_better():
    other = at("mola", 8)

    def score(setting, steps, seed):
        return [quiet(setting) + 0.3 * (setting.method == "mola")] * 2

    found = [*cases(known_of("one", score))]
    by_constraint = {case.constraint: case.advised for case in found if case.procedure == ENDS}
    assert by_constraint["none"] == other
    assert by_constraint["--need merge"] == BEST  # MoLA does not merge
    assert {case.regret for case in found if case.procedure == ENDS} == {0}


@pytest.mark.parametrize("procedure", [ENDS, *COSTS])
def test_intervals_hold_about_as_often_as_they_say(procedure):
    rng, found = np.random.default_rng(5), []
    for number in range(12):
        hard = rng.normal(scale=0.5)

        def level(setting, hard=hard):
            return hard + 3 * (quiet(setting) - 0.45)

        known = known_of(str(number), noisy(rng, level, counts=(200, 400)))
        found += [case for case in cases(known) if case.procedure == procedure]
    share = coverage(found)
    # cases of a task share its rows, so that 12 tasks leave 12 independent ones or a few more
    assert 0.65 <= share.center <= 1
    assert share.low <= share.center <= share.high
    assert statistics.median(mean_regrets(found).values()) < 0.03
    assert 0.03 < statistics.fmean(case.width for case in found) < 0.3


def test_losses_are_regretted_in_nats_and_never_beside_points():
    def loss(setting, steps, seed):
        return [3 - quiet(setting)] * 2

    known = known_of("written", loss, metric="loss")
    assert known.unit == "nats"
    assert known.best() == BEST
    found = [case for case in cases(known) if (case.procedure, case.constraint) == (ENDS, "none")]
    assert [case.regret for case in found] == [0, 0, 0]
    right = known_of("right", lambda setting, steps, seed: [quiet(setting)] * 2)
    titles = [title for title, _ in tables([known, right])]
    assert [title for title in titles if title.startswith("regret")] == [
        "regret in nats, 1 tasks",
        "regret in points, 1 tasks",
    ]


def test_a_run_that_diverged_is_no_trial_and_its_setting_not_the_best():
    def score(setting, steps, seed):
        high = setting.rate > 0.005
        broken = high and seed == 1
        return [math.nan if broken else quiet(setting) + 0.5 * high] * 2

    known = known_of("one", score)
    assert known.best().rate < 0.005
    assert all(not math.isnan(case.regret) for case in cases(known))


def test_tasks_without_all_methods_are_named():
    whole = lines("whole", lambda setting, steps, seed: [quiet(setting)] * 2, short=False)
    part = whole.assign(task="part")
    tasks, others = read(pd.concat([whole, part[part["method"] != "mos"]]))
    assert [known.task for known in tasks] == ["whole"]
    assert others == ["part"]


def test_the_share_of_intervals_that_hold_is_clustered_by_task():
    def case(task, holds):
        return Case(task, "points", ENDS, "none", 0, BEST, 0.0, holds, 0.1, 0.1)

    held = {"a": [1, 1, 1, 0, 0], "b": [1, 1, 1, 1, 0], "c": [1, 1, 1, 1, 1]}
    share = coverage([case(task, bool(each)) for task, found in held.items() for each in found])
    assert share.center == pytest.approx(0.8)
    # of 0.6, 0.8 and 1: 0.2 / sqrt 3, times t of two degrees of freedom; no share is above 1
    assert share.low == pytest.approx(0.8 - 4.303 * 0.2 / math.sqrt(3), abs=1e-3)
    assert share.high == 1


# The page


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_the_page_says_where_a_method_is_better(tmp_path, monkeypatch, gain):
    rng, found = np.random.default_rng(1), []
    for task in TASKS[:12]:
        rated = task.kind == "texts, ratings"

        def level(setting, rated=rated):
            return 0.5 + gain * (rated and setting.method == "adapter") + rng.normal(scale=0.01)

        metric = "pearson" if rated else "loss" if task.kind == "texts, written" else "accuracy"
        sign = -1 if metric == "loss" else 1
        found.append(
            lines(
                task.name,
                lambda setting, *_, level=level, sign=sign: [sign * level(setting)] * 2,
                metric=metric,
                short=False,
            )
        )
    file = tmp_path / "grid.csv"
    pd.concat(found).to_csv(file, index=False)
    monkeypatch.setattr(page, "TABLE", file)
    monkeypatch.setattr(page, "read_table", lambda: pd.read_csv(file))
    *table, _, count = page.page().splitlines()
    assert count.startswith("12 of 20")
    rows = [line.split("|") for line in table[2:]]
    taken = {row[1].strip(): row[-2].strip() for row in rows}
    (rated,) = (name for name in taken if name.startswith("texts, ratings"))
    assert (taken.pop(rated) == "adapter") == (gain > 0)
    assert "adapter" not in taken.values() or gain == 0
    refused = TASKS[0].kind  # whose model one method cannot adapt: its runs have no scores
    for task, runs in zip(TASKS[:12], found, strict=True):
        if task.kind == refused:
            runs.loc[runs["method"] == "mos", [*runs.columns[6:]]] = np.nan
    pd.concat(found).to_csv(file, index=False)
    cells = {row.split("|")[1].strip(): row.split("|") for row in page.page().splitlines()[2:-2]}
    assert {name: "refused" in "".join(row) for name, row in cells.items()} == {
        name: name.startswith(refused) for name in cells
    }
    pd.concat(found[:9]).to_csv(file, index=False)
    assert "9 of 20 tasks" in page.page()


# The grid


def test_the_grid_has_every_trial_that_advice_begins_with():
    cells = {
        (Setting(cell.method, cell.rank, cell.rate), cell.steps, cell.seed)
        for method in METHOD_RANKS
        for cell in Unit(TASKS[0], method, Path("runs"), Path("data")).cells.values()
    }

    def excluding(*pairs):
        return Constraint("these", lambda method, rank: "no" * ((method, rank) in pairs))

    large = [("lora", rank) for rank in (8, 16, 32)]
    every = [("lora", rank) for rank in (2, 4, 8, 16, 32)]
    for constraints in ([], needs(["merge"], None), [excluding(*large)], [excluding(*every)]):
        for setting in shortlist(constraints).allowed:
            assert {(setting, FULL, seed) for seed in range(3)} <= cells
            # LoRA is excluded by its size, so that what is smaller is tried at several rates
            if setting == at(*setting[:2]) or setting.method in ("lora", "compacter"):
                assert {(setting, 20, 0), (setting, 50, 0), (setting, 50, 1)} <= cells
    for setting in RULES.values():
        assert (setting, FULL, 2) in cells


def test_tasks_have_names_and_folders_of_their_own():
    assert len({task.name for task in TASKS}) == len(TASKS) == 20
    for task in TASKS:
        unit = Unit(task, "lora", Path("runs"), Path("data"))
        assert len(set(unit.cells.values())) == len(unit.cells)


class Runs:
    """In place of trainings: some runs finish, one diverges, then a signal comes.

    Attributes:
        asked: names of the runs of each call.
    """

    def __init__(self, finish: int) -> None:
        self.finish, self.asked = finish, []

    def __call__(self, jobs, together):
        self.asked.append([job.log.stem for job in jobs])
        for job in jobs[: self.finish]:
            folder = job.log.with_suffix("")
            if "seed1" in folder.name:
                job.error = Diverged("training diverged")
                continue
            words = [word for word in job.words if word.startswith(("+method", "train.lr"))]
            scores = {"accuracy": 0.5, "loss": 1.5, "rows": 4.0}
            known = {"validation": 0.5, "validation_scores": {**scores, "rows": 2.0}}
            tested = {"after": scores if "train.test=true" in job.words else None}
            write_run(folder, 0.5, *words, **known, **tested)
            (folder / "predictions.jsonl").write_text("{}\n" * 4)
        return signal.SIGTERM if self.finish < len(jobs) else 0


def test_a_stopped_grid_goes_on_where_it_was(tmp_path, monkeypatch):
    changed = {"METHOD_RANKS": {"lora": (8,)}, "TABLE": tmp_path / "grid.csv"}
    for name, value in changed.items():
        monkeypatch.setattr(grid, name, value)
    monkeypatch.setattr(grid, "TASKS", [replace(TASKS[0], powers=(0, 1))])
    monkeypatch.setattr(grid, "tried", lambda method, powers: {at(method, 8)})
    runs = Runs(finish=4)
    monkeypatch.setattr(grid, "train_runs", runs)
    with pytest.raises(RunStopped):
        grid.train(tmp_path / "runs", ["verbs"])
    assert not changed["TABLE"].exists()
    runs.finish = 100
    grid.train(tmp_path / "runs", ["verbs"])
    first, second = runs.asked
    assert len(first) == len(set(first)) == 2 * 3 + 3
    # what had finished is not trained again; what diverged is, as it has left nothing
    assert set(second) == set(first[4:]) | {name for name in first[:4] if "seed1" in name}
    table = grid.read_table()
    assert len(table) == 9
    diverged = table[table["seed"] == 1]
    assert diverged["validation"].isna().all()
    finished = table[table["seed"] != 1]
    assert (finished["validation"] == 0.5).all()
    full = finished[finished["steps"] == FULL]
    assert (full["test_rows"] == 4).all()
    assert (full["validation_rows"] == 2).all()
    assert finished[finished["steps"] < FULL]["test"].isna().all()
    # another rank is made later, and nothing again
    monkeypatch.setattr(grid, "METHOD_RANKS", {"lora": (8, 16)})
    grid.train(tmp_path / "runs", ["verbs"])
    assert {name.split("-")[0] for name in runs.asked[-1]} == {"r16"}
    assert len(grid.read_table()) == 15


def test_a_method_that_refuses_the_model_of_a_task_has_rows_without_scores(tmp_path, monkeypatch):
    changed = {"METHOD_RANKS": {"mos": (16,)}, "TABLE": tmp_path / "grid.csv"}
    for name, value in changed.items():
        monkeypatch.setattr(grid, name, value)
    monkeypatch.setattr(grid, "TASKS", [replace(TASKS[0], powers=(0, 1))])
    refused = {"seed0"}

    def runs(jobs, at_a_time):
        for job in jobs:
            name = job.log.stem
            if any(part in name for part in refused):
                job.error = InputError("r=16 is too large")
            else:
                job.error = Diverged("training diverged")
        return 0

    monkeypatch.setattr(grid, "train_runs", runs)
    with pytest.raises(RunStopped, match="r=16 is too large"):  # some are a fault of this machine
        grid.train(tmp_path / "runs", ["verbs"])
    assert not changed["TABLE"].exists()
    refused |= {"seed1", "seed2"}
    grid.train(tmp_path / "runs", ["verbs"])
    table = grid.read_table()
    assert len(table) == len(Unit(grid.TASKS[0], "mos", tmp_path, tmp_path).cells)
    assert not table.get("validation", pd.Series(dtype=float)).notna().any()
    grid.train(tmp_path / "runs", ["verbs"])  # nothing is left to do
