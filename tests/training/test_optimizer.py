"""Parameter groups and rates."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from training_fixtures import bert_config
from transformers import BertForSequenceClassification, get_scheduler

import petl
from petl.core.parameters import trainable
from petl.testing import tiny_bert
from petl.training.optimizer import all_finite, decays, fraction_of_peak, groups, make_optimizer
from petl.training.runs.settings import TrainConfig


@pytest.fixture
def model():
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], bias="lora_only", lora_bias=True
    )
    return get_peft_model(BertForSequenceClassification(bert_config()), config)


def rates(model, settings, key="lr"):
    names = {id(p): name for name, p in trainable(model)}
    return {names[id(p)]: g[key] for g in groups(model, settings) for p in g["params"]}


def test_head_and_adapter_learn_at_their_own_rates(model):
    found = rates(model, TrainConfig(lr=1e-3, head_lr=1e-2))
    assert {name for name, lr in found.items() if lr == 1e-2} == {
        name for name in found if "classifier" in name
    }
    assert set(found.values()) == {1e-3, 1e-2}
    assert set(rates(model, TrainConfig(head_lr=None)).values()) == {1e-3}


def test_trained_norms_of_the_backbone_keep_to_the_adapters_rate():
    base = BertForSequenceClassification(bert_config())
    fields = {"r": 4, "train_layer_norms": True, "task_type": "SEQ_CLS"}
    found = rates(petl.wrap(base, "adapter", **fields), TrainConfig(lr=1e-3, head_lr=1e-2))
    norms = {name for name in found if "LayerNorm.modules_to_save" in name}
    assert len(norms) == 2 * (1 + 2 * 2)  # weight and bias: of the embedding, two in each block
    assert {found[name] for name in norms} == {1e-3}
    assert {name for name, lr in found.items() if lr == 1e-2} == {
        name for name in found if "classifier" in name
    }


def test_every_trainable_tensor_is_in_exactly_one_group(model):
    listed = [p for g in groups(model, TrainConfig(loraplus_ratio=4)) for p in g["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for _, p in trainable(model)}


def test_loraplus_raises_the_same_tensors_as_pefts_optimizer(model):
    reference = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    raised = {id(p) for g in reference.param_groups if g["lr"] > 1e-3 for p in g["params"]}
    names = {id(p): name for name, p in trainable(model)}
    # PEFT also raises what has one dimension, such as the head's bias; here the head has its rate
    expected = {names[i] for i in raised if "lora_B" in names[i]}
    ours = rates(model, TrainConfig(lr=1e-3, head_lr=1e-3, loraplus_ratio=16))
    assert {name for name, lr in ours.items() if lr == pytest.approx(16e-3)} == expected
    assert len(expected) > 0


def test_biases_and_norms_do_not_decay(model):
    decay = rates(model, TrainConfig(weight_decay=0.1), "weight_decay")
    shapes = {name: p.dim() for name, p in trainable(model)}
    assert {name for name, w in decay.items() if w == 0} == {n for n, d in shapes.items() if d == 1}


def test_factors_that_begin_as_a_part_of_the_weight_do_not_decay():
    base = BertForSequenceClassification(bert_config())
    options = {"task_type": "SEQ_CLS", "init_lora_weights": "pissa", "r": 2}
    model = petl.wrap(base, "lora", target_modules="query-value", **options)
    decay = rates(model, TrainConfig(weight_decay=0.1), "weight_decay")
    assert {name for name, w in decay.items() if w} == {
        name for name in decay if name.endswith("classifier.modules_to_save.default.weight")
    }
    assert any("lora_A" in name for name in decay)


@pytest.mark.parametrize("method", ["ia3", "boft", "lora"])
def test_decay_alone_leaves_the_base_model_as_it_is(method):
    base = tiny_bert().eval()
    batch = {"input_ids": torch.arange(1, 9)[None]}
    before = base(**batch).logits.detach()
    model = petl.wrap(base, method, target_modules=["query", "value"])
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, weight_decay=1.0))
    for _, parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model(**batch).logits, before)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_after_the_warmup_the_rate_is_that_of_transformers(schedule):
    total, warmup = 50, 7
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    reference = get_scheduler(name, optimizer, warmup, total)
    for step in range(1, total + 1):
        if step > warmup:
            expected = optimizer.param_groups[0]["lr"]
            assert fraction_of_peak(step, total, warmup, schedule) == pytest.approx(expected)
        optimizer.step()
        reference.step()


def test_the_rate_rises_evenly_over_the_warmup_and_is_never_zero():
    shares = [fraction_of_peak(s, 20, 4, "linear") for s in range(1, 21)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert min(shares) > 0


def test_a_bf16_head_is_raised_to_float32():
    head = nn.Linear(2, 2).bfloat16()
    make_optimizer(head, TrainConfig())
    assert {p.dtype for p in head.parameters()} == {torch.float32}


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_value_that_is_not_finite_is_found_wherever_it_hides(where):
    layer = nn.Linear(3, 3)
    optimizer = make_optimizer(layer, TrainConfig())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert all_finite(layer, optimizer)
    target = layer.weight.data if where == "weight" else optimizer.state[layer.weight]["exp_avg"]
    target[1, 1] = float("nan")
    assert not all_finite(layer, optimizer)


def test_matrices_and_sparse_values_decay():
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    assert decays("q_proj.lora_A.default.weight", matrix)
    assert decays("q_proj.petl_sparse_adapters.default.values", vector)
    assert not decays("q_proj.bias", vector)
    assert not decays("embed_tokens.trainable_tokens_delta.default", matrix)
