"""Sweeps with `train.together`: the runs of a sweep in one pass over one base."""

import json
import os
import signal

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from training_fixtures import launch, main

import petl
from petl.efficiency.together.group import AdapterGroup
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]
GRID = ["-m", "+method=lora,mola", "train.lr=0.001,0.01", "train.together=4"]
HELD_OUT = ["train.eval_steps=4", "train.test=false"]
KILL = """
import os, signal, petl
after_step = petl.Lifecycle.after_step
def killed(self, step, optimizer):
    if step == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    after_step(self, step, optimizer)
petl.Lifecycle.after_step = killed
"""
TIMES = {"seconds"}


@pytest.fixture
def sizes(monkeypatch):
    """The number of runs in each pass."""
    counted, losses = [], AdapterGroup.losses

    def counting(self, batches):
        counted.append(len(batches))
        return losses(self, batches)

    monkeypatch.setattr(AdapterGroup, "losses", counting)
    return counted


def folders(folder):
    """The folders of the finished runs by method and rate."""
    found = {}
    for run in (adapter.parent for adapter in folder.glob("runs/*/adapter")):
        rate = json.loads((run / "scores.json").read_text())["lr"]
        found[run.name.partition("-")[0], rate] = run
    return found


def assert_equal_adapters(one, other):
    """The adapters of two runs have the same tensors, but for rounding."""
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-5, rtol=1e-4)


@pytest.mark.thorough
def test_each_run_is_the_one_that_it_would_be_alone(program, tiny, tmp_path, sizes):
    said = program(*GRID, *tiny.steady, *HELD_OUT)
    runs = folders(tmp_path)
    assert len(runs) == 4
    assert sizes == [2] * 8  # a pass for each step and method
    assert said.count(" finished: accuracy") == 4
    assert "best setting (of 4): " in said
    for (method, rate), run in runs.items():
        alone = tmp_path / "alone" / run.name
        words = [f"+method={method}", f"train.lr={rate}", *tiny.steady, *HELD_OUT]
        main()(compose([*words, f"train.run={alone}"]))
        assert_equal_adapters(run, alone)
        told = json.loads((run / "environment.json").read_text())["command"]
        assert f"+method={method} train.lr={rate} " in told


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("key", "values"),
    [
        pytest.param("train.precision", "bf16,no", marks=pytest.mark.thorough),
        # the second run changes weights of its base, before or while it trains
        ("method.init_lora_weights", "true,pissa"),
    ],
)
def test_runs_that_differ_are_those_that_they_would_be_alone(program, tiny, tmp_path, key, values):
    program("-m", "+method=lora", f"++{key}={values}", "train.together=2", *tiny.steady, *HELD_OUT)
    runs = [adapter.parent for adapter in tmp_path.glob("runs/*/adapter")]
    assert len(runs) == 2
    for run in runs:
        value = OmegaConf.select(OmegaConf.load(run / "config.yaml"), key)
        alone = tmp_path / "alone" / str(value)
        words = ["+method=lora", f"++{key}={value}", *tiny.steady, *HELD_OUT]
        main()(compose([*words, f"train.run={alone}"]))
        assert_equal_adapters(run, alone)


@pytest.mark.thorough
def test_a_run_that_fails_ends_no_other_and_finished_ones_are_skipped(program, tiny, tmp_path):
    words = ["-m", "+method=lora", *tiny.steady, *HELD_OUT, "train.together=2", "train.resume=auto"]
    said = program(*words, "method.r=2,-1", status=1)
    assert "job 1 failed: " in said
    assert "method.r=-1" in said
    assert len(folders(tmp_path)) == 1
    said = program(*words, "method.r=2,3")
    assert len(list(tmp_path.glob("runs/*/scores.json"))) == 2
    assert "best setting (of 2): " in said


@pytest.mark.thorough
def test_a_terminated_sweep_resumes(program, tiny, tmp_path, monkeypatch):
    words = [*GRID, *tiny.steady, *HELD_OUT, "train.resume=auto"]

    def terminated(self, step, optimizer):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", terminated)
        said = program(*words, status=143)
    assert "terminated; to resume the sweep: " in said
    assert "Traceback" not in said
    assert not folders(tmp_path)
    assert len(list(tmp_path.glob("runs/*/checkpoints/step-*"))) == 4
    program(*words)
    assert len(folders(tmp_path)) == 4
    assert len(list(tmp_path.glob("runs/*/config.yaml"))) == 4  # the same runs, resumed


@pytest.mark.thorough
def test_trials_of_optuna_train_together(program, tiny, tmp_path, sizes):
    pytest.importorskip("optuna")
    words = [*tiny.steady, "+search=lora", "train.eval_steps=4", "hydra.sweeper.n_trials=2"]
    said = program(*words, "train.together=2", status=2)
    assert "Optuna proposes hydra.sweeper.n_jobs=1 runs at a time" in said
    program(*words, "train.together=2", "hydra.sweeper.n_jobs=2", "method.r=choice(2,4)")
    assert sizes == [2] * 4
    assert len(list(tmp_path.glob("runs/*/scores.json"))) == 2


@pytest.mark.thorough
def test_what_cannot_train_together_is_refused(program, tiny, monkeypatch):
    assert "it is for sweeps (petl train -m)" in program(
        "+method=lora", *tiny.steady, "train.together=2", status=2
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2: train.together=4 needs one process" in program(
        *GRID, *tiny.steady, status=2
    )


def results(folder):
    """By seed, the lines of metrics.jsonl and the tensors of each run, without times."""
    found = {}
    for run in (adapter.parent for adapter in folder.glob("runs/*/adapter")):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        weights = load_file(run / "adapter" / "adapter_model.safetensors")
        seed = json.loads((run / "environment.json").read_text())["seed"]
        found[seed] = kept, {name: tensor.tolist() for name, tensor in weights.items()}
    return found


@pytest.mark.thorough
def test_a_killed_sweep_goes_on_with_the_same_random_numbers(tiny, tmp_path):
    """Dropout in the base and in the adapters; batches of several widths; killed at step 20."""
    words = ["-m", "+method=lora", "method.lora_dropout=0.1", "train.seed=0,1,2"]
    words += [*tiny.classify, "train.steps=24", "train.save_steps=6", "train.log_steps=1"]
    words += ["train.together=2", "train.resume=auto", "train.score_before=false"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    assert launch(words, killed, code=KILL).returncode == -9
    assert not results(killed)
    for folder in (killed, whole):
        done = launch(words, folder)
        assert done.returncode == 0, done.stderr
    found, expected = results(killed), results(whole)
    assert found.keys() == expected.keys() == {0, 1, 2}
    for seed, (lines, weights) in expected.items():
        assert len(lines) == 24
        assert found[seed][0] == lines
        assert found[seed][1] == weights
