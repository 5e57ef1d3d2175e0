"""Runs of train.py over rows that are read while they are trained on."""

import pytest
import torch
from task_fixtures import metrics_without_times
from training_fixtures import stopped_before, train

from petl.adapters.export import saved_adapter
from petl.errors import InputError
from petl.experiments.planning.plan import plan_run
from petl.experiments.planning.preview import preview
from petl.training.compose import compose

pytest_plugins = ["task_fixtures"]
HEADS = ("regression", "question_answering")
LATER = [pytest.param(task, marks=pytest.mark.thorough) for task in HEADS]

STREAM = ["+method=lora", "data.streaming=true", "data.shuffle_buffer=16", "data.held_rows=10"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def streamed(families, task, *more):
    words = [word for word in families(task) if "validation_share" not in word]
    return [*words, *STREAM, *more]


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["causal_lm", *LATER])
def test_a_stopped_run_resumes_bit_exactly_over_several_passes(families, tmp_path, task):
    more = ["train.save_steps=3", "train.steps=16", "train.test=false"]
    more += ["train.keep_checkpoints=9", "train.eval_steps=8"]
    words = streamed(families, task, *more)  # 16 steps of 8 rows: the stream has 50 beside 10
    straight = train(words, tmp_path / "straight")
    assert straight.metrics[-1]["step"] == 16
    stopped = stopped_before(straight, tmp_path / "resumed", "step-000012")
    resumed = train([*words, "train.resume=auto", "train.num_workers=1"], stopped.path)
    assert metrics_without_times(resumed) == metrics_without_times(straight)
    for name, tensor in straight.adapter.items():
        assert torch.equal(resumed.adapter[name], tensor)


def test_a_run_over_a_stream_is_scored_and_evaluated_as_any_other(families, tmp_path):
    run = train(streamed(families, "regression", "train.micro_batch_size=3"), tmp_path / "run")
    held = [line["validation"]["rows"] for line in run.metrics if "validation" in line]
    assert held == [10, 10]
    assert run.scores["after"]["rows"] == 12
    assert saved_adapter.score(saved_adapter.find(run.path)) == pytest.approx(
        run.scores["after"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["train.steps=null"], "train.steps=N"),
        (
            ["train.buckets=4"],
            "train.buckets=4",
        ),
        (["train.validation_share=0.1"], "data.held_rows"),
    ],
)
def test_settings_that_need_all_rows_are_refused(families, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        train(streamed(families, "seq2seq", *more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_is_refused_and_a_preview_shows_the_first_rows(families):
    cfg = compose(streamed(families, "seq2seq"))
    with pytest.raises(InputError):
        plan_run(cfg)
    assert preview(cfg).parts[0].rows == 60
