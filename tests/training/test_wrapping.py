"""What a run adds to the fields of its method."""

import pytest
import torch
from tiny_tokenizers import byte_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import petl
from petl.data.models.loading import load_base
from petl.data.tasks.classification import Classification
from petl.system.settings.command_line import preset_of
from petl.training.compose import compose
from petl.training.runs.config import method_fields, with_inner
from petl.training.wrapping import train_new_modules

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def test_a_pooler_without_weights_is_trained_and_saved(tmp_path):
    tokenizer = byte_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), num_attention_heads=4, **SMALL)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"name": "path", "source": "path", "path": str(tmp_path), "dtype": "float32"}
    base = load_base(settings, Classification(["a", "b"]))
    fields = train_new_modules({"name": "mola", "task_type": "SEQ_CLS"}, base)
    model = petl.wrap(base, **fields)
    model.save_pretrained(tmp_path / "adapter")

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save" in name for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)


def test_unloading_leaves_a_head_of_several_layers_plain():
    config = RobertaConfig(vocab_size=50, num_attention_heads=4, **SMALL)
    base = RobertaForSequenceClassification(config)
    names = set(base.state_dict())
    model = petl.wrap(base, "mola", task_type="SEQ_CLS")
    plain = model.unload()

    assert set(plain.state_dict()) == names
    assert plain(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 2)


# A method over another


def test_inner_fields_that_are_not_set_are_those_of_the_inner_yaml():
    settings = {**preset_of("binary"), "inner": "mos", "r": 3}
    fields = method_fields(settings, "SEQ_CLS", total_steps=1)
    mos = preset_of("mos")
    assert mos["equivalent_rank"] != petl.build_config("mos").equivalent_rank
    assert fields == {**mos, "task_type": "SEQ_CLS", **settings}


def test_over_adapter_the_recipe_of_the_paper_stands():
    fields = method_fields(preset_of("binary"), "SEQ_CLS", total_steps=1)
    assert petl.build_config(**fields) == petl.build_config(
        "binary", task_type="SEQ_CLS", save_format="stacked"
    )
    given = with_inner({**preset_of("binary"), "locations": ["attn"]})
    assert (given["locations"], given["r"]) == (["attn"], 32)


def test_a_method_over_none_is_left_alone():
    assert with_inner(preset_of("mola")) == preset_of("mola")


def test_a_schedule_that_leaves_no_step_to_prune_in_names_its_settings():
    cfg = compose(["+method=adalora", "method.tinit=8", "method.tfinal=12"])
    with pytest.raises(petl.InputError, match=r"method\.tinit=8 .* and method\.tfinal=12 .* 20:"):
        method_fields(cfg.method, "SEQ_CLS", total_steps=20)
    assert method_fields(cfg.method, "SEQ_CLS", total_steps=21)["total_step"] == 21
