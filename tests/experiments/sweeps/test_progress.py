"""What a sweep says of its runs while it makes them."""

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from petl.experiments.sweeps import progress
from petl.experiments.sweeps.progress import SweepProgress


def config_of(words, params=None):
    hydra = {"overrides": {"task": words}, "sweeper": {"_target_": "basic", "params": params}}
    return OmegaConf.create({"hydra": hydra})


@pytest.fixture(autouse=True)
def no_optuna(monkeypatch):
    monkeypatch.setattr(progress, "is_optuna", lambda: False)


@pytest.mark.parametrize(
    ("words", "params", "count"),
    [
        (["+method=lora,mola", "train.seed=0,1,2", "train.steps=3"], None, 6),
        (["+method=lora", "train.seed=range(4)"], None, 4),
        (["+method=lora"], {"train.lr": "1e-3,1e-2"}, 2),
        (["+method=glob(*)"], None, None),
    ],
)
def test_the_number_of_runs_is_known_where_values_are_listed(words, params, count):
    assert progress.count_runs(config_of(words, params)) == count


def test_each_run_is_announced_and_its_end_said(caplog, monkeypatch):
    caplog.set_level("INFO", logger="petl")
    monkeypatch.setattr("petl.experiments.sweeps.launched_jobs.described", lambda cfg: f"at {cfg}")
    monkeypatch.setattr(progress, "how_to_resume_sweep", lambda: "to resume the sweep: LINE")
    sweep = SweepProgress(config_of(["+method=lora", "train.seed=0,1,2"]))
    for seed, status in ((0, JobStatus.COMPLETED), (1, JobStatus.FAILED)):
        sweep.start(config_of(["+method=lora", f"train.seed={seed}"]))
        job = JobReturn(cfg="runs/a")
        job.status = status
        sweep.end(job)
    sweep.close()
    said = caplog.text
    assert "sweep: 3 runs" in said
    assert "[1/3] started: train.seed=0\n" in said
    assert "[1/3] at runs/a; 2 left, about " in said
    assert "[2/3] failed, see above; 1 left" in said
    assert "1 of 2 runs failed; to resume the sweep: LINE" in said
