"""Runs of train.py with `+launch=...`, started as a user starts them."""

import json
from types import SimpleNamespace

import pytest
from launched_runs import EVALUATED, LR, assert_same_run
from training_fixtures import (
    Finished,
    assert_same_course,
    launch,
    stopped_before,
    train,
)

from petl.errors import InputError
from petl.training.distributed.launch import make_accelerator, read_launch
from petl.training.runs.resume import identity

pytest_plugins = ["task_fixtures", "training_fixtures"]
# accelerators, as far as they are looked at here
DDP, FSDP2, ZERO = (SimpleNamespace(num_processes=2, is_fsdp2=is_it) for is_it in (0, 1, 0))
ZERO.deepspeed_engine_wrapped = None


@pytest.mark.thorough
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
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_a_sharded_run_finds_the_rate_and_writes_the_answers_of_one_process(
    families, task, tmp_path
):
    common = families(task, "+method=increlora", "method.tinit=1", "method.deltaT=1")
    common += ["method.top_h=99", "train.find_lr=true", "train.find_lr_steps=20"]
    common += ["data.test_rows=7", "train.eval_batch_size=3"]  # one process has a batch less
    one = train(common, tmp_path / "one")
    ran = launch([*common, "+launch=fsdp", f"train.run={tmp_path}/two"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    two = Finished(tmp_path / "two")
    tests = [json.loads((run.path / "lr_range.json").read_text()) for run in (one, two)]
    assert tests[1]["losses"] == pytest.approx(tests[0]["losses"], abs=1e-3)
    assert two.scores["lr"] == pytest.approx(one.scores["lr"])
    for key in ("before", "after"):
        assert {"exact_match", "rouge1"} <= one.scores[key].keys()
        assert two.scores[key] == pytest.approx(one.scores[key], abs=1e-2)
    losses = [[line["loss"] for line in run.metrics if "loss" in line] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)
    assert not list(two.path.rglob(".unfinished*"))


@pytest.mark.slow
def test_a_sharded_run_resumes_from_its_checkpoint_bit_exactly(tiny, tmp_path):
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
        stopped = stopped_before(straight, tmp_path / kind, "step-000006")
        again = [*common, f"train.resume={stopped.path}", f"+launch={kind}"]
        ran = launch(again, tmp_path, processes=2)
        assert ran.returncode == 0, ran.stderr
        assert_same_course(stopped, straight, atol=0.0 if kind == "fsdp" else LR / 10)
    ranks = [tensor for name, tensor in straight.adapter.items() if name.endswith(".rank")]
    assert sum(map(int, ranks)) > len(ranks), "no rank has grown"


@pytest.mark.parametrize(
    ("launch", "environment", "said"),
    [
        ({"name": "ddp"}, {"ACCELERATE_USE_FSDP": "true"}, r"is set up for fsdp.*\+launch=fsdp"),
        ({"name": "deepspeed"}, {"WORLD_SIZE": "1"}, "shards the optimizer state"),
        ({"name": "deepspeed", "stage": 3}, {}, r"launch\.stage=3.*\+launch=fsdp"),
        ({"name": "deepspeed", "stage": 0}, {}, r"launch\.stage=0 is not 1 or 2"),
        (
            {"name": "deepspeed"},
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "accelerate launch sets ACCELERATE_DEEPSPEED_ZERO_STAGE=3",
        ),
    ],
)
def test_a_launch_that_cannot_be_is_refused(monkeypatch, launch, environment, said):
    monkeypatch.setattr(
        "petl.training.distributed.launch.need_extra", lambda *words: None
    )  # as if installed
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        make_accelerator(read_launch(launch), "no")


def test_deepspeed_that_is_not_installed_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("petl.system.imports.extras.find_spec", lambda module: None)
    with pytest.raises(InputError, match=r"\[deepspeed\]"):
        read_launch({"name": "deepspeed"})


def test_a_run_may_go_on_with_another_launch():
    config = {"method": {"name": "lora"}, "launch": {"name": "fsdp"}, "train": {"lr": 1.0}}
    assert identity(config) == identity({**config, "launch": {"name": "ddp"}})
