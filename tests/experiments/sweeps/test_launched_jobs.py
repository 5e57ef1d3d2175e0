"""Sweeps whose jobs run in processes of their own, through launchers of Hydra."""

import json
import logging
import re
import shutil
import subprocess
import sys

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from training_fixtures import OFFLINE, ROOT

from petl.errors import InputError, RunStopped
from petl.experiments.sweeps import launched_jobs
from petl.experiments.sweeps.launched_jobs import JobWatch, Worker
from petl.training import program as app

pytest_plugins = ["training_fixtures"]
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"


def config_of(folder, words=(), number=0, launcher=SUBMITIT):
    hydra = {
        "launcher": {"_target_": launcher},
        "sweep": {"dir": str(folder)},
        "job": {"num": number, "id": f"4711_{number}"},
        "overrides": {"task": list(words)},
    }
    return OmegaConf.create({"hydra": hydra})


@pytest.fixture
def restored():
    """The log handlers, streams and arguments that a worker replaces."""
    log = logging.getLogger("petl")
    kept = log.handlers, log.propagate, log.level, sys.excepthook, list(sys.argv)
    yield
    log.handlers, log.propagate, level, sys.excepthook, sys.argv[:] = kept
    log.setLevel(level)


def ended(error):
    job_return = JobReturn(status=JobStatus.FAILED)
    job_return.return_value = error
    return job_return


@pytest.mark.usefixtures("restored")
def test_a_job_has_a_log_of_its_own_and_its_error_is_one_line(tmp_path, monkeypatch, petl_log):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    words, streams = ["+method=lora", "train.lr=0.1"], (sys.stdout, sys.stderr)
    worker = Worker(config_of(tmp_path, words, 3), ["train.py", "-m", "train.lr=0.1,0.2"])
    logging.getLogger("petl").info("step 1/4")
    sys.stderr.write("a warning\n")
    assert sys.argv == ["train.py", "-m", "train.lr=0.1,0.2"]  # for how to resume
    job_return = ended(ZeroDivisionError("a bug"))
    worker.end(job_return)
    assert (sys.stdout, sys.stderr) == streams
    log = (tmp_path / "jobs" / "3.log").read_text()
    assert log.startswith("job 3 of the sweep: +method=lora train.lr=0.1\nstep 1/4\na warning\n")
    assert "ZeroDivisionError: a bug" in log
    record = json.loads((tmp_path / "jobs" / "3.json").read_text())
    assert record["overrides"] == words
    assert record["id"].startswith("4711_3 on ")
    assert record["result"] == "failed: ZeroDivisionError('a bug')"
    with pytest.raises(RunStopped):
        _ = job_return.return_value


@pytest.mark.usefixtures("restored")
def test_the_sweep_prints_what_becomes_of_each_job(tmp_path, monkeypatch, petl_log):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    monkeypatch.setattr(launched_jobs, "SECONDS", 60.0)
    monkeypatch.setattr(app, "log_to_stderr", lambda: None)
    swept = ["+method=lora,mola", "train.steps=4", "train.seed=choice(0,1)"]
    watch = JobWatch(config_of(tmp_path, swept))
    workers = [
        Worker(config_of(tmp_path, [f"+method={m}", "train.steps=4", "train.seed=1"], i), [])
        for i, m in enumerate(("lora", "mola"))
    ]
    watch.look()
    assert "job 1: +method=mola train.seed=1 (4711_1 on " in petl_log.text
    assert f"log: {tmp_path}/jobs/1.log" in petl_log.text
    workers[1].end(ended(InputError("r=-1 is not at least 1")))
    jobs = watch.stop()
    assert petl_log.text.count("job 1 failed: r=-1 is not at least 1\n") == 1
    assert "job 0 has not ended: it still runs, or was killed; its log: " in petl_log.text
    assert [job["overrides"][0] for job in jobs] == ["+method=lora", "+method=mola"]
    sys.stdout, sys.stderr = workers[0].streams


# A job is killed or has a bug where its learning rate asks for it
FAULTS = """
import os
from hydra.core.hydra_config import HydraConfig
import petl
after_step = petl.Lifecycle.after_step
def faulty(self, step, optimizer):
    if "train.lr=0.5" in HydraConfig.get().overrides.task:
        os.kill(os.getpid(), 9)
    after_step(self, step, optimizer)
petl.Lifecycle.after_step = faulty
"""


def sweep(folder, launcher, *words):
    """Run a sweep; return its exit status and what it printed."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    (folder / "faults.py").write_text(FAULTS)
    path = f"{ROOT}:{folder}"
    ran = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *words, f"hydra/launcher={launcher}"],
        cwd=folder,
        env={**OFFLINE, "PYTHONPATH": path, "PATH": str(shutil.which("env"))[: -len("/env")]},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return ran.returncode, ran.stderr


def jobs_of(said):
    """The log file of each job, as the sweep printed them."""
    return {int(n): log for n, log in re.findall(r"job (\d+): .*, log: (\S+)\)", said)}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_jobs_keep_their_lines_and_the_best_setting_over_seeds_is_named(launcher, tiny, tmp_path):
    words = [*tiny.classify, "train.eval_steps=2", "train.log_steps=2", "train.test=false"]
    status, said = sweep(tmp_path, launcher, *words, "+method=lora", "train.seed=0,1")
    assert status == 0, said
    for number, log in jobs_of(said).items():
        lines = (tmp_path / log).read_text()
        assert f"train.seed={number}" in lines
        assert "run folder: runs/lora-" in lines
        assert "step 2/4  loss " in lines
        assert re.search(rf"job {number} finished: accuracy \d\.\d+ in runs/lora-", said)
        assert f"job {number}: train.seed={number} (" in said
    assert sorted(jobs_of(said)) == [0, 1]
    assert "best setting (of 1): validation accuracy " in said
    assert "mean ± standard deviation over 2 seeds (0, 1)" in said


@pytest.mark.slow
def test_a_killed_job_is_named_and_leaves_no_traceback(tiny, tmp_path):
    words = [*tiny.classify, "train.eval_steps=2", "+method=lora", "imports=[faults]"]
    status, said = sweep(tmp_path, "submitit_local", *words, "train.lr=0.5,0.01")
    assert status == 1
    assert "Traceback" not in said
    assert "a job of the sweep ended without a result: Job " in said
    assert "job 0 has not ended: it still runs, or was killed; its log: " in said
    (log,) = [log for number, log in jobs_of(said).items() if number == 0]
    assert "run folder: runs/lora-" in (tmp_path / log).read_text()
