"""`train.precision=auto`: a run keeps the arithmetic that it began with, on any machine."""

import pytest
import torch
from omegaconf import OmegaConf
from training_fixtures import Finished, launch, train, train_until_killed

from petl.adapters.export.saved_adapter import find
from petl.training.compose import compose
from petl.training.distributed import precision, trial
from petl.training.runs.resume import finished_run, identity, identity_of
from petl.training.runs.run_config import read_config

pytest_plugins = ["training_fixtures"]
COMMON = ["+method=lora", "method.lora_dropout=0.2", "train.steps=14", "train.save_steps=3"]
AUTO = "train.precision=auto"


def assert_equal_runs(one: Finished, other: Finished) -> None:
    """The same adapters and scores, bit by bit."""
    assert one.adapter.keys() == other.adapter.keys()
    for name, tensor in one.adapter.items():
        assert torch.equal(tensor, other.adapter[name]), name
    assert one.scores["after"] == other.scores["after"]


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one that has fast bfloat16 products in hardware, or has not."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(precision, "NARROW", 1)
    monkeypatch.setattr(trial, "share_of_float32", lambda width, device: 0.7)

    def make(*, has_bf16: bool) -> None:
        monkeypatch.setattr(precision, "bf16_units", lambda _: "AMX" if has_bf16 else "")

    return make


def stored(folder) -> str:
    return OmegaConf.load(folder / "config.yaml").train.precision


@pytest.mark.thorough
@pytest.mark.parametrize("began", ["bf16", pytest.param("no", marks=pytest.mark.thorough)])
def test_a_run_resumes_as_it_began_on_a_machine_for_which_auto_is_another_precision(
    tiny, tmp_path, petl_log, machine, began
):
    straight = train([*tiny.classify, *COMMON, f"train.precision={began}"], tmp_path / "straight")
    common, run = [*tiny.classify, *COMMON, AUTO], tmp_path / "run"
    machine(has_bf16=began == "bf16")
    train_until_killed(common, run, 11)
    assert stored(run) == began  # what was chosen, not the word
    machine(has_bf16=began == "no")
    petl_log.clear()
    resumed = train([*common, "train.resume=auto"], run)
    assert_equal_runs(straight, resumed)
    assert stored(run) == began
    said = {"bf16": "bf16 (cpu has no products in bfloat16", "no": "float32 (cpu has AMX"}
    assert f"train.precision=auto: {said[began]}" in petl_log.text
    assert "of float32's time), as this run began" in petl_log.text or began == "bf16"


@pytest.mark.thorough
def test_auto_computes_as_the_precision_that_it_chooses(tiny, tmp_path, machine, monkeypatch):
    seen = set()
    linear = torch.nn.functional.linear

    def watched(x, weight, *others):
        y = linear(x, weight, *others)
        seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    common = [*tiny.classify, "+method=mola", "train.steps=1"]
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        machine(has_bf16=has_bf16)
        seen.clear()
        train([*common, AUTO], tmp_path / str(dtype))
        assert (torch.bfloat16 in seen) is has_bf16


@pytest.mark.thorough
def test_a_job_of_a_sweep_is_finished_whatever_auto_was(tiny, tmp_path, machine):
    common = [*tiny.classify, "+method=lora", "train.steps=1", AUTO]
    machine(has_bf16=True)
    run = train(common, tmp_path / "runs" / "run").path
    machine(has_bf16=False)
    words = [*common, f"train.run={run}"]
    now = identity(read_config(compose(words)).resolved)
    assert finished_run(str(tmp_path / "runs"), now) == run
    other = identity(read_config(compose([*words, "train.precision=no"])).resolved)
    assert identity_of(run) != other
    assert finished_run(str(tmp_path / "runs"), other) is None


@pytest.mark.thorough
def test_a_folder_without_checkpoint_starts_again_with_the_precision_of_this_machine(
    tiny, tmp_path, machine
):
    common, run = [*tiny.classify, *COMMON, AUTO], tmp_path / "run"
    machine(has_bf16=True)
    train_until_killed(common, run, 2)  # before the first checkpoint
    machine(has_bf16=False)
    train([*common, "train.resume=auto"], run)
    assert stored(run) == "no"


OTHER_BY_RANK = """
import os
from petl.training.distributed import precision
precision.automatic = lambda source, float32="": "no" if os.environ["RANK"] == "1" else "bf16"
"""


@pytest.mark.thorough
def test_processes_that_would_choose_otherwise_have_the_precision_of_the_first(tiny, tmp_path):
    common = [*tiny.steady, "+method=lora", "train.steps=2", "train.log_steps=1"]
    one, two = (tmp_path / name for name in ("one", "two"))
    ran = launch([*common, AUTO, f"train.run={one}"], tmp_path, processes=2, code=OTHER_BY_RANK)
    assert ran.returncode == 0, ran.stderr
    ran = launch([*common, "train.precision=bf16", f"train.run={two}"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    assert stored(one) == "bf16"
    assert_equal_runs(Finished(two), Finished(one))


def test_a_run_from_before_the_setting_is_scored_in_float32(tiny, tmp_path, machine):
    short = ["+method=lora", "train.steps=1", "train.precision=no"]
    run = train([*tiny.classify, *short], tmp_path / "run").path
    kept = OmegaConf.load(run / "config.yaml")
    del kept.train.precision
    OmegaConf.save(kept, run / "config.yaml")
    machine(has_bf16=True)
    assert find(run).precision == "no"
