"""A damaged best checkpoint costs the best score, but the run continues."""

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import Finished, train

import petl
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.training.runs.checkpoint import TrainState, best_of

pytest_plugins = ["training_fixtures"]

COURSE = ["train.steps=5", "train.eval_steps=1", "train.save_steps=1", "train.validation_share=0.2"]


class Killed(BaseException):
    """Ends a run the way kill -9 does."""


def scripted(monkeypatch, accuracies):
    """Make the evaluations on validation rows return these accuracies, in turn."""
    left = iter(accuracies)
    original = Classification.summarize

    def summarize(self, total):
        scores = original(self, total)
        is_held_out = scores["rows"] == 10  # the test has twenty
        return {**scores, "accuracy": next(left)} if is_held_out else scores

    monkeypatch.setattr(Classification, "summarize", summarize)


def before_step(monkeypatch, step, act):
    """Do `act` in the middle of a step."""
    after_step = petl.Lifecycle.after_step

    def acting(self, now, optimizer):
        if now == step:
            act()
        after_step(self, now, optimizer)

    monkeypatch.setattr(petl.Lifecycle, "after_step", acting)


def weights_at(run, step):
    return run / "checkpoints" / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors"


def cut_short(run, step):
    weights_at(run, step).write_bytes(weights_at(run, step).read_bytes()[:100])


def assert_holds(run: Finished, step: int) -> None:
    """Assert that a finished run has the adapter of a step, which it names as the best."""
    for name, tensor in load_file(weights_at(run.path, step)).items():
        assert torch.equal(run.adapter[name], tensor), name
    assert run.scores["best_step"] == step


def test_the_best_evaluation_has_a_checkpoint_whatever_save_steps_is(tiny, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.3, 0.9, 0.5, 0.6, 0.1])
    settings = ["train.save_steps=100", "train.keep_checkpoints=9"]
    run = train([*tiny.classify, "+method=lora", *COURSE, *settings], tmp_path / "run")
    assert_holds(run, 2)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("keep", "accuracies", "step", "best"),
    [
        (9, [0.3, 0.9, 0.5, 0.6, 0.1], 4, 0.6),
        (1, [0.3, 0.9, 0.5, 0.6, 0.1], 5, 0.1),  # of the others only the last is kept
        (9, [0.3, 0.9, 0.5, 0.6, 0.8], 5, 0.8),
    ],
)
def test_a_run_whose_best_checkpoint_is_damaged_ends_with_the_best_complete_one(
    tiny, tmp_path, monkeypatch, petl_log, keep, accuracies, step, best
):
    scripted(monkeypatch, accuracies)
    before_step(monkeypatch, 5, lambda: cut_short(tmp_path / "run", 2))
    settings = [*COURSE, f"train.keep_checkpoints={keep}"]
    run = train([*tiny.classify, "+method=lora", *settings], tmp_path / "run")
    assert_holds(run, step)
    assert run.scores["validation"] == best
    assert "dropping the best checkpoint" in petl_log.text
    assert "adapter_model.safetensors has 100 bytes" in petl_log.text
    assert f"the best evaluation is now that of step {step}" in petl_log.text


def stop_and_damage(tiny, folder, monkeypatch, accuracies, settings=COURSE):
    """A run killed in step 4 whose best checkpoint, that of step 1, is then cut short."""

    def kill():
        raise Killed

    common = [*tiny.classify, "+method=lora", *settings]
    with monkeypatch.context() as patch:
        scripted(patch, accuracies[:3])
        before_step(patch, 4, kill)
        with pytest.raises(Killed):
            train(common, folder)
    cut_short(folder, 1)
    scripted(monkeypatch, accuracies[3:])
    return common


@pytest.mark.thorough
def test_a_resumed_run_drops_a_damaged_best_and_evaluates_again(
    tiny, tmp_path, monkeypatch, petl_log
):
    accuracies = [0.9, 0.3, 0.5, 0.6, 0.1]
    common = stop_and_damage(tiny, tmp_path / "run", monkeypatch, accuracies)
    run = train([*common, "train.resume=auto"], tmp_path / "run")
    assert_holds(run, 4)
    assert "the best evaluation is now that of step 3, the last one: accuracy 0.5000" in (
        petl_log.text
    )


@pytest.mark.thorough
def test_patience_is_counted_from_the_best_remaining_one(tiny, tmp_path, monkeypatch):
    settings = [*COURSE, "train.steps=9", "train.early_stopping=3"]
    accuracies = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]
    common = stop_and_damage(tiny, tmp_path / "run", monkeypatch, accuracies, settings)
    run = train([*common, "train.resume=auto"], tmp_path / "run")
    assert run.scores["steps"] == 5  # step 2 is the best, then 3, 4 and 5 are not
    assert_holds(run, 2)


@pytest.mark.thorough
def test_a_run_without_a_complete_checkpoint_takes_the_next_evaluation_as_best(
    tiny, tmp_path, monkeypatch, petl_log
):
    settings = [*COURSE, "train.eval_steps=2", "train.keep_checkpoints=1"]
    common = [*tiny.classify, "+method=lora", *settings]

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        scripted(patch, [0.9])
        before_step(patch, 4, kill)
        with pytest.raises(Killed):
            train(common, tmp_path / "run")
    cut_short(tmp_path / "run", 2)
    scripted(monkeypatch, [0.4, 0.3])
    run = train([*common, "train.resume=auto"], tmp_path / "run")
    assert "no earlier evaluation has a complete checkpoint" in petl_log.text
    assert run.scores["validation"] == 0.4
    assert_holds(run, 4)


def test_of_equal_scores_the_lowest_loss_is_the_best_and_then_the_first():
    task = Classification(classes=["a", "b"])
    pairs = {2: (0.5, 0.1), 4: (0.9, 0.4), 6: (0.9, 0.3), 8: (0.9, 0.3)}
    scores = {step: {"accuracy": a, "loss": loss} for step, (a, loss) in pairs.items()}
    assert best_of(scores, task) == 6
    assert best_of({2: {"loss": 0.5}, 4: {"loss": 0.9}, 6: {"loss": 0.5}}, CausalLM()) == 2
    assert best_of({}, task) is None


def test_a_lower_loss_at_the_same_score_is_the_best_but_no_improvement():
    task, state = Classification(classes=["a", "b"]), TrainState()
    course = [(0.9, 0.5, True, 0), (0.9, 0.4, True, 1), (0.9, 0.4, False, 2), (0.8, 0.1, False, 3)]
    for step, (accuracy, loss, is_best, stale) in enumerate([*course, (1.0, 0.9, True, 0)], 1):
        state.step = step
        assert state.note({"accuracy": accuracy, "loss": loss}, task) is is_best
        assert state.stale == stale
    assert (state.best, state.best_step) == (1.0, 5)
