"""Copies of models without values."""

import pickle

import peft
import pytest
from transformers import AutoTokenizer, BatchEncoding

import petl
from petl import testing
from petl.core.skeleton import skeleton_of


def test_an_adapter_on_a_skeleton_leaves_the_config_of_the_model():
    base = testing.tiny_llama()
    skeleton = skeleton_of(base)
    assert skeleton.config is skeleton.model.config
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 1]])
    peft.get_peft_model(skeleton, config)
    assert base.config.num_hidden_layers == len(base.model.layers) == 3


def test_prompts_made_from_a_text_load_without_its_tokenizer(tmp_path, monkeypatch):
    made_from = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a review"}
    fields = {"num_virtual_tokens": 4, "tokenizer_name_or_path": str(tmp_path / "no_tokenizer")}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", **made_from, **fields)
    with monkeypatch.context() as patched:
        tokenize = lambda text: BatchEncoding({"input_ids": [1, 2, 3]})  # noqa: E731
        patched.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenize)
        model = peft.get_peft_model(testing.tiny_llama(), config)
    model.save_pretrained(tmp_path)
    loaded = petl.load(testing.tiny_llama(), tmp_path)
    prompt = loaded.prompt_encoder.default.embedding.weight
    assert prompt.equal(model.prompt_encoder.default.embedding.weight)
    assert loaded.peft_config["default"].prompt_tuning_init == "TEXT"


@pytest.mark.parametrize("name", ["boft", "shira"])
def test_copies_of_a_model_have_no_second_base(name, tmp_path):
    fields = {"boft": {"boft_block_size": 4}, "shira": {"r": 2}}[name]
    model = petl.wrap(testing.tiny_llama(), name, target_modules=["q_proj"], **fields)
    model.save_pretrained(tmp_path)
    loaded = petl.load(testing.tiny_llama(), tmp_path)
    before = len(pickle.dumps(loaded))
    petl.load(loaded, tmp_path, adapter_name="other")
    assert len(pickle.dumps(loaded)) < 1.3 * before
