"""Runs that leave tokens out of attention: trained, resumed, planned, refused."""

import pytest
from training_fixtures import assert_same_course, compose, stopped_before, tiny, train  # noqa: F401

from petl.cli.main import main
from petl.errors import InputError
from petl.experiments.planning.plan import plan_run

LEMO = ["+method=lora", "+tokens=lemo", "tokens.block=2", "tokens.keep=0.4", "tokens.layers=all"]
LEMO += ["train.steps=4", "train.log_steps=1", "train.save_steps=2"]


def losses(run):
    return [line["loss"] for line in run.metrics if "loss" in line]


@pytest.mark.thorough
def test_a_run_trains_on_fewer_tokens_and_resumes_alike(tiny, tmp_path):  # noqa: F811
    words = [*tiny.complete, *LEMO]
    whole = train(words, tmp_path / "whole")
    plain = train([w for w in words if "tokens" not in w], tmp_path / "plain")
    assert losses(whole)[0] != losses(plain)[0]
    # the loss of a row before the first step, and that of all of its tokens
    measured = whole.scores["dropped_tokens"]
    assert measured["loss"] != measured["loss_of_all"]
    assert measured["loss_of_all"] == pytest.approx(losses(plain)[0], rel=0.2)
    # scores are those of all tokens
    assert whole.scores["before"] == plain.scores["before"]
    stopped = stopped_before(whole, tmp_path / "stopped", whole.checkpoints[-1])
    resumed = train([*words, f"train.resume={stopped.path}"], stopped.path)
    assert_same_course(resumed, whole, atol=0.0)


@pytest.mark.thorough
def test_predictors_are_trained_by_a_command_and_used(tiny, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "predictors.safetensors"
    model = [word for word in tiny.complete if word.startswith(("model", "data"))]
    size = ["--block", "2", "--layers", "0,1", "--steps", "6", "--batch-size", "2"]
    assert main(["train-predictors", *model, "--out", str(file), *size]) in (None, 0)
    assert "predictors of 2 layers" in capsys.readouterr().out
    words = [*tiny.complete, *LEMO, "tokens.layers=[0,1]", "tokens.scorer=predictor"]
    run = train([*words, f"tokens.predictor={file}"], tmp_path / "run")
    by_norm = train([*tiny.complete, *LEMO, "tokens.layers=[0,1]"], tmp_path / "norm")
    assert run.scores["steps"] == 4
    assert losses(run) != losses(by_norm)


@pytest.mark.thorough
def test_a_plan_counts_the_tokens_that_are_left(tiny):  # noqa: F811
    words = [*tiny.complete, *LEMO]
    kept = (words, [*words, "tokens.keep=1"])
    part, whole = (plan_run(compose(each)).memory.pass_ for each in kept)
    assert part.operations < whole.operations
    assert part.kept < whole.kept


def test_what_would_read_all_tokens_is_refused(tiny, tmp_path):  # noqa: F811
    for words in (
        [*tiny.classify, *LEMO],
        [*tiny.complete, *LEMO, "data.pack=true"],
        [*tiny.complete, "+method=mola", *LEMO[1:]],
    ):
        with pytest.raises(InputError):
            train(words, tmp_path / "run")
