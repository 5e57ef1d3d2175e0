"""Locks: two processes never write to the folder of one run."""

import errno
import json
import math
import multiprocessing
import os
import signal
import socket
import time
from contextlib import contextmanager

import pytest
from training_fixtures import Finished, main, train

import petl
from petl.errors import InputError, JobSkipped
from petl.system import processes
from petl.system.processes import LOCK, claim, release, release_all
from petl.training import program as app
from petl.training.compose import compose
from petl.training.runs.resume import take_job
from petl.training.runs.run_folder import Run

pytest_plugins = ["training_fixtures"]

FORK = multiprocessing.get_context("fork")
COURSE = ["+method=lora", "train.save_steps=2"]


class Killed(BaseException):
    """Ends a run the way kill -9 does."""


@pytest.fixture(autouse=True)
def _leave_nothing_locked():
    yield
    release_all()


def hold(take, pipe):
    release_all()  # what the parent held is known here, but not held
    take()
    pipe.send("held")
    pipe.recv()


@contextmanager
def held_elsewhere(folder, take=claim):
    """Hold the folder in another process inside the block; yield the process."""
    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=hold, args=(lambda: take(folder), theirs))
    holder.start()
    try:
        assert ours.poll(120)
        yield holder
    finally:
        ours.send("enough")
        holder.join(120)


def test_a_folder_that_another_process_writes_is_refused_with_its_name(tmp_path):
    with held_elsewhere(tmp_path) as holder:
        with pytest.raises(InputError) as refusal:
            claim(tmp_path)
        said = f"is being written by process {holder.pid} on {socket.gethostname()}, since 2"
        assert said in str(refusal.value)
    claim(tmp_path)  # it has ended
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_kill_minus_nine_frees_the_folder_at_once(tmp_path):
    with held_elsewhere(tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        claim(tmp_path)


def hold_with_a_worker(folder, pipe):
    claim(folder)
    worker = os.fork()  # as a DataLoader's, which outlives a killed run by some seconds
    if worker:
        pipe.send(worker)
    time.sleep(120)


def test_a_forked_worker_does_not_keep_the_folder_of_a_dead_process(tmp_path):
    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=hold_with_a_worker, args=(tmp_path, theirs))
    holder.start()
    worker = ours.recv()
    try:
        with pytest.raises(InputError):
            claim(tmp_path)
        holder.kill()
        holder.join()
        os.kill(worker, 0)  # it lives
        claim(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_process_may_claim_its_folder_again_and_leave_it(tmp_path):
    claim(tmp_path)
    claim(tmp_path)
    release(tmp_path)
    with held_elsewhere(tmp_path), pytest.raises(InputError):
        claim(tmp_path)


@pytest.fixture
def stopped(tiny, tmp_path, monkeypatch):
    """The folder of a run killed at step 3, with a checkpoint at 2, and its overrides."""

    def kill(self, step, optimizer):
        if step == 3:
            raise Killed

    common = [*tiny.classify, *COURSE]
    with monkeypatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", kill)
        with pytest.raises(Killed):
            train([*common, f"train.output={tmp_path}"], tmp_path / "lora-path-files-1")
    release_all()
    return tmp_path / "lora-path-files-1", common


def test_a_run_that_trains_elsewhere_is_not_resumed(stopped):
    run, common = stopped
    before = (run / "metrics.jsonl").read_bytes()
    with held_elsewhere(run) as holder:
        for word in ("auto", run, run / "checkpoints" / "step-000002"):
            with pytest.raises(InputError, match=f"process {holder.pid} "):
                train([*common, f"train.resume={word}"], run)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train([*common, "train.resume=auto"], run).scores["steps"] == 4


def test_auto_skips_a_run_that_another_process_trains(stopped, tmp_path, petl_log):
    run, common = stopped
    cfg = compose([*common, f"train.output={tmp_path}", "train.resume=auto"])
    with held_elsewhere(run):
        main()(cfg)
    assert f"skipping {run}: " in petl_log.text
    assert "starting from step 0" in petl_log.text
    others = [path for path in tmp_path.glob("lora-*") if path != run]
    assert [Finished(path).scores["steps"] for path in others] == [4]


def test_of_two_runs_that_begin_at_once_in_a_folder_one_is_refused(tiny, tmp_path, monkeypatch):
    folder, begin = tmp_path / "run", Run.begin

    def late(self, model):  # another process takes the folder after this one has looked at it
        folder.mkdir()
        with held_elsewhere(folder):
            begin(self, model)

    monkeypatch.setattr(Run, "begin", late)
    with pytest.raises(InputError):
        train([*tiny.classify, "+method=lora"], folder)
    assert not (folder / "config.yaml").exists()


def test_a_folder_that_a_run_was_in_meanwhile_is_refused(tiny, tmp_path, monkeypatch):
    folder, begin = tmp_path / "run", Run.begin

    def late(self, model):
        folder.mkdir()
        (folder / "scores.json").write_text("{}")
        begin(self, model)

    monkeypatch.setattr(Run, "begin", late)
    with pytest.raises(InputError, match="exists already"):
        train([*tiny.classify, "+method=lora"], folder)


def test_bad_input_leaves_no_lock_behind(tiny, tmp_path):
    (tmp_path / "notes").write_text("keep me")
    with pytest.raises(InputError):
        train([*tiny.classify, "+method=lora"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "notes").unlink()
    claim(tmp_path)  # all that a run killed in its first moment leaves
    assert train([*tiny.classify, "+method=lora"], tmp_path).scores["steps"] == 4


def test_a_finished_job_leaves_its_folder_to_others(tmp_path):
    @app.job
    def main(cfg):
        claim(tmp_path)
        yield from ()  # a run yields its loops
        return 0.0

    main(None)
    with held_elsewhere(tmp_path) as holder:
        assert holder.is_alive()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, petl_log):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(processes.fcntl, "lockf", refuse)
    claim(tmp_path)
    assert f"the file system of {tmp_path} has no file locks" in petl_log.text


def test_a_job_of_a_sweep_has_one_worker_at_a_time(tmp_path):
    job = {"train.seed": 0}
    with held_elsewhere(tmp_path, lambda runs: take_job(runs, job)) as holder:
        with pytest.raises(JobSkipped, match=f"process {holder.pid} ") as other:
            take_job(tmp_path, job)
        assert math.isnan(other.value.objective)
        take_job(tmp_path, {"train.seed": 1})
    take_job(tmp_path, job)
