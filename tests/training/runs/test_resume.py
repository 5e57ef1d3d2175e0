"""A run that was stopped, in any way, resumes as if it had not been."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from training_fixtures import (
    OFFLINE,
    Finished,
    command_after,
    command_line,
    launch,
    main,
    replace_weights,
    slow_after,
    stopped_before,
    train,
    trained_once,
)
from transformers import BertForSequenceClassification

import petl
from petl.core.adapter_folder import Folder
from petl.data.tasks.classification import Classification
from petl.errors import InputError, JobSkipped, RunStopped
from petl.system.processes import explain_process_failures, release
from petl.training import loop
from petl.training.compose import compose
from petl.training.evaluate import Evaluator
from petl.training.runs import checkpoint, run_folder
from petl.training.runs.resume import find_checkpoint, identity
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]

# two epochs of seven steps; the rows of the last of each are two, not eight
COURSE = ["train.steps=14", "train.save_steps=3", "train.log_steps=4", "train.keep_checkpoints=9"]
# two epochs of four steps
SHORT = ["train.steps=8", "train.batch_size=16", "train.save_steps=2", "train.log_steps=3"]
SHORT += ["train.keep_checkpoints=9"]
TIMES = {"seconds"}
PHASES = ["method.reselection_steps=4", "method.selection_accumulation_steps=3"]


class Killed(BaseException):
    """Ends a run the way kill -9 does: nothing is cleaned up."""


def kill_at(monkeypatch, step):
    after_step = petl.Lifecycle.after_step

    def killing(self, now, optimizer):
        if now == step:
            raise Killed
        after_step(self, now, optimizer)

    monkeypatch.setattr(petl.Lifecycle, "after_step", killing)


def assert_same_adapter(one: Finished, other: Finished) -> None:
    assert one.adapter.keys() == other.adapter.keys()
    for name, tensor in one.adapter.items():
        assert torch.equal(tensor, other.adapter[name]), name


def assert_equal_runs(one: Finished, other: Finished) -> None:
    """The same adapters, log lines and scores, bit by bit; times aside."""
    assert_same_adapter(one, other)
    timeless = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in run.metrics]
        for run in (one, other)
    ]
    assert timeless[0] == timeless[1]
    assert one.scores["after"] == other.scores["after"]
    assert one.scores["tokens"] == other.scores["tokens"]


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    "choice",
    [
        ["+method=mola", "method.lora_dropout=0.2", "method.router_aux_loss_coef=0.1"],
        ["+method=lora", "train.precision=bf16", "train.eval_steps=4", "train.loraplus_ratio=4"],
        ["+method=lora", "model.dtype=bfloat16", "train.batch_sizes={6: 9, 16: 5}"],
        ["+method=lora", "train.buckets=3", "train.max_tokens=64", "train.micro_batch_size=2"],
        ["+method=binary", "method.inner=lora", "train.eval_steps=4"],  # the result is packed
        # the last checkpoint is within a phase of observation
        ["+method=sparse", *PHASES, "method.selection_algorithm=sm3"],
        ["+method=increlora", "method.tinit=2", "method.deltaT=2"],  # ranks grow
        ["+method=lora", "data.pack=true", "train.batch_size=3", "method.lora_dropout=0.2"],
    ],
    ids=lambda words: " ".join(w.split(".")[-1] for w in words),
)
def test_a_run_stopped_after_a_checkpoint_resumes_bit_exactly(tiny, tmp_path, choice):
    task = tiny.complete if "data.pack=true" in choice else tiny.classify
    common = [*task, *SHORT, *choice]
    straight = train(common, tmp_path / "straight")
    # from step 6, in the second epoch
    stopped = stopped_before(straight, tmp_path / "stopped", "step-000008")
    resumed = train([*common, "train.resume=auto"], stopped.path)
    assert_equal_runs(straight, resumed)


# The moments at which it may be killed

ACCUMULATING = ["+method=lora", "train.micro_batch_size=3", "train.eval_steps=4"]
ACCUMULATING += ["method.lora_dropout=0.2", "train.log_steps=1"]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return train([*tiny.classify, *COURSE, *ACCUMULATING], folder)


def assert_resumes(undisturbed, tiny, folder, step):
    """Assert that a run killed at a step, before its checkpoint, ends as one that was not.

    It resumes with a DataLoader worker, which the undisturbed one did not have.
    """
    common = [*tiny.classify, *COURSE, *ACCUMULATING]
    resumed = train([*common, "train.resume=auto", "train.num_workers=1"], folder)
    assert_equal_runs(undisturbed, resumed)
    noted = json.loads((folder / "environment.json").read_text())["resumed_from"]
    before = [name for name in undisturbed.checkpoints if name < f"step-{step:06d}"]
    assert noted == str(folder / "checkpoints" / before[-1])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("place", "name", "call", "step"),
    [
        (loop, "to_device", 30, 11),  # the second of its three micro-batches
        (Evaluator, "rows", 3, 8),  # after the scores before training
    ],
)
def test_a_run_killed_in_mid_accumulation_or_evaluation_resumes_bit_exactly(
    undisturbed, tiny, tmp_path, monkeypatch, place, name, call, step
):
    original, calls = getattr(place, name), []

    def killing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killing)
        with pytest.raises(Killed):
            train([*tiny.classify, *COURSE, *ACCUMULATING], tmp_path / "run")
    assert_resumes(undisturbed, tiny, tmp_path / "run", step)


# a run that is killed where it comes to a function for step 9, or at the end
KILLED_AT = """
import os, signal
import {place} as module
original = module.{name}
def killing(*args, **kwargs):
    if "{name}" == "write_task" or any("step-000009" in str(arg) for arg in args):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
module.{name} = killing
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("place", "name", "left", "step"),
    [
        ("petl.system.files.disk", "fingerprints", "checkpoints/.unfinished-step-000009", 9),
        pytest.param(
            *("petl.training.runs.results", "write_task", ".unfinished-adapter", 15),
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["in a write", "while the adapter is saved"],
)
def test_kill_minus_nine_in_a_write_costs_no_checkpoint(
    undisturbed, tiny, tmp_path, place, name, left, step
):
    words = [*tiny.classify, *COURSE, *ACCUMULATING, f"train.run={tmp_path / 'run'}"]
    ended = launch(words, tmp_path, code=KILLED_AT.format(place=place, name=name))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (tmp_path / "run" / left).is_dir()
    assert_resumes(undisturbed, tiny, tmp_path / "run", step)
    assert not list((tmp_path / "run").rglob(".unfinished-*"))


@pytest.mark.thorough
def test_a_disk_that_fills_up_ends_the_run_and_it_resumes_bit_exactly(
    undisturbed, tiny, tmp_path, monkeypatch
):
    save = checkpoint.save_file

    def filling(tensors, path, **kwargs):
        save(tensors, path, **kwargs)
        if "step-000009" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", filling)
        with pytest.raises(RunStopped):
            train([*tiny.classify, *COURSE, *ACCUMULATING], tmp_path / "run")
    assert_resumes(undisturbed, tiny, tmp_path / "run", 9)


@pytest.mark.thorough
def test_a_log_that_the_disk_has_no_room_for_ends_the_run_and_is_whole_again_after(
    undisturbed, tiny, tmp_path, monkeypatch
):
    after_step = petl.Lifecycle.after_step

    def filling(self, now, optimizer):
        after_step(self, now, optimizer)
        if now == 8:
            (tmp_path / "run" / "metrics.jsonl").unlink()
            patch.setattr(run_folder, "append_to", lambda _: Path("/dev/full").open("ab"))  # noqa: SIM115

    with monkeypatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", filling)
        with pytest.raises(RunStopped):
            train([*tiny.classify, *COURSE, *ACCUMULATING], tmp_path / "run")
    assert_resumes(undisturbed, tiny, tmp_path / "run", 8)


@pytest.mark.thorough
def test_a_worker_that_is_killed_ends_the_run_and_it_resumes_bit_exactly(
    undisturbed, tiny, tmp_path, monkeypatch
):
    after_step = petl.Lifecycle.after_step

    def killing(self, now, optimizer):
        after_step(self, now, optimizer)
        if now == 10:
            for worker in active_children():
                worker.kill()
                worker.join()

    words = [*tiny.classify, *COURSE, *ACCUMULATING, "train.num_workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", killing)
        with (
            pytest.raises(RunStopped),
            explain_process_failures(),
        ):
            train(words, tmp_path / "run")
    assert_resumes(undisturbed, tiny, tmp_path / "run", 11)


ADALORA = ["+method=adalora", "method.tinit=2", "method.tfinal=3", "method.deltaT=2"]


@pytest.mark.thorough
def test_a_method_whose_state_a_checkpoint_cannot_hold_says_so(
    tiny, tmp_path, monkeypatch, petl_log
):
    common = [*tiny.classify, *COURSE, *ADALORA]
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            train(common, tmp_path / "run")
    assert "if this run is stopped, it cannot resume" in petl_log.text
    with pytest.raises(InputError):
        train([*common, f"train.resume={tmp_path}/run"], tmp_path / "run")


@pytest.mark.thorough
def test_the_best_ranks_come_back_with_the_best_evaluation(tiny, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.5, 0.4, 0.3])
    original = Classification.summarize

    def summarize(self, total):
        scores = original(self, total)
        is_held_out = scores["rows"] == 5
        return {**scores, "accuracy": next(accuracies)} if is_held_out else scores

    monkeypatch.setattr(Classification, "summarize", summarize)
    run = train([*tiny.classify, *COURSE, *ADALORA, "train.eval_steps=4"], tmp_path / "run")
    best = Finished(tmp_path / "run" / "checkpoints" / "step-000004")
    assert_same_adapter(best, run)


@pytest.mark.thorough
def test_kill_minus_nine_in_mid_run_then_resume_equals_the_uninterrupted_run(tiny, tmp_path):
    common = [*tiny.classify, *COURSE, "+method=lora", "train.steps=60", "train.log_steps=30"]
    straight = train(common, tmp_path / "straight")
    line = command_line([*common, f"train.run={tmp_path}/killed"])
    line = command_after(slow_after(12), line, tmp_path / "slow.py")
    victim = subprocess.Popen(line, cwd=tmp_path, env={**os.environ, **OFFLINE})
    checkpoints = tmp_path / "killed" / "checkpoints"
    while not (checkpoints / "step-000012").exists():
        assert victim.poll() is None
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "killed" / "adapter").exists()
    resumed = launch([*common, f"train.run={tmp_path}/killed", "train.resume=auto"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert_equal_runs(straight, Finished(tmp_path / "killed"))


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """A run killed at step 8, with checkpoints at 3 and 6, and its overrides."""
    common = [*tiny.classify, *COURSE, "+method=lora"]
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            train(common, folder)
    return folder, common


@pytest.fixture
def stopped(killed, tmp_path):
    """A copy of the killed run, and its overrides."""
    folder, common = killed
    return shutil.copytree(folder, tmp_path / "run"), common


def resume(stopped, *changes):
    run, common = stopped
    return train([*common, f"train.resume={run}", *changes], run)


@pytest.mark.thorough
def test_a_run_or_one_of_its_checkpoints_can_be_named(stopped, tmp_path):
    run, common = stopped
    shutil.copytree(run, tmp_path / "copy")
    first = train([*common, f"train.resume={run}"], run)
    copy = tmp_path / "copy"
    second = train([*common, f"train.resume={copy}/checkpoints/step-000003"], copy)
    assert_equal_runs(first, second)


def test_a_checkpoint_can_be_named_by_a_path_that_does_not_name_its_run(stopped, monkeypatch):
    run, common = stopped
    now = identity(read_config(compose(common)).resolved)
    for here, path in (("", "step-000003"), ("", "./step-000003"), ("step-000003", ".")):
        monkeypatch.chdir(run / "checkpoints" / here)
        assert find_checkpoint(TrainConfig(resume=path), now) == run / "checkpoints/step-000003"
    release(run)
    assert not list(run.glob("checkpoints/**/.lock"))


def test_a_checkpoint_outside_of_a_run_is_refused(stopped, tmp_path):
    copy = tmp_path / "kept" / "copies" / "step-000003"
    shutil.copytree(stopped[0] / "checkpoints" / "step-000003", copy)
    with pytest.raises(InputError):
        resume(stopped, f"train.resume={copy}")
    assert not (tmp_path / "kept" / ".lock").exists()


@pytest.mark.thorough
def test_the_log_is_that_of_the_run_that_goes_on_whatever_happened_in_between(
    undisturbed, tiny, tmp_path, monkeypatch
):
    """From an older checkpoint by name, killed before the next one, then from the newest."""
    common = [*tiny.classify, *COURSE, *ACCUMULATING]
    run = tmp_path / "run"
    for step, word in ((11, "null"), (5, f"{run}/checkpoints/step-000003")):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                train([*common, f"train.resume={word}"], run)
    assert [line["step"] for line in Finished(run).metrics] == [1, 2, 3, 4, 4]
    assert_equal_runs(undisturbed, train([*common, "train.resume=auto"], run))
    noted = json.loads((run / "environment.json").read_text())["resumed_from"]
    assert noted == f"{run}/checkpoints/step-000009"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:100], "has 100 bytes"),
        (lambda content: bytes([*content[:-1], content[-1] ^ 8]), "its SHA-256 differs"),
    ],
    ids=["cut short", "with a flipped bit"],
)
def test_auto_passes_over_a_damaged_checkpoint_and_says_so(stopped, petl_log, damage, said):
    run, _ = stopped
    file = run / "checkpoints" / "step-000006" / "optimizer.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    resume(stopped, "train.resume=auto")
    assert f"skipping {file.parent}" in petl_log.text
    assert said in petl_log.text
    assert f"resuming from {run / 'checkpoints' / 'step-000003'}" in petl_log.text


def test_a_named_checkpoint_that_is_damaged_is_refused(stopped):
    run, _ = stopped
    file = run / "checkpoints" / "step-000006" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="100 bytes"):
        resume(stopped, f"train.resume={file.parent.parent}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("method.r=4", "method.r=8 there, 4 here"),
        ("train.lr=0.5", "train.lr=0.001 there, 0.5 here"),
        ("train.batch_size=4", "train.batch_size=8 there, 4 here"),
        ("data.max_length=12", "data.max_length=16 there, 12 here"),
        ("train.seed=1", "train.seed=0 there, 1 here"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(stopped, change, said):
    with pytest.raises(InputError, match=said):
        resume(stopped, change)


def test_a_checkpoint_of_another_method_or_model_says_so_first(stopped, tiny):
    run, common = stopped
    others = [o for o in common if o != "+method=lora"]
    for words, said in (
        ([*others, "+method=mola"], "run: method.name='lora' there, 'mola' here"),
        ([*common, f"model.path={tiny.folder}/steady"], "bert' there, .*steady' here"),
    ):
        with pytest.raises(InputError, match=said):
            train([*words, f"train.resume={run}"], run)


@pytest.mark.thorough
def test_another_base_of_the_same_shape_is_refused_unless_it_is_asked_for(
    tiny, tmp_path, monkeypatch, petl_log
):
    model = shutil.copytree(tiny.folder / "bert", tmp_path / "model")
    common = [*tiny.classify, "train.save_steps=1", "+method=lora", f"model.path={model}"]
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train(common, tmp_path / "run")
    replace_weights(model, BertForSequenceClassification)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    resume = [*common, f"train.resume={tmp_path}/run"]
    with pytest.raises(InputError):
        train(resume, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files
    before = Folder(tmp_path / "run" / "checkpoints" / "step-000002" / "adapter").base
    run = train([*resume, "train.other_base=true"], tmp_path / "run")
    assert "39 of 39 tensors" in petl_log.text
    assert len(before) == 39
    assert Folder(run.path / "adapter").base != before


def test_other_rows_under_the_same_name_are_refused(stopped, tiny):
    rows = (tiny.folder / "train.csv").read_text().splitlines()
    original = tiny.folder / "train.csv"
    try:
        original.write_text("\n".join([rows[0], *reversed(rows[1:])]))
        with pytest.raises(InputError):
            resume(stopped)
    finally:
        original.write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_a_path_without_a_checkpoint_is_refused(stopped, tmp_path, where):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        resume(stopped, f"train.resume={tmp_path}/{where}")


@pytest.mark.thorough
def test_a_finished_run_is_not_resumed(stopped):
    run, common = stopped
    resume(stopped)
    with pytest.raises(InputError):
        train([*common, f"train.resume={run}"], run)
    # a job that is queued again ends with status 0 (`petl.training.program.job`)
    with pytest.raises(JobSkipped):
        train([*common, "train.resume=auto"], run)


@pytest.fixture(scope="module")
def finished(killed, tmp_path_factory):
    """A finished run, and its overrides."""
    folder, common = killed
    run = shutil.copytree(folder, tmp_path_factory.mktemp("finished") / "run")
    return train([*common, f"train.resume={run}"], run), common


def cut_short(run):
    os.truncate(run / "adapter/adapter_model.safetensors", 1000)


def without_config(run):
    (run / "adapter/adapter_config.json").unlink()


def without_adapter(run):
    shutil.rmtree(run / "adapter")


DAMAGES = {
    cut_short: "adapter_model.safetensors cannot be read",
    without_config: "adapter_config.json is missing",
    without_adapter: "adapter is missing",
}


@pytest.mark.parametrize(
    ("damage", "named"), [(cut_short, True), (without_config, True), (without_adapter, False)]
)
def test_a_finished_run_that_lost_its_adapter_gets_it_back(
    finished, tmp_path, petl_log, damage, named
):
    """Such a run is not "finished already": its checkpoints give the adapter again."""
    whole, common = finished
    run = shutil.copytree(whole.path, tmp_path / "runs" / "run")
    damage(run)
    words = [*common, "train.resume=auto"]
    if named:
        train(words, run)
    else:
        run_in_output([*words, f"train.output={run.parent}"])
        assert list(run.parent.iterdir()) == [run]
    assert_equal_runs(whole, Finished(run))
    assert DAMAGES[damage] in petl_log.text


def test_without_a_checkpoint_a_lost_adapter_is_said_and_its_scores_stay(finished, tmp_path):
    whole, common = finished
    run = shutil.copytree(whole.path, tmp_path / "run")
    without_adapter(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError):
        train([*common, "train.resume=auto"], run)
    assert Finished(run).scores == whole.scores


@pytest.mark.thorough
def test_auto_says_that_a_run_of_these_settings_is_finished(tiny, tmp_path):
    """Without `train.run`: the command ends with status 0, and begins no second run."""
    words = [*tiny.classify, "+method=lora", f"train.output={tmp_path}/runs", "train.resume=auto"]
    run_in_output(words)
    (run,) = (tmp_path / "runs").iterdir()
    with pytest.raises(JobSkipped, match=str(run)):
        run_in_output(words)
    run_in_output([*words, "train.seed=1"])  # another run
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.thorough
def test_auto_without_anything_to_resume_starts_anew(tiny, tmp_path):
    common = [*tiny.classify, "+method=lora"]
    straight = train(common, tmp_path / "straight")
    automatic = train([*common, "train.resume=auto"], tmp_path / "new")
    assert_equal_runs(straight, automatic)


def test_auto_starts_again_in_a_folder_that_had_saved_nothing(tiny, tmp_path, monkeypatch):
    common = [*tiny.classify, "+method=lora", "train.log_steps=1"]
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            train(common, tmp_path / "run")
    run = train([*common, "train.resume=auto"], tmp_path / "run")
    assert [m["step"] for m in run.metrics] == [1, 2, 3, 4]


@pytest.mark.thorough
def test_auto_finds_the_newest_unfinished_run_of_these_settings(tiny, tmp_path, monkeypatch):
    common = [*tiny.classify, *COURSE, "+method=lora", f"train.output={tmp_path}/runs"]
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        for seed in (0, 1):  # the second is newer, but another run
            with pytest.raises(Killed):
                run_in_output([*common, f"train.seed={seed}"])
    (first, second) = sorted((tmp_path / "runs").iterdir())
    run_in_output([*common, "train.seed=0", "train.resume=auto"])
    assert json.loads((first / "scores.json").read_text())["steps"] == 14
    assert "after" not in json.loads((second / "scores.json").read_text())


def run_in_output(overrides):
    main()(compose(overrides))


@pytest.mark.thorough
def test_a_run_killed_in_its_last_evaluation_is_finished_by_a_resume(tiny, tmp_path, monkeypatch):
    common = [*tiny.classify, *COURSE, "+method=lora"]
    straight = trained_once(*common)

    def killing(self, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("petl.cli.train.finish", killing)
        with pytest.raises(Killed):
            train(common, tmp_path / "run")
    assert "after" not in Finished(tmp_path / "run").scores
    assert_equal_runs(straight, train([*common, "train.resume=auto"], tmp_path / "run"))


def test_scores_from_before_the_stop_are_not_measured_again(stopped, monkeypatch):
    run, _ = stopped
    before = Finished(run).scores["before"]
    calls = []
    original = Classification.summarize

    def counting(self, total):
        calls.append(1)
        return original(self, total)

    monkeypatch.setattr(Classification, "summarize", counting)
    resumed = resume(stopped)
    assert resumed.scores["before"] == before
    assert len(calls) == 1  # after training only


def test_a_stopped_run_resumes_by_the_command_it_prints(tiny, tmp_path, monkeypatch):
    common = [*tiny.classify, *COURSE, "+method=lora"]
    straight = trained_once(*common)
    after_step = petl.Lifecycle.after_step

    def interrupting(self, step, optimizer):
        after_step(self, step, optimizer)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", interrupting)
        with pytest.raises(RunStopped) as stopped:
            train(common, tmp_path / "run")
    path = str(stopped.value).rpartition("train.resume=")[2]
    assert_equal_runs(straight, train([*common, f"train.resume={path}"], tmp_path / "run"))
