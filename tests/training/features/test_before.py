"""The scores before training: of a second run on the same base and rows, those of the first."""

import pytest
import torch
from training_fixtures import train
from transformers import LlamaForCausalLM

pytest_plugins = ["task_fixtures", "training_fixtures"]


@pytest.fixture
def scored(families, tmp_path, monkeypatch):
    """Runs with the words: scores.json, and how many passes computed something to score."""
    passes = []
    forward = LlamaForCausalLM.forward

    def counted(self, *args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    common = ["data.generate=null", "train.steps=2", "train.eval_batch_size=2", "retain.data=null"]

    def run(*words):
        passes.clear()
        name = f"run-{len([*tmp_path.iterdir()])}"
        found = train(families("causal_lm", *common, *words), tmp_path / name)
        return found.scores, passes.count(False)

    return run


def test_a_second_run_reads_what_the_first_has_scored(scored):
    first, computed = scored("+method=lora")
    again, fewer = scored("+method=mola", "train.seed=5", "train.lr=1e-2")
    assert again["before"] == pytest.approx(first["before"], abs=1e-6)
    assert again["after"] != first["after"]
    assert fewer < computed - 1
    # without the pass of the first: the same
    other, _ = scored("+method=lora", "train.score_before=false")
    assert other["after"] == first["after"]


def test_other_rows_batches_or_starts_are_scored_anew(scored):
    first, computed = scored("+method=lora")
    rows, _ = scored("+method=lora", "data.test_rows=5")
    assert rows["before"] != first["before"]
    batches, _ = scored("+method=lora", "train.eval_batch_size=3")
    assert batches["before"] == pytest.approx(first["before"], rel=1e-5)
    # a start that is not the base's
    begun, passes = scored("+method=binary")
    assert begun["before"]["loss"] != pytest.approx(first["before"]["loss"], rel=1e-6)
    assert passes >= computed
