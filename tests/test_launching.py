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
# accelerators, as far as they are looked at here
DDP, FSDP2, ZERO = (SimpleNamespace(num_processes=2, is_fsdp2=is_it) for is_it in (0, 1, 0))
ZERO.deepspeed_engine_wrapped = None
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
        ({"name": "deepspeed"}, {"WORLD_SIZE": "1"}, "spreads the optimizer over processes"),
        ({"name": "deepspeed", "stage": 3}, {}, r"launch\.stage=3.*\+launch=fsdp cuts it up"),
        ({"name": "deepspeed", "stage": 0}, {}, r"launch\.stage=0 is not 1 or 2"),
        (
            {"name": "deepspeed"},
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "accelerate launch asks for ACCELERATE_DEEPSPEED_ZERO_STAGE=3",
        ),
    ],
)
def test_a_launch_that_cannot_be_is_refused(monkeypatch, launch, environment, said):
    monkeypatch.setattr("petl.launching.need_extra", lambda *words: None)  # as if installed
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        make_accelerator(read_launch({"launch": launch}), "no")


def test_deepspeed_that_is_not_installed_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("petl.extras.find_spec", lambda module: None)
    with pytest.raises(InputError, match=r"launch=deepspeed needs.*install -e '\.\[deepspeed\]'"):
        read_launch({"launch": {"name": "deepspeed"}})


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        ("sparse", {"total_step": 9}, "selection_algorithm='none'"),
        ("corda", {}, "launch it with ddp"),
        ("increlora", {}, "set restart_warmup=false"),
        ("lora", {"init_lora_weights": "pissa"}, "'pissa' needs the base model's weights whole"),
    ],
)
def test_a_method_that_cannot_be_sharded_is_refused_before_training(method, fields, said):
    config = petl.build_config(method, **fields)
    with pytest.raises(InputError, match=f"launch=fsdp is not possible: .*{said}"):
        refuse_sharding(config, TrainConfig(), TASK, None, FSDP2)
    refuse_sharding(config, TrainConfig(), TASK, None, DDP)


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        ("sparse", {"total_step": 9}, "selection_algorithm='none'"),
        ("adalora", {"total_step": 9}, "launch it with ddp"),
        ("increlora", {}, "set restart_warmup=false"),
    ],
)
def test_a_method_that_zero_cannot_train_is_refused_before_training(method, fields, said):
    config = petl.build_config(method, **fields)
    with pytest.raises(InputError, match=f"launch=deepspeed is not possible: .*{said}"):
        refuse_sharding(config, TrainConfig(), TASK, None, ZERO)


def test_zero_takes_what_needs_whole_weights():
    config = petl.build_config("lora", init_lora_weights="pissa")
    refuse_sharding(config, TrainConfig(find_lr=True), TASK, "bnb_4bit", ZERO)


@pytest.mark.parametrize("several", [DDP, FSDP2, ZERO])
def test_weights_of_torchao_are_refused_on_several_processes(several):
    config = petl.build_config("lora")
    with pytest.raises(InputError, match=r"torchao_int8 can neither be sent.*or one process"):
        refuse_sharding(config, TrainConfig(), TASK, "torchao_int8", several)
    refuse_sharding(
        config, TrainConfig(), TASK, "torchao_int8", SimpleNamespace(num_processes=1, is_fsdp2=0)
    )


def test_what_a_sharded_run_leaves_out_is_refused():
    config, sharded = petl.build_config("lora"), FSDP2
    with pytest.raises(InputError, match=r"model\.quantization=bnb_4bit are not cut up"):
        refuse_sharding(config, TrainConfig(), TASK, "bnb_4bit", sharded)
    with pytest.raises(InputError, match="find the rate with launch=ddp first"):
        refuse_sharding(config, TrainConfig(find_lr=True), TASK, None, sharded)
    with pytest.raises(InputError, match=r"data\.generate makes as many passes"):
        refuse_sharding(config, TrainConfig(), CausalLM(8, chat=True, generate=4), None, sharded)


def test_a_run_may_go_on_with_another_launch():
    config = {"method": {"name": "lora"}, "launch": {"name": "fsdp"}, "train": {"lr": 1.0}}
    assert identity(config) == identity({**config, "launch": {"name": "ddp"}})
