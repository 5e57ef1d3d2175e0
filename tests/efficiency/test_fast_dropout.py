"""Dropout of the base model from random bits: torch's distribution, other masks."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import petl
from petl.core.layers.grouped import RowDropout
from petl.efficiency.fused_lora.layer import FusedLoraLinear
from petl.efficiency.rewrite import apply_rewrites, rewrite
from petl.errors import UnsupportedError
from petl.ops.dropout import dropout, keep_mask

SETTING = "fast_dropout"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}


def bert(hidden_dropout_prob=0.2, **fields):
    torch.manual_seed(0)
    config = BertConfig(
        **SIZES, hidden_dropout_prob=hidden_dropout_prob, attention_probs_dropout_prob=0.0
    )
    model = BertForSequenceClassification(config)
    return petl.wrap(model, "lora", target_modules=["query", "value"], **fields).train()


def batch():
    ids = torch.arange(1, 25).view(3, 8)
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}


class Alone(nn.Module):
    """A layer of dropout as a model."""

    def __init__(self, p):
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.drop(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
def test_values_are_dropped_with_the_probability_and_the_others_scaled(p, dtype):
    torch.manual_seed(3)
    model = Alone(p).train()
    assert rewrite(SETTING).apply(model) == 1
    x = torch.full((1000, 1001), 2.0, dtype=dtype, requires_grad=True)  # no multiple of 4 values
    y = model(x)
    y.sum().backward()
    dropped = y == 0
    count, expected = int(dropped.sum()), p * x.numel()
    deviation = (x.numel() * p * (1 - p)) ** 0.5
    assert abs(count - expected) < 5 * deviation
    # in each column and each row alike: 5 deviations of 1,000 draws
    for side in (0, 1):
        shares = dropped.double().mean(side)
        assert (shares - p).abs().max() < 5.5 * (p * (1 - p) / 1000) ** 0.5 + 1e-3
    # neighbors are independent
    both = (dropped[:, 1:] & dropped[:, :-1]).double().mean()
    assert abs(float(both) - p**2) < 5 * (p**2 * (1 - p**2) / x.numel()) ** 0.5 + 1e-5
    kept = y[~dropped].float()
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - p)), rtol=1e-2, atol=0)
    if dtype is torch.float32:
        torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - p)), rtol=1e-3, atol=0)
    # the gradient goes where the values went
    torch.testing.assert_close(x.grad.float(), y.detach().float() / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 256), (16, 1 / 65536)])
@pytest.mark.parametrize("p", [1e-9, 0.1, 1 - 1e-9])
def test_the_mean_of_a_mask_is_exact_for_the_rounded_probability(bits, step, p):
    _, mean = keep_mask(torch.ones(1), p, bits=bits)
    assert (1 - mean) / step == round((1 - mean) / step)
    assert 0 < mean < 1
    assert abs(1 - mean - p) <= step


def test_several_adapters_in_one_pass_draw_as_each_alone():
    x, p, seeds = torch.randn(6, 7), 0.3, (11, 12)
    with RowDropout([torch.Generator().manual_seed(seed) for seed in seeds], 3):
        together = dropout(x, p)
    for seed, rows, found in zip(seeds, x.chunk(2), together.chunk(2), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(found, dropout(rows, p))
    assert not torch.equal(together[:3] == 0, together[3:] == 0)


def test_one_seed_gives_one_result_and_copies_draw_the_same():
    model = bert()
    assert apply_rewrites(model, {SETTING: True}) == [SETTING]
    losses = []
    for twin in (model, model, copy.deepcopy(model)):
        torch.manual_seed(5)
        losses.append(float(twin(**batch()).loss.detach()))
    torch.manual_seed(6)
    assert losses[0] == losses[1] == losses[2] != float(model(**batch()).loss.detach())


def test_evaluation_and_what_adapters_drop_stay():
    model = bert(lora_dropout=0.3)
    model.eval()
    plain = model(**batch()).logits
    own = sum(type(module) is nn.Dropout and module.p > 0 for module in model.modules())
    adapters = sum("lora_dropout" in name for name, _ in model.named_modules()) // 2
    assert rewrite(SETTING).apply(model) == own - adapters
    assert torch.equal(model(**batch()).logits, plain)
    petl.fuse_lora(model)
    fused = [module for module in model.modules() if type(module) is FusedLoraLinear]
    assert all(type(layer.lora_dropout["default"]) is nn.Dropout for layer in fused)
    assert len(fused) == adapters
    rewrite(SETTING).undo(model)
    assert sum(type(module) is nn.Dropout and module.p > 0 for module in model.modules()) == own


def test_checkpointing_recomputes_the_same_masks():
    gradients = []
    for checkpointed in (False, True):
        model = bert()
        rewrite(SETTING).apply(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        model(**batch()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert any(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_a_base_without_dropout_has_nothing_to_draw():
    with pytest.raises(UnsupportedError, match="dropout"):
        rewrite(SETTING).apply(bert(hidden_dropout_prob=0.0, lora_dropout=0.3))
