"""Under autocast the head of a task computes in float32, its body in bfloat16."""

import copy

import pytest
import torch
from training_fixtures import bert_config, llama_config, write_model
from transformers import BertModel, LlamaModel, RobertaConfig, RobertaModel

import petl
from petl.core.model.linear import is_linear
from petl.data.models.loading import load_base, new_modules
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.question_answering import QuestionAnswering
from petl.data.tasks.regression import Regression

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
MODELS = {
    "bert": (BertModel, bert_config),
    "llama": (LlamaModel, llama_config),
    "roberta": (RobertaModel, lambda: RobertaConfig(num_attention_heads=2, **SMALL)),
}
CASES = [  # model, task, the layer that computes its output
    ("bert", Regression(max_length=16), "classifier"),
    ("llama", Classification(max_length=16, classes=["a", "b", "c"]), "score"),
    ("roberta", Regression(max_length=16), "classifier.out_proj"),
    ("bert", QuestionAnswering(max_length=16), "qa_outputs"),
]


def loaded(kind, task, folder, dtype="float32"):
    write_model(folder, MODELS[kind][0], MODELS[kind][1]())
    return load_base({"source": "path", "name": "x", "path": str(folder), "dtype": dtype}, task)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "task", "name"), CASES)
def test_the_head_of_an_adapted_model_is_not_rounded(kind, task, name, dtype, tmp_path):
    base = loaded(kind, task, tmp_path, dtype)
    model = petl.wrap(base, "lora", target_modules="all-linear", modules_to_save=new_modules(base))
    model.eval()
    head = model.get_submodule(f"base_model.model.{name}")
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    read, written = [], []
    head.register_forward_hook(lambda _, x, y: read.append(x[0]) or written.append(y))
    ids = torch.randint(4, 12, (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
    expected = read[0].double() @ head.weight.double().T
    expected = expected if head.bias is None else expected + head.bias.double()
    assert written[0].dtype == torch.float32
    assert (written[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.equal(written[0], written[0].bfloat16().float())


def test_the_body_is_in_bfloat16_and_without_autocast_nothing_changes(tmp_path):
    model = loaded("bert", Regression(max_length=16), tmp_path)
    plain = type(model).from_pretrained(tmp_path, num_labels=1)
    plain.classifier.load_state_dict(model.classifier.state_dict())
    ids = torch.arange(4, 12)[None]
    assert torch.equal(model(ids).logits, plain.eval()(ids).logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    assert is_linear(model.classifier)
    read = []
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *all: read.append(all))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert read[0][2].dtype == torch.bfloat16


def test_the_head_of_a_language_model_is_as_autocast_has_it(tmp_path):
    from transformers import LlamaForCausalLM

    write_model(tmp_path, LlamaForCausalLM, llama_config())
    settings = {"source": "path", "name": "x", "path": str(tmp_path), "dtype": "float32"}
    model = load_base(settings, CausalLM(max_length=16))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.arange(4, 12)[None]).logits.dtype == torch.bfloat16
