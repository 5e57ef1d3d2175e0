"""Two processes over gloo, started as a user starts them."""

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import distributed
from training_fixtures import (
    OFFLINE,
    Finished,
    command_after,
    command_line,
    launch,
    slow_after,
    train,
)

from petl.errors import InputError
from petl.system import processes
from petl.system.collectives import Counts, on_main
from petl.testing.processes import in_processes

pytest_plugins = ["training_fixtures"]

PATIENCE = 250  # seconds, for a busy machine
LAUNCHERS = re.compile(r"[WI]\d{4} |\*+$")  # lines of torchrun's own
# two runs of eight steps of AdamW in float32 that add up the same numbers in another order
TOLERANCE = {"atol": 5e-5, "rtol": 1e-3}
BALANCED = ["+method=mola", "method.num_experts=4", "method.router_aux_loss_coef=0.5"]
# prints what wraps the model on each process
WATCH = """
import sys
import accelerate
prepare = accelerate.Accelerator.prepare
def watching(self, model):
    wrapped = prepare(self, model)
    sys.stderr.write(f"{type(wrapped).__name__} of {self.num_processes}\\n")
    return wrapped
accelerate.Accelerator.prepare = watching
"""


@pytest.mark.thorough
def test_two_processes_train_as_one_does_on_the_same_rows(tiny, tmp_path):
    # 49 rows in batches of 8: the last of each epoch has one, none for the second process; uneven
    # labels; and a balance loss that is of all tokens of a step
    common = [*tiny.complete, *BALANCED, "train.steps=8", "train.log_steps=1", "data.train_rows=49"]
    one = train(common, tmp_path / "one")
    ran = launch([*common, f"train.run={tmp_path}/two"], tmp_path, 2, code=WATCH)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("DistributedDataParallel of 2") == 2
    two = Finished(tmp_path / "two")
    assert json.loads((two.path / "environment.json").read_text())["processes"] == 2
    assert [line["tokens"] for line in two.metrics] == [line["tokens"] for line in one.metrics]
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["aux_loss"] == pytest.approx(a["aux_loss"], abs=1e-4)
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(two.adapter[name], tensor, **TOLERANCE)
    for key, value in one.scores["after"].items():
        assert two.scores["after"][key] == pytest.approx(value, rel=1e-3)


def started(overrides, folder, code=""):
    """A run on two processes, with its messages in `said` beside its folder."""
    said = folder.with_suffix(".said").open("a")
    line = command_line([*overrides, f"train.run={folder}", "train.resume=auto"], processes=2)
    line = command_after(code, line, folder.with_suffix(".py"))
    environment = {**os.environ, **OFFLINE}
    return subprocess.Popen(line, cwd=folder.parent, env=environment, stderr=said)


def wait_for(running, checkpoint):
    until = time.monotonic() + PATIENCE
    while not checkpoint.exists():
        assert running.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)


def said_since(folder, count=0):
    return folder.with_suffix(".said").read_text()[count:]


@pytest.mark.thorough
def test_two_processes_stop_together_and_resume_bit_exactly(tiny, tmp_path):
    # dropout is on, so each process has its own random state to come back to; of seven rows the
    # second process gets three, one micro-batch to the first one's two
    common = [*tiny.classify, *BALANCED, "train.steps=60", "train.save_steps=10"]
    common += ["train.batch_size=7", "train.micro_batch_size=3", "train.log_steps=2"]
    straight = launch([*common, f"train.run={tmp_path}/straight"], tmp_path, processes=2)
    assert straight.returncode == 0, straight.stderr
    told = [line for line in straight.stderr.splitlines() if line and not LAUNCHERS.match(line)]
    assert "step 60/60" in told[-2]
    assert told[-1].startswith("scoring 20 test examples after training")
    assert len(told) == len(set(told))  # one process speaks for both
    assert straight.stdout.count("saved in") == 1

    # torchrun hands SIGTERM on to every process, those that make batches included
    run, workers = tmp_path / "stopped", [*common, "train.num_workers=1"]
    running = started(workers, run, slow_after(10))
    wait_for(running, run / "checkpoints" / "step-000010")
    running.send_signal(signal.SIGTERM)
    running.wait(PATIENCE)
    said = said_since(run)
    assert "stopped by SIGTERM after step" in said
    assert "to resume: torchrun --nproc_per_node 2" in said
    assert '/train.py", line' not in said  # no traceback but torchrun's own
    assert not (run / "adapter").exists()

    # killed itself, torchrun hands nothing on: its processes notice by themselves
    running = started(common, run, slow_after(30))
    wait_for(running, run / "checkpoints" / "step-000030")
    ranks = psutil.Process(running.pid).children()
    assert len(ranks) == 2
    running.kill()
    _, left = psutil.wait_procs(ranks, timeout=PATIENCE)
    assert not left
    assert said_since(run, len(said)).count("stopped by SIGTERM after step") == 1

    resumed = launch([*common, f"train.run={run}", "train.resume=auto"], tmp_path, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    one, two = Finished(tmp_path / "straight"), Finished(run)
    for name, tensor in one.adapter.items():
        assert torch.equal(tensor, two.adapter[name]), name
    assert [m["loss"] for m in one.metrics] == [m["loss"] for m in two.metrics]


WAYS = {
    "packed": ["data.pack=true", "train.batch_size=3", "train.micro_batch_size=1"],
    "in buckets": ["train.buckets=3", "train.max_tokens=48", "train.micro_batch_size=2"],
    "streamed": ["data.streaming=true", "data.shuffle_buffer=16", "data.pack=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_of_which_one_or_all_are_killed_resume_bit_exactly(tiny, tmp_path, way):
    common = [*tiny.complete, *WAYS[way], "+method=lora", "method.lora_dropout=0.2"]
    common += ["train.steps=60", "train.save_steps=10", "train.log_steps=2"]
    straight = launch([*common, f"train.run={tmp_path}/straight"], tmp_path, processes=2)
    assert straight.returncode == 0, straight.stderr
    run = tmp_path / "killed"

    running = started(common, run, slow_after(10))
    wait_for(running, run / "checkpoints" / "step-000010")
    first, second = psutil.Process(running.pid).children()
    second.kill()
    assert running.wait(PATIENCE) != 0
    assert not first.is_running()
    own, _, _ = said_since(run).partition("ChildFailedError")
    assert own.count("train.resume=auto resumes from the last checkpoint") == 1
    assert '/train.py", line' not in own

    running = started([*common, "train.num_workers=1"], run, slow_after(20))
    wait_for(running, run / "checkpoints" / "step-000020")
    whole = psutil.Process(running.pid)
    every = [whole, *whole.children(recursive=True)]
    for process in every:
        with suppress(psutil.NoSuchProcess):  # a worker ends with its rank
            process.kill()
    psutil.wait_procs(every, timeout=PATIENCE)
    assert not (run / "adapter").exists()

    running = started(common, run)
    assert running.wait(PATIENCE) == 0, said_since(run)
    assert said_since(run).count("resuming from") == 2
    one, two = Finished(tmp_path / "straight"), Finished(run)
    for name, tensor in one.adapter.items():
        assert torch.equal(tensor, two.adapter[name]), name
    assert [m["loss"] for m in one.metrics] == [m["loss"] for m in two.metrics]


@pytest.mark.thorough
def test_bad_input_is_told_once_whatever_the_number_of_processes(tiny, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("keep me")
    ran = launch([*tiny.classify, "+method=lora", f"train.run={tmp_path}/taken"], tmp_path, 2)
    assert ran.returncode != 0
    assert ran.stderr.count("taken exists already") == 1
    assert "Traceback (most recent call last)" not in ran.stderr.split("torch/distributed")[0]


# the second process finds something wrong
REFUSE = """
import os
from petl.training import loop
from petl.errors import InputError
step = loop.Loop.step
def refusing(self, batches):
    if os.environ["RANK"] == "1" and self.state.step == 2:
        raise InputError("row 3 cannot be read")
    step(self, batches)
loop.Loop.step = refusing
"""


@pytest.mark.thorough
def test_an_error_of_the_second_process_alone_is_told_once_and_nothing_else(tiny, tmp_path):
    words = [*tiny.classify, "+method=lora", f"train.run={tmp_path}/two"]
    ran = launch(words, tmp_path, 2, code=REFUSE)
    assert ran.returncode != 0
    own, _, launchers = ran.stderr.partition("torch/distributed")
    assert own.count("error: row 3 cannot be read\n") == 1
    assert "Traceback" not in own
    assert "died" not in ran.stderr  # of the other: it is a consequence
    assert "resume" not in ran.stderr
    assert re.search(r"exitcode *: 2", launchers)


def errors_told(has_error):
    """Whether each process tells of its error; the first may tell other things as well."""
    processes.PATIENCE = timedelta(seconds=60 if has_error[0] else 0.5)  # 60: it need not be long
    answers = []
    for _ in range(2):  # of two jobs
        processes.begin_job()
        if has_error[distributed.get_rank()]:
            answers.append(processes.should_report_error())
        else:
            distributed.distributed_c10d._get_default_store().wait([processes.report_key()])
            answers.append("speaks" if processes.should_report() else "keeps quiet")
    return answers


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("has_error", "told"),
    [
        ((True, True), (True, False)),
        ((False, True), ("keeps quiet", True)),
    ],
)
def test_the_first_process_that_has_an_error_tells_it(has_error, told):
    assert in_processes(2, errors_told, has_error) == [[answer] * 2 for answer in told]


@pytest.mark.parametrize(
    ("rank", "local", "tells"), [("0", "0", True), ("1", "1", False), ("2", "0", True)]
)
def test_before_they_have_met_one_process_of_each_machine_tells(monkeypatch, rank, local, tells):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert processes.should_report_error() == tells
    assert processes.should_report() == (rank == "0")


# Without a launcher


def alone():
    return SimpleNamespace(num_processes=1, is_main_process=True)


def test_a_single_process_counts_for_itself():
    assert Counts(alone()).total(3, 4) == [3, 4]


def test_what_fails_on_the_main_process_fails():
    def refuse():
        raise InputError("no room")

    with pytest.raises(InputError):
        on_main(alone(), refuse)
    assert on_main(alone(), lambda: 5) == 5


@pytest.mark.parametrize("count", [None, "1", "2"])
def test_what_needs_one_process_is_refused_with_several(monkeypatch, count):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if count:
        monkeypatch.setenv("WORLD_SIZE", count)
    if count != "2":
        processes.refuse_processes("a search needs one process")
        return
    with pytest.raises(InputError, match="WORLD_SIZE=2: a search needs one process"):
        processes.refuse_processes("a search needs one process")
