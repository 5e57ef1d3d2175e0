"""Runs of train.py over each family of tasks, and what comes after: eval, merge, export, resume."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from task_fixtures import SETTINGS, metrics_without_times
from training_fixtures import stopped_before, train
from transformers import AutoTokenizer

from petl.adapters.export import saved_adapter
from petl.adapters.export.lora import export_lora
from petl.adapters.export.merge import merge
from petl.data.models.loading import load_base
from petl.efficiency.skip_unread import labelled_positions
from petl.errors import InputError
from petl.experiments.planning.plan import plan_run
from petl.training.compose import compose

pytest_plugins = ["task_fixtures", "training_fixtures"]
pytestmark = pytest.mark.usefixtures("own_cache")

HEADS = {"multi_label", "regression", "token_classification", "question_answering"}
EXPECTED = {
    "multi_label": {"micro_f1", "macro_f1", "loss", "threshold", "rows"},
    "regression": {"pearson", "spearman", "mse", "rows"},
    "token_classification": {"f1", "precision", "recall", "macro_f1", "accuracy", "loss", "words"},
    "question_answering": {"exact_match", "f1", "loss", "rows"},
    "causal_lm": {
        "loss",
        "perplexity",
        "tokens",
        "exact_match",
        "rouge1",
        "rouge2",
        "rougeL",
        "answers",
    },
}
EXPECTED["retrieval"] = {
    *("accuracy_at_1", "recall_at_1", "recall_at_5", "recall_at_10", "recall_at_100"),
    *("mrr_at_10", "ndcg_at_10", "ndcg_at_10_interval", "map_at_100"),
    *("queries", "queries_left_out", "queries_with_ties"),
}
EXPECTED["reranking"] = EXPECTED["retrieval"]
EXPECTED["seq2seq"] = EXPECTED["causal_lm"]


# tests/journeys/test_rerankers.py and test_train_streaming.py have these, too
LATER = ("reranking", "regression")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(task, marks=pytest.mark.thorough if task in LATER else [])
        for task in sorted(SETTINGS)
    ],
)
def run(request, families, tmp_path_factory):
    """A run of a family whose adapter is PEFT's own, the task, and its overrides."""
    words = families(request.param, "+method=lora", "method.target_modules=all-linear")
    return train(words, tmp_path_factory.mktemp(request.param) / "run"), request.param, words


def test_a_run_learns_and_its_scores_are_those_people_expect(run):
    finished, task, _ = run
    scores = finished.scores
    assert set(scores["after"]) == EXPECTED[task] == set(scores["before"])
    assert finished.metrics[-1]["step"] == 8
    losses = [line["loss"] for line in finished.metrics if "loss" in line]
    assert losses[-1] < losses[0]


def test_the_best_checkpoint_is_that_of_the_metric(run):
    finished, _, _ = run
    scores = finished.scores
    held = {m["step"]: m["validation"] for m in finished.metrics if "validation" in m}
    best = max if scores["higher_is_better"] else min
    found = {step: values[scores["metric"]] for step, values in held.items()}
    assert scores["validation"] == best(found.values()) == found[scores["best_step"]]
    kept = load_file(
        finished.path / "checkpoints" / f"step-{scores['best_step']:06d}" / "adapter"
        / "adapter_model.safetensors"
    )  # fmt: skip
    assert all(torch.equal(kept[name], tensor) for name, tensor in finished.adapter.items())


def test_a_new_head_is_also_trained_alone_and_saved(run):
    finished, task, _ = run
    alone = finished.scores.get("linear_probe")
    assert (alone is not None) == (task in HEADS)
    if alone is not None:
        assert set(alone) == EXPECTED[task] | {"lr"}
    heads = [key for key in finished.adapter if "classifier" in key or "qa_outputs" in key]
    assert bool(heads) == (task in {*HEADS, "reranking"})


@pytest.mark.cells(1)
@pytest.mark.parametrize("run", ["multi_label", "question_answering"], indirect=True)
def test_the_scores_before_training_are_those_without_a_linear_probe(run, tmp_path):
    finished, _, words = run
    alone = train([*words, "train.linear_probe=false", "train.steps=4"], tmp_path / "alone")
    assert alone.scores["before"] == finished.scores["before"]


@pytest.mark.thorough
@pytest.mark.parametrize("run", ["causal_lm"], indirect=True)
def test_a_language_model_trains_alike_if_it_computes_all_positions(run, tmp_path, monkeypatch):
    finished, _, words = run
    reader = labelled_positions.LabelReader
    monkeypatch.setattr(reader, "forward", None)  # not used
    plain = train([*words, "train.skip_unread=false"], tmp_path / "plain")
    for when in ("before", "after"):
        assert finished.scores[when] == pytest.approx(plain.scores[when], rel=1e-4)
    losses = [[m["loss"] for m in each.metrics if "loss" in m] for each in (finished, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.cells(2)
def test_eval_gives_the_scores_of_the_run(run):
    finished, _, _ = run
    again = saved_adapter.score(saved_adapter.find(finished.path))
    assert again == pytest.approx(finished.scores["after"], rel=1e-6)


@pytest.mark.thorough
def test_eval_reads_texts_with_the_prompts_of_the_base(families, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(families.folder / "bert", base)
    prompts = {"prompts": {"query": "what is a ", "document": "it is "}}
    (base / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    run = train(["+method=lora", *families("retrieval"), f"model.path={base}"], tmp_path / "run")
    again = saved_adapter.score(saved_adapter.find(run.path))
    assert again == pytest.approx(run.scores["after"], rel=1e-6)


@pytest.mark.cells(2)
def test_it_merges_and_the_merged_model_scores_the_same(run, tmp_path):
    finished, _, _ = run
    found = saved_adapter.find(finished.path)
    written = merge(found, tmp_path / "merged", None)
    assert written.difference.effect > 100 * written.difference.relative
    plain = load_base(found.model_at(tmp_path / "merged"), found.task)
    assert not [name for name in plain.state_dict() if "lora" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "[PAD]"


@pytest.mark.cells(2)
def test_an_adapter_without_its_run_is_known_by_its_type(run, tmp_path):
    finished, _, _ = run
    alone = saved_adapter.find(finished.path / "adapter")
    orphan = saved_adapter.SavedAdapter(alone.adapter, None, {"model": alone.settings["model"]})
    assert orphan.task.peft_task_type == orphan.config.task_type
    assert orphan.task.auto_class is saved_adapter.find(finished.path).task.auto_class
    (tmp_path / "free").mkdir()
    merge(orphan, tmp_path / "free", None)


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["question_answering", "seq2seq"])  # with a head and without
def test_another_method_trains_it_and_becomes_a_plain_lora(families, tmp_path, task):
    run = train(families(task, "+method=mos", "method.r=4"), tmp_path / "run")
    again = saved_adapter.score(saved_adapter.find(run.path))
    assert again == pytest.approx(run.scores["after"], rel=1e-6)
    written = export_lora(saved_adapter.find(run.path), tmp_path / "lora", None)
    assert written.difference.relative < 1e-4


# others: test_train_streaming.py, test_resume.py
@pytest.mark.cells(1)
@pytest.mark.parametrize("run", ["multi_label", "retrieval", "seq2seq"], indirect=True)
def test_a_stopped_run_resumes_bit_exactly(run, tmp_path):
    straight, _, words = run
    stopped = stopped_before(straight, tmp_path / "resumed", "step-000008")
    resumed = train([*words, "train.resume=auto"], stopped.path)
    assert metrics_without_times(resumed) == metrics_without_times(straight)
    for name, tensor in straight.adapter.items():
        assert torch.equal(resumed.adapter[name], tensor)


@pytest.mark.cells(1)
def test_micro_batches_give_the_gradient_of_the_whole_batch(run, tmp_path):
    finished, _, words = run
    pieces = train([*words, "train.micro_batch_size=3", "train.test=false"], tmp_path / "pieces")
    for name, tensor in finished.adapter.items():
        if name.endswith("qa_outputs.bias"):
            continue  # a choice among tokens does not depend on it: its gradient is rounding
        torch.testing.assert_close(pieces.adapter[name], tensor, rtol=2e-3, atol=2e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["causal_lm", "question_answering"])
def test_it_can_be_planned_without_weights(families, task):
    plan = plan_run(compose(families(task, "+method=lora")))
    assert plan.saved > 0
    assert (plan.memory.pass_ is not None) or plan.memory.unknown


@pytest.mark.thorough
def test_windows_of_one_question_are_held_out_together(families, tmp_path):
    run = train(families("question_answering", "+method=lora", "train.steps=1"), tmp_path / "run")
    held = [line["validation"] for line in run.metrics if "validation" in line]
    assert held[0]["rows"] == 12  # a fifth of the questions, whatever their windows


def test_rows_and_answers_beyond_the_positions_are_refused(families, tmp_path):
    words = families("causal_lm", "+method=lora", "data.generate=40")
    with pytest.raises(InputError, match=r"72 tokens.* 64 .*data\.generate"):
        train(words, tmp_path / "run")
