"""A run that is trained further than it was to be, finished or not."""

import json
import shutil

import pytest
from training_fixtures import train

from petl.errors import InputError, JobSkipped
from petl.training import loop
from petl.training.runs import results
from petl.training.runs.records import read_log
from petl.training.runs.run_folder import Run

pytest_plugins = ["training_fixtures"]

CONSTANT = ["+method=lora", "method.lora_dropout=0.2", "train.schedule=constant", "train.warmup=2"]
COURSE = ["train.log_steps=1", "train.eval_steps=3", "train.save_steps=3"]
TIMES = {"seconds"}


class Killed(BaseException):
    """Ends a run the way kill -9 does."""


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """The folder of a finished run of six steps, not to be changed."""
    folder = tmp_path_factory.mktemp("short") / "run"
    train([*tiny.classify, *CONSTANT, *COURSE, "train.steps=6"], folder)
    return folder


@pytest.fixture(scope="module")
def longer(tiny, tmp_path_factory):
    """The same with fourteen steps."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    return train([*tiny.classify, *CONSTANT, *COURSE, "train.steps=14"], folder)


@pytest.fixture
def copied(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


def further(tiny, folder, *words, steps=14):
    """Train the run in `folder` to `steps` steps."""
    overrides = [*tiny.classify, *CONSTANT, *COURSE, f"train.steps={steps}", *words]
    return train([*overrides, f"train.resume={folder}"], folder)


def lines(run):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in run.metrics]


@pytest.mark.thorough
def test_a_finished_run_trained_further_equals_one_longer_run(tiny, copied, longer, petl_log):
    resumed = further(tiny, copied)
    assert lines(resumed) == lines(longer)
    assert resumed.scores["after"] == longer.scores["after"]
    assert resumed.scores["steps"] == 14
    assert (
        "training further, from step 6 to 14, with the constant schedule of one run of 14 steps"
        in petl_log.messages
    )
    assert "steps: 14" in (copied / "config.yaml").read_text()
    assert json.loads((copied / "environment.json").read_text())["resumed_from"].endswith("006")
    assert "14 steps" in (copied / "report.html").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("longer", lambda step: 1 - (step - 1) / 12),
        ("fresh", lambda step: 1 - (step - 5) / 8),
    ],
)
def test_the_schedule_is_that_of_the_longer_run_or_a_fresh_one(
    tiny, tmp_path, petl_log, choice, expected
):
    words = [*tiny.classify, "+method=lora", "train.warmup=0", "train.lr=1", "train.log_steps=1"]
    train([*words, "train.steps=4"], tmp_path / "run")
    words += [f"train.resume={tmp_path / 'run'}", f"train.resume_schedule={choice}"]
    run = train([*words, "train.steps=12"], tmp_path / "run")
    rates = {line["step"]: line["lr"] for line in run.metrics}
    assert [rates[step] for step in range(5, 13)] == pytest.approx(
        [expected(step) for step in range(5, 13)]
    )
    named = {"longer": "of one run of 12 steps", "fresh": "a fresh linear schedule for the 8 new"}
    assert any(named[choice] in message for message in petl_log.messages)


@pytest.mark.thorough
def test_a_fresh_schedule_goes_on_after_another_stop(tiny, tmp_path, monkeypatch):
    words = [*tiny.classify, "+method=lora", "train.warmup=0", "train.lr=1", "train.log_steps=1"]
    words += ["train.save_steps=2", "train.resume_schedule=fresh"]
    train([*words, "train.steps=4"], tmp_path / "run")
    words += ["train.steps=12"]
    killed_at(monkeypatch, 9, [*words, f"train.resume={tmp_path / 'run'}"], tmp_path / "run")
    run = train([*words, "train.resume=auto"], tmp_path / "run")
    assert run.metrics[-1]["lr"] == pytest.approx(1 / 8)


def killed_at(monkeypatch, step, overrides, folder):
    """Run a training that is killed in a step."""
    run_step = loop.Loop.step

    def killing(self, batches):
        if self.state.step == step - 1:
            raise Killed
        run_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", killing)
        with pytest.raises(Killed):
            train(overrides, folder)


RESULTS = ["config.yaml", "scores.json", "adapter/adapter_model.safetensors", "report.html"]


@pytest.mark.thorough
@pytest.mark.parametrize("step", [7, 11])
def test_a_kill_while_training_further_leaves_the_earlier_results(
    tiny, copied, short, longer, monkeypatch, step
):
    words = [*tiny.classify, *CONSTANT, *COURSE, "train.steps=14"]
    killed_at(monkeypatch, step, [*words, f"train.resume={copied}"], copied)
    for name in RESULTS:
        assert (copied / name).read_bytes() == (short / name).read_bytes(), name
    again = copied if step == 7 else "auto"  # of the longer run there is a checkpoint, of step 9
    resumed = train([*words, f"train.resume={again}"], copied)
    assert lines(resumed) == lines(longer)
    assert resumed.scores["after"] == longer.scores["after"]


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["_save", "_describe"])
def test_a_kill_while_the_longer_result_is_written_is_made_good(tiny, copied, monkeypatch, place):
    def killing(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(results if hasattr(results, place) else Run, place, killing)
        with pytest.raises(Killed):
            further(tiny, copied)
    assert further(tiny, copied).scores["steps"] == 14
    with pytest.raises(InputError):
        further(tiny, copied)


@pytest.mark.thorough
def test_a_stopped_run_may_be_made_longer_too(tiny, tmp_path, monkeypatch):
    words = [*tiny.classify, *CONSTANT, *COURSE]
    killed_at(monkeypatch, 5, [*words, "train.steps=6"], tmp_path / "run")
    resumed = further(tiny, tmp_path / "run", steps=9)
    longer = train([*words, "train.steps=9"], tmp_path / "longer")
    assert lines(resumed) == lines(longer)


@pytest.mark.thorough
def test_a_finished_run_that_is_named_goes_on_with_more_steps(tiny, copied, short):
    words = [*tiny.classify, *CONSTANT, *COURSE, "train.resume=auto"]
    with pytest.raises(JobSkipped):
        train([*words, "train.steps=6"], copied)
    assert train([*words, "train.steps=9"], copied).scores["steps"] == 9
    other = [*words, "train.steps=12", "train.lr=3e-5"]
    with pytest.raises(InputError):
        train(other, copied)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.steps=4"], "6 steps .*4: .*train.steps"),
        (["train.steps=6"], "finished.* train.steps"),
        (["train.steps=14", "train.lr=3e-5"], "another run: .*train.lr"),
    ],
)
def test_what_is_no_longer_run_is_refused(tiny, copied, words, message):
    with pytest.raises(InputError, match=message):
        further(tiny, copied, *words)


@pytest.mark.thorough
def test_a_run_that_stopped_early_needs_more_patience(tiny, tmp_path):
    words = [*tiny.classify, "+method=lora", "train.lr=1e-9", "train.head_lr=1e-9"]
    words += ["train.eval_steps=1", "train.save_steps=1"]
    early = train([*words, "train.steps=8", "train.early_stopping=1"], tmp_path / "run")
    assert early.scores["steps"] < 8
    words += ["train.steps=9", f"train.resume={tmp_path / 'run'}"]
    with pytest.raises(InputError):
        train([*words, "train.early_stopping=1"], tmp_path / "run")
    assert train([*words, "train.early_stopping=null"], tmp_path / "run").scores["steps"] == 9


@pytest.mark.thorough
def test_another_interval_of_log_lines_averages_over_known_steps(tiny, tmp_path):
    words = [*tiny.classify, *CONSTANT]
    train([*words, "train.steps=5", "train.log_steps=2"], tmp_path / "run")
    words += ["train.steps=9"]
    resumed = train([*words, "train.log_steps=4", f"train.resume={tmp_path}/run"], tmp_path / "run")
    each = train([*words, "train.log_steps=1"], tmp_path / "each")
    losses = {line["step"]: line["loss"] for line in each.metrics}
    # of step 5 to 8 the checkpoint of step 5 has the first
    by_step = {line["step"]: line["loss"] for line in read_log(resumed.path / "metrics.jsonl")}
    assert by_step[8] == pytest.approx(sum(losses[s] for s in range(5, 9)) / 4)
    assert by_step[9] == pytest.approx(losses[9])
