"""Demonstrations of a run: which texts they are, and that none is compared on."""

import json

import pytest
import torch
from accelerate import Accelerator
from training_fixtures import llama_config, train, write_model
from transformers import AutoTokenizer, LlamaForCausalLM

import petl
from petl.data.models.loading import load_processor
from petl.errors import InputError
from petl.experiments.planning.plan import plan_run
from petl.methods.icv import Icv
from petl.methods.icv.demonstrations import Pairs, demonstrations, held_rows, settings_of, texts_of
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures", "task_fixtures"]


def chat(families, *words):
    """Overrides of a run on questions with an answer of one word."""
    folder = families.folder
    return [
        "+method=icv", "model=path", f"model.path={folder}/llama", "data=files",
        f"data.train={folder}/train.jsonl", f"data.test={folder}/test.jsonl",
        "data.task=causal_lm", "data.prompt=text", "data.answer=target", "data.max_length=32",
        "train.linear_probe=false", "method.calibration_data.num_samples=20", *words,
    ]  # fmt: skip


def splits_of(overrides):
    config = read_config(compose(overrides))
    data = config.data.read()
    processor = load_processor(config.model, data.task)
    return config, encode_splits(data, processor, config.train, Accelerator(cpu=True))


def test_question_and_answer_are_the_last_of_a_conversation():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert texts_of(row, "answers") == {"source": "c", "target": "d"}
    assert texts_of({"text": "x", "target": "y"}, "answers") == {"source": "x", "target": "y"}
    assert texts_of({"text": "x", "text_pair": "y"}, "columns") == {"source": "x", "target": "y"}


def test_texts_are_encoded_without_closing_tokens_and_padded(tmp_path):
    write_model(tmp_path, LlamaForCausalLM, llama_config(), cls_token="[CLS]")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pairs = Pairs([{"text": " the cat ", "target": "dog"}], tokenizer, "columns")
    ids = tokenizer.convert_tokens_to_ids
    assert pairs[0] == {"source": ids(["[CLS]", "the", "cat"]), "target": ids(["[CLS]", "dog"])}
    batch = pairs.collate([pairs[0], {"source": [5], "target": [6, 7, 8]}])
    assert batch["source_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["target_input_ids"][1].tolist() == [6, 7, 8]
    with pytest.raises(InputError):
        Pairs([{"text": "the", "target": ""}], tokenizer, "columns")[0]


def test_rows_that_strengths_are_compared_on_are_no_demonstrations(families):
    config, splits = splits_of(chat(families))
    built = petl.build_config(**config.method)
    shown = demonstrations(built, config, splits)
    assert len(shown.order) == 20
    held = held_rows(splits, settings_of(built))
    tokens = {tuple(row["input_ids"]) for row in held}
    assert len(held) == 40
    for number in shown.order:  # positions are those of the encoded rows
        assert tuple(splits.train[number]["input_ids"]) not in tokens
        text = splits.processor.decode(splits.train[number]["input_ids"])
        source, target = (splits.processor.decode(ids) for ids in shown.rows[number].values())
        assert source.removeprefix("[CLS] ") in text
        assert text.endswith(f"{target.removeprefix('[CLS] ')} [SEP]")


def test_a_run_computes_scores_and_saves_without_training(families, tmp_path):
    run = train(chat(families, "method.strength=0.2"), tmp_path)
    assert run.scores["steps"] == 0
    assert run.scores["adapter_parameters"] == 2 * 32
    assert run.scores["trainable_parameters"] == 0
    curve = run.scores["strengths"]
    assert (curve["metric"], curve["rows"], curve["used"]) == ("loss", 40, 0.2)
    assert list(curve["scores"]) == [f"{strength:g}" for strength in Icv.strengths]
    assert len(set(curve["scores"].values())) == len(Icv.strengths)
    page = (tmp_path / "report.html").read_text()
    assert "Loss on 40 held-out examples" in page
    assert "ICV: size of the vectors" in page
    # the scores before are the base model's, those after the saved adapter's
    _, splits = splits_of(chat(families))
    model = petl.load(base_of(families), tmp_path / "adapter").eval()
    assert model.peft_config["default"].strength == 0.2
    assert loss_of(model, splits) == pytest.approx(run.scores["after"]["loss"], rel=1e-5)
    model.peft_config["default"].strength = 0.0
    assert loss_of(model, splits) == pytest.approx(run.scores["before"]["loss"], rel=1e-5)


def base_of(families):
    return LlamaForCausalLM.from_pretrained(families.folder / "llama")


@torch.no_grad()
def loss_of(model, splits):
    """Mean loss of the labeled tokens of the test rows, one row at a time."""
    total, count = 0.0, 0
    for row in splits.test:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for t, label in enumerate(labels[0, 1:].tolist()):
            if label != -100:
                total, count = total - float(log_p[t, label]), count + 1
    return total / count


def test_auto_takes_the_best_strength_on_held_out_rows(families, tmp_path):
    run = train(chat(families, "method.strength=auto", "train.score_before=false"), tmp_path)
    scores = run.scores["strengths"]["scores"]
    best = min(scores, key=scores.get)
    assert run.scores["strengths"]["used"] == float(best)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["strength"] == float(best)


@pytest.mark.thorough
def test_vectors_that_train_start_at_the_demonstrations(families, tmp_path):
    fixed = train(chat(families, "train.score_before=false"), tmp_path / "fixed")
    words = ("method.train=true", "train.steps=2", "train.score_before=false", "train.lr=1e-5")
    trained = train(chat(families, *words), tmp_path / "trained")
    assert trained.scores["trainable_parameters"] == 64
    for key, tensor in fixed.adapter.items():
        assert not torch.equal(trained.adapter[key], tensor)
        torch.testing.assert_close(trained.adapter[key], tensor, atol=1e-4, rtol=0)


@pytest.mark.thorough
def test_two_columns_of_other_data_can_be_the_demonstrations(families, tmp_path):
    other = [
        "+data@method.calibration_data.data=files",
        f"method.calibration_data.data.train={families.folder}/train.jsonl",
        "method.calibration_data.data.task=seq2seq", "method.pairs=columns",
        "train.score_before=false",
    ]  # fmt: skip
    run = train(chat(families, *other), tmp_path)
    assert run.scores["strengths"]["rows"] == 60  # none of the run's own rows is a demonstration
    assert len(run.adapter) == 2


@pytest.mark.thorough
def test_a_plan_has_no_pass_of_training(families):
    found = plan_run(compose(chat(families)))
    assert (found.length.steps, found.memory.pass_, found.time) == (0, None, None)
    assert "nothing trains" in found.memory.unknown
    assert found.memory.scoring_total > found.memory.weights
    assert found.saved == 2 * 32
    assert found.groups == []


WRONG = {
    "train.steps=3": ["train.steps=3"],
    "train.find_lr": ["train.find_lr=true"],
    "loss=density": ["+loss=density"],
    "size": ["train.budget=100"],
    "text and target": ["method.pairs=columns"],
    "strength=auto": [
        "method.strength=auto", "method.calibration_data.num_samples=60",
    ],
    "num_samples=0": ["method.calibration_data.num_samples=0"],
}  # fmt: skip


@pytest.mark.cells(2)
@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused_before_anything_is_written(families, tmp_path, message):
    with pytest.raises(InputError, match=message):
        train(chat(families, *WRONG[message]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_that_trains_nothing_has_a_run_of_no_steps():
    assert TrainConfig(steps=0).steps_of_run(10) == 0
