"""Groups of runs: what a caller decides between steps, and what a kill leaves."""

import inspect
import json
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_fixtures import drawing_once, main, train_until_killed

from petl.cli.train import train
from petl.system.processes import release_all
from petl.system.settings.command_line import as_run
from petl.training.compose import compose
from petl.training.distributed import precision, trial
from petl.training.loop import Loop
from petl.training.together.runs import RunGroup, RunJob

pytest_plugins = ["training_fixtures"]


def jobs_of(data: list[str], folder: Path, count: int, *words: str) -> list[RunJob]:
    """Runs that differ in the seed; batches of several widths."""
    folder.mkdir(exist_ok=True)
    jobs = []
    for seed in range(count):
        own = ["+method=lora", f"train.seed={seed}", *data]
        own += ["train.steps=8", "train.log_steps=1", "train.score_before=false", *words]
        own += [f"train.run={folder / str(seed)}", "train.resume=auto"]
        log = folder / f"{seed}.log"
        jobs.append(RunJob(own, partial(compose, own), log, inspect.unwrap(train)))
    return jobs


def results(run: Path):
    """The losses and the tensors of a finished run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    return [line["loss"] for line in lines], {name: t.tolist() for name, t in weights.items()}


def finished(jobs: list[RunJob], together: int) -> list[Path]:
    """Make runs to their ends; return their folders."""
    group = RunGroup(jobs, together)
    with drawing_once():
        while group.step():
            pass
    assert [job.error for job in jobs] == [None] * len(jobs), jobs[0].log.read_text()
    return [job.run.path for job in jobs]


@pytest.mark.thorough
def test_runs_can_be_stopped_or_dropped_between_steps_and_go_on_later(tiny, tmp_path):
    data, alone = tiny.steady, []
    for seed, job in enumerate(jobs_of(data, tmp_path / "alone", 3)):
        main()(compose(job.words))
        alone.append(tmp_path / "alone" / str(seed))
    jobs = jobs_of(data, tmp_path / "several", 3)
    group = RunGroup(jobs, 3)
    with drawing_once():
        for _ in range(3):
            assert group.step()
        group.stop(jobs[1])
        group.drop(jobs[2])
        assert group.live == [jobs[0]]
        while group.step():
            pass
    kept, stopped, dropped = (job.run.path for job in jobs)
    losses = [results(run)[0] for run in alone]
    assert results(kept)[0] == pytest.approx(losses[0], rel=1e-5)
    assert json.loads((stopped / "scores.json").read_text())["steps"] == 3
    assert results(stopped)[0] == pytest.approx(losses[1][:3], rel=1e-5)
    assert not (dropped / "adapter").exists()
    assert "dropped after step 3" in jobs[2].log.read_text()
    later = jobs_of(data, tmp_path / "several", 3)[2]
    assert results(finished([later], 1)[0])[0] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("written", [pytest.param(3, marks=pytest.mark.thorough), 4])
def test_a_group_killed_while_it_writes_goes_on_from_one_step_to_the_bit(
    tiny, tmp_path, monkeypatch, written
):
    """Before any run has the second checkpoint of the group, or when one of two has it."""
    words = ["method.lora_dropout=0.1", "train.save_steps=3"]  # the base has dropout, too
    whole = finished(jobs_of(tiny.classify, tmp_path / "whole", 2, *words), 2)
    jobs, save, saved = jobs_of(tiny.classify, tmp_path / "killed", 2, *words), Loop.save, []

    class Killed(BaseException):
        """In place of SIGKILL."""

    def saving(loop):
        saved.append(loop)
        if len(saved) == written:
            raise Killed
        save(loop)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", saving)
        group = RunGroup(jobs, 2)
        for _ in range(5):
            assert group.step()
        with pytest.raises(Killed):
            group.step()
    for job in jobs:  # locks, which end with a process
        with as_run(job.words):
            release_all()
    resumed = finished(jobs_of(tiny.classify, tmp_path / "killed", 2, *words), 2)
    for one, other in zip(resumed, whole, strict=True):
        assert results(one) == results(other)


def test_runs_of_one_computed_precision_share_passes_whatever_the_setting(tiny, tmp_path):
    words = ["train.precision=auto", "train.precision=no", "model.dtype=bfloat16"]
    jobs = [
        job
        for i, word in enumerate(words)
        for job in jobs_of(tiny.steady, tmp_path / str(i), 1, word)
    ]
    assert [job.precision for job in jobs] == ["no", "no", "bf16"]
    (wrong,) = jobs_of(tiny.steady, tmp_path / "wrong", 1, "train.lr=-1")
    assert not RunGroup([wrong], 1).waiting  # it has ended, before anything is loaded
    assert "train.lr=-1.0" in wrong.log.read_text()


@pytest.mark.thorough
def test_a_run_that_goes_on_keeps_its_precision_among_runs_that_begin(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(precision, "NARROW", 1)
    monkeypatch.setattr(precision, "bf16_units", lambda _: "AMX")
    share = {"is": 0.5}  # of float32's time, on the machine
    monkeypatch.setattr(trial, "share_of_float32", lambda *_: share["is"])
    words = ("train.precision=auto", "train.save_steps=2")
    (job,) = jobs_of(tiny.steady, tmp_path / "straight", 1, *words)
    main()(compose(job.words))
    (job,) = jobs_of(tiny.steady, tmp_path / "runs", 1, *words)
    train_until_killed(job.words, tmp_path / "runs" / "0", 5)
    release_all()
    share["is"] = 2.0  # and now on another
    jobs = jobs_of(tiny.steady, tmp_path / "runs", 2, *words)
    assert [job.precision for job in jobs] == ["bf16", "no"]
    runs = finished(jobs, 2)
    assert results(runs[0]) == results(tmp_path / "straight" / "0")
