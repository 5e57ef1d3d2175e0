"""Runs of train.py with `+launch=...`, started as a user starts them."""

import json

import pytest
import torch
from training_fixtures import Finished, launch, tiny, train

__all__ = ["tiny"]
LR = 1e-2
EVALUATED = ["train.eval_steps=2", "train.save_steps=2", "train.eval_batch_size=3"]


def assert_same_run(one: Finished, other: Finished) -> None:
    """The same adapter but for rounding, which AdamW may blow up to a share of a step."""
    assert one.adapter.keys() == other.adapter.keys()
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(other.adapter[name], tensor, atol=LR / 10, rtol=0, msg=name)
    assert one.checkpoints == other.checkpoints
    for mine, others in zip(one.metrics, other.metrics, strict=True):
        assert mine["step"] == others["step"]
        if "loss" in mine:
            assert others["loss"] == pytest.approx(mine["loss"], abs=1e-3)
            assert others["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-2)
    for key in ("before", "after"):
        assert other.scores[key] == pytest.approx(one.scores[key], abs=1e-3)
    for key in ("trainable_parameters", "adapter_parameters", "adapter_bytes", "best_step"):
        assert one.scores[key] == other.scores[key]


def test_a_sharded_run_equals_one_process(tiny, tmp_path):
    common = [*tiny.steady, "+method=mola", f"train.lr={LR}", "train.log_steps=1", *EVALUATED]
    common += ["train.batch_size=7", "train.micro_batch_size=2", "method.router_aux_loss_coef=0"]
    one = train(common, tmp_path / "one")
    ran = launch([*common, "+launch=fsdp", f"train.run={tmp_path}/two"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    two = Finished(tmp_path / "two")
    assert json.loads((two.path / "environment.json").read_text())["processes"] == 2
    assert_same_run(one, two)


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint_to_the_digit(tiny, tmp_path):
    common = [*tiny.classify, "+method=increlora", "+loss=density", f"train.lr={LR}"]
    common += ["method.restart_warmup=false", "method.tinit=1", "method.deltaT=1"]
    common += ["train.save_steps=2", "train.log_steps=1", "train.steps=6", "train.max_grad_norm=null"]
    straight = Finished(tmp_path / "run")
    ran = launch([*common, "+launch=fsdp", f"train.run={straight.path}"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    adapter, metrics = straight.adapter, straight.metrics
    again = [*common, f"train.resume={straight.path}/checkpoints/step-000004"]
    ran = launch([*again, "+launch=fsdp"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    for name, tensor in adapter.items():
        assert torch.equal(tensor, straight.adapter[name]), name
    assert [m["loss"] for m in straight.metrics] == [m["loss"] for m in metrics]
    # data parallelism takes the same checkpoint
    ran = launch([*again, "+launch=ddp"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    for name, tensor in adapter.items():
        torch.testing.assert_close(straight.adapter[name], tensor, atol=LR / 10, rtol=0, msg=name)
