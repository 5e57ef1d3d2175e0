"""What a run adds to the fields of its method."""

import pytest
import torch
from peft import get_peft_model_state_dict
from tiny_tokenizers import byte_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import petl
from petl.data.models.loading import load_base
from petl.data.tasks.classification import Classification
from petl.data.tasks.retrieval import Retrieval
from petl.system.settings.command_line import preset_of
from petl.training.compose import compose
from petl.training.runs.config import method_fields, with_inner
from petl.training.wrapping import train_new_modules, wrap_for_run

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


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {"target_modules": "block-linear"}),
        ("mola", {}),
        ("lora", {"target_modules": ["dense"], "exclude_modules": ["intermediate.dense"]}),
        ("lora", {"target_modules": ".*dense", "exclude_modules": ".*0.output.dense"}),
    ],
)
def test_an_embedders_adapter_fits_the_base_with_its_pooler_and_without(
    method, fields, pooler, tmp_path, caplog, recwarn
):
    tokenizer = byte_tokenizer()
    # so many targets that PEFT saves the ends of their names
    sizes = {**SMALL, "num_hidden_layers": 4}
    BertModel(
        BertConfig(vocab_size=len(tokenizer), num_attention_heads=4, **sizes)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"name": "path", "source": "path", "path": str(tmp_path), "dtype": "float32"}
    base = load_base(settings, Retrieval())
    trained = wrap_for_run(base, {"name": method, "task_type": "FEATURE_EXTRACTION", **fields})
    trained.save_pretrained(tmp_path / "adapter")
    # as a run's folder is read, too
    petl.load(load_base(settings, Retrieval()), tmp_path / "adapter")
    plain = BertModel.from_pretrained(tmp_path, add_pooling_layer=pooler)
    loaded = petl.load(plain, tmp_path / "adapter")
    saved = set(get_peft_model_state_dict(trained))
    assert saved
    assert set(get_peft_model_state_dict(loaded)) == saved
    assert not [each for each in recwarn if "exclude_modules" in str(each.message)]
    assert "exclude_modules" not in caplog.text


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
    assert method_fields(cfg.method, "SEQ_CLS", total_steps=21)["total_step"] == 21
