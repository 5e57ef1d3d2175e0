"""Runs of train.py with `+launch=...`, started as a user starts them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import Finished, launch, tiny, train

import petl
from petl.errors import InputError
from petl.launching import make_accelerator, read_launch, refuse_sharding
from petl.resume import identity
from petl.settings import TrainConfig
from petl.tasks import CausalLM

__all__ = ["tiny"]
TASK = CausalLM(max_length=8)
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


@pytest.mark.parametrize(
    "method",
    [
        ["+method=mola", "method.router_aux_loss_coef=0"],
        pytest.param(["+method=corda", "method.r=4"], marks=pytest.mark.slow),
        pytest.param(
            [
                *("+method=sparse", "method.selection_algorithm=sm3", "method.density=0.1"),
                *("method.reselection_steps=2", "method.selection_accumulation_steps=1"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda overrides: overrides[0].removeprefix("+method="),
)
def test_a_sharded_run_equals_one_process(tiny, tmp_path, method):
    common = [*tiny.steady, *method, f"train.lr={LR}", "train.log_steps=1", *EVALUATED]
    common += ["train.batch_size=7", "train.micro_batch_size=2"]
    one = train(common, tmp_path / "one")
    ran = launch([*common, "+launch=fsdp", f"train.run={tmp_path}/two"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    two = Finished(tmp_path / "two")
    assert json.loads((two.path / "environment.json").read_text())["processes"] == 2
    assert_same_run(one, two)


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint_to_the_digit(tiny, tmp_path):
    common = [*tiny.classify, "+method=increlora", "+loss=density", f"train.lr={LR}"]
    common += ["method.tinit=1", "method.deltaT=1"]
    common += [
        "train.save_steps=2",
        "train.log_steps=1",
        "train.steps=6",
        "train.max_grad_norm=null",
    ]
    straight = Finished(tmp_path / "run")
    ran = launch([*common, "+launch=fsdp", f"train.run={straight.path}"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    # as if stopped after step 4; data parallelism takes the same checkpoint
    for kind in ("fsdp", "ddp"):
        stopped = Finished(shutil.copytree(straight.path, tmp_path / kind))
        shutil.rmtree(stopped.path / "checkpoints" / "step-000006")
        shutil.rmtree(stopped.path / "adapter")
        (stopped.path / "scores.json").unlink()
        again = [*common, f"train.resume={stopped.path}", f"+launch={kind}"]
        ran = launch(again, tmp_path, processes=2)
        assert ran.returncode == 0, ran.stderr
        near = 0.0 if kind == "fsdp" else LR / 10
        assert stopped.adapter.keys() == straight.adapter.keys()
        for name, tensor in straight.adapter.items():
            torch.testing.assert_close(stopped.adapter[name], tensor, atol=near, rtol=0, msg=name)
        losses = [[m["loss"] for m in run.metrics] for run in (straight, stopped)]
        assert losses[0] == pytest.approx(losses[1], abs=near, rel=0)
    ranks = [tensor for name, tensor in straight.adapter.items() if name.endswith(".rank")]
    assert sum(map(int, ranks)) > len(ranks), "no rank has grown"


@pytest.mark.parametrize(
    ("launch", "environment", "said"),
    [
        ({"name": "zero"}, {}, "no launch 'zero'; there are ddp, deepspeed, fsdp"),
        ({"name": "ddp", "stage": 3}, {}, "no setting launch.stage"),
        ({"name": "fsdp"}, {"WORLD_SIZE": "1"}, "spreads the model over processes"),
        ({"name": "ddp"}, {"ACCELERATE_USE_FSDP": "true"}, r"asks for fsdp.*\+launch=fsdp"),
        ({"name": "deepspeed"}, {"WORLD_SIZE": "2"}, r"use \+launch=fsdp"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(monkeypatch, launch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        make_accelerator(read_launch({"launch": launch}), "no")


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        ("adalora", {"total_step": 9}, "launch it with ddp"),
        ("lora", {"init_lora_weights": "pissa"}, "'pissa' needs the base model's weights whole"),
    ],
)
def test_a_method_that_cannot_be_sharded_is_refused_before_training(method, fields, said):
    config, sharded = petl.build_config(method, **fields), SimpleNamespace(is_fsdp2=True)
    with pytest.raises(InputError, match=f"launch=fsdp is not possible: .*{said}"):
        refuse_sharding(config, TrainConfig(), TASK, None, sharded)
    refuse_sharding(config, TrainConfig(), TASK, None, SimpleNamespace(is_fsdp2=False))


def test_what_a_sharded_run_leaves_out_is_refused():
    config, sharded = petl.build_config("lora"), SimpleNamespace(is_fsdp2=True)
    with pytest.raises(InputError, match=r"model\.quantization=bnb_4bit are not cut up"):
        refuse_sharding(config, TrainConfig(), TASK, "bnb_4bit", sharded)
    with pytest.raises(InputError, match="find the rate with launch=ddp first"):
        refuse_sharding(config, TrainConfig(find_lr=True), TASK, None, sharded)
    with pytest.raises(InputError, match=r"data\.generate makes as many passes"):
        refuse_sharding(config, TrainConfig(), CausalLM(8, chat=True, generate=4), None, sharded)


def test_a_run_may_go_on_with_another_launch():
    config = {"method": {"name": "lora"}, "launch": {"name": "fsdp"}, "train": {"lr": 1.0}}
    assert identity(config) == identity({**config, "launch": {"name": "ddp"}})
