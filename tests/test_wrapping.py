"""What a run adds to the fields of its method."""

import torch
from tiny_tokenizers import byte_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import petl
from petl.models import load_base
from petl.tasks import Classification
from petl.wrapping import train_new_modules

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
