"""DeepSpeed's ZeRO: shares and wholes, and runs of train.py where it is installed."""

import json
import re
import subprocess
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from kept_processes import in_processes
from launched_runs import EVALUATED, LR, assert_same_run
from torch import Tensor, distributed, nn
from training_fixtures import (
    Finished,
    assert_same_course,
    launch,
    stopped_before,
    train,
)

from petl.training.distributed.deepspeed import FlatGroup

pytest_plugins = ["training_fixtures"]
PADDING = 64  # numbers, of a process's shares of all groups
GROWING = ["+method=increlora", "method.restart_warmup=false", "method.tinit=1", "method.deltaT=1"]


def there_and_back() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """In one of two processes: by tensor, the state behind a share; and the share's state again."""
    buffer = torch.arange(8.0)  # of a matrix, a vector, a number, and one that fills up the shares
    tensors = [nn.Parameter(part) for part in (buffer[:4].view(2, 2), buffer[4:6], buffer[6])]
    share = nn.Parameter(buffer.chunk(2)[distributed.get_rank()].clone())
    flat = FlatGroup(tensors, buffer, share)
    assert flat.gather({}) == flat.scatter({}) == {}, "before the first step"
    state = flat.gather({"step": torch.tensor(3.0), "exp_avg": 10 * share.detach()})
    return [state[tensor] for tensor in tensors], flat.scatter(state)


@pytest.mark.thorough
def test_the_state_of_shares_is_put_together_and_cut_up_again():
    shares = [[0.0, 10.0, 20.0, 30.0], [40.0, 50.0, 60.0, 0.0]]
    for (whole, back), share in zip(in_processes(2, there_and_back), shares, strict=True):
        assert [entries["exp_avg"].tolist() for entries in whole] == [
            [[0.0, 10.0], [20.0, 30.0]],
            [40.0, 50.0],
            60.0,
        ]
        assert [float(entries["step"]) for entries in whole] == [3.0, 3.0, 3.0]
        assert back["exp_avg"].tolist() == share
        assert float(back["step"]) == 3.0


def with_deepspeed(test: Any) -> Any:
    lacking = find_spec("deepspeed") is None
    reason = "pip install 'petl-peft[deepspeed]'"
    return pytest.mark.slow(pytest.mark.skipif(lacking, reason=reason)(test))


def found_share(ran: subprocess.CompletedProcess[str]) -> int:
    """Of how many numbers the first process kept the optimizer's state, as it said."""
    said = re.search(r"DeepSpeed: this process keeps the optimizer's state of (\d+) of", ran.stderr)
    assert said, ran.stderr
    return int(said[1])


@pytest.mark.parametrize(("stage", "method"), [(1, "lora"), (2, "mola")])
@with_deepspeed
def test_a_run_with_zero_equals_one_process(tiny, tmp_path, stage, method):
    common = [*tiny.steady, f"+method={method}", f"train.lr={LR}", "train.log_steps=1", *EVALUATED]
    common += ["train.batch_size=7", "train.micro_batch_size=2", "train.max_grad_norm=0.1"]
    common += ["method.router_aux_loss_coef=0"] if method == "mola" else []  # of a micro-batch
    one = train(common, tmp_path / "one")
    zero = [*common, "+launch=deepspeed", f"launch.stage={stage}", f"train.run={tmp_path}/two"]
    ran = launch(zero, tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    two = Finished(tmp_path / "two")
    assert json.loads((two.path / "environment.json").read_text())["processes"] == 2
    assert found_share(ran) <= two.scores["trainable_parameters"] / 2 + PADDING
    assert min(line["grad_norm"] for line in one.metrics if "loss" in line) > 0.1, "not clipped"
    assert_same_run(one, two)


@pytest.mark.parametrize(("stage", "method"), [(1, ["+method=mola"]), (2, GROWING)])
@with_deepspeed
def test_a_run_with_zero_resumes_from_its_checkpoint_bit_exactly(tiny, tmp_path, stage, method):
    common = [*tiny.classify, *method, "+loss=density", f"train.lr={LR}"]
    common += ["train.save_steps=2", "train.log_steps=1", "train.max_grad_norm=null"]
    straight, zero = Finished(tmp_path / "run"), ["+launch=deepspeed", f"launch.stage={stage}"]
    ran = launch([*common, *zero, f"train.run={straight.path}"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    assert found_share(ran) < 0.6 * straight.scores["trainable_parameters"]
    # as if stopped after step 2; data parallelism takes the same checkpoint
    for kind, words in (("deepspeed", zero), ("ddp", ["+launch=ddp"])):
        stopped = stopped_before(straight, tmp_path / kind, "step-000004")
        again = [*common, *words, f"train.resume={stopped.path}"]
        ran = launch(again, tmp_path, processes=2)
        assert ran.returncode == 0, ran.stderr
        assert_same_course(stopped, straight, atol=0.0 if kind == "deepspeed" else LR / 10)
    ranks = [int(t) for name, t in straight.adapter.items() if name.endswith(".rank")]
    assert (sum(ranks) > len(ranks)) == (method is GROWING), "whether ranks have grown"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install 'petl-peft[quantized]'")
@with_deepspeed
def test_a_base_in_few_bits_trains_with_zero_as_with_ddp(tiny, tmp_path):
    common = [*tiny.steady, "+method=lora", "model.quantization=bnb_4bit", "train.log_steps=1"]
    runs = {kind: Finished(tmp_path / kind) for kind in ("ddp", "deepspeed")}
    for kind, run in runs.items():
        words = [*common, f"+launch={kind}", f"train.run={run.path}"]
        ran = launch(words, tmp_path, processes=2)
        assert ran.returncode == 0, ran.stderr
    assert found_share(ran) < 0.6 * run.scores["trainable_parameters"]
    losses = [[line["loss"] for line in run.metrics] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@with_deepspeed
def test_the_rate_is_found_with_zero_before_the_run(tiny, tmp_path):
    common = [*tiny.steady, "+method=lora", "train.find_lr=true", "train.find_lr_steps=12"]
    run = Finished(tmp_path / "run")
    zero = [*common, "+launch=deepspeed", f"train.run={run.path}"]
    ran = launch(zero, tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    one = train(common, tmp_path / "one")
    assert run.scores["find_lr"]["steps"] == one.scores["find_lr"]["steps"]
    assert run.scores["lr"] == pytest.approx(one.scores["lr"])
