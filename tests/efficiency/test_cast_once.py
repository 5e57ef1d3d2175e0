"""Frozen weights that are cast once: the same to the bit, and never those of before a change."""

import copy
import pickle

import pytest
import torch

from petl.efficiency.cast_once import cast_for_decoding
from petl.efficiency.rewrite import apply_rewrites, rewrite
from petl.errors import UnsupportedError
from petl.ops import packed
from petl.testing import Case

SETTING = "cast_once"
CASES = {
    "lora": Case("lora", "llama", {"target_modules": "block-linear", "lora_dropout": 0.2}),
    "lora on bert": Case("lora", "bert", {"target_modules": ["query", "value"]}),
    "mola": Case("mola", "llama", {"num_experts": 3, "target_modules": "block-linear"}),
    "sparse": Case("sparse", "bert", {"density": 0.1, "selection_algorithm": "none"}),
}


def wrapped(name, *settings):
    model = CASES[name].without_head().wrap_stirred().train()
    asked = {"fuse_lora": True, "loss_segment": "auto", **dict.fromkeys(settings, True)}
    apply_rewrites(model, asked)
    return model


def step(model, name, dtype=torch.bfloat16):
    """Loss and gradients of a step under autocast."""
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    with torch.autocast("cpu", dtype):
        loss = model(**CASES[name].batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_same_to_the_bit_and_so_is_each_later_one(name):
    plain, held = wrapped(name), wrapped(name, SETTING)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16):
        expected = step(plain, name, dtype)
        assert_equal(step(held, name, dtype), expected)
    for twin in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):  # our own bytes
        assert_equal(step(twin, name), expected)
    assert held.state_dict().keys() == plain.state_dict().keys()


def in_place(model):
    with torch.no_grad():
        for parameter in frozen(model):
            parameter.mul_(1.5)


def by_assignment(model):
    for parameter in frozen(model):
        parameter.data = parameter.data * 1.5


def between_modes(model):
    model.eval()
    for parameter in frozen(model):
        parameter.data.mul_(1.5)  # as merging does
    model.train()


def frozen(model):
    return [p for p in model.parameters() if not p.requires_grad and p.dim() == 2]


@pytest.mark.parametrize("change", [in_place, by_assignment, between_modes])
def test_a_changed_weight_is_cast_again(change):
    plain, held = wrapped("lora"), wrapped("lora", SETTING)
    first = step(held, "lora")
    for model in (plain, held):
        change(model)
    found = step(held, "lora")
    assert_equal(found, step(plain, "lora"))
    assert not torch.equal(found[0], first[0])


def test_weights_that_train_or_are_in_bfloat16_are_left_alone():
    model = wrapped("lora")
    head = model.get_output_embeddings()
    head.weight.requires_grad_(True)
    assert rewrite(SETTING).apply(model) > 0
    plain = wrapped("lora")
    plain.get_output_embeddings().weight.requires_grad_(True)
    for _ in range(2):
        assert_equal(step(model, "lora"), step(plain, "lora"))
        for each in (model, plain):  # an optimizer's step
            weight = each.get_output_embeddings().weight
            weight.data.sub_(0.1 * weight.grad)
    half = wrapped("lora on bert").to(torch.bfloat16)
    with pytest.raises(UnsupportedError):
        rewrite(SETTING).apply(half)


@pytest.mark.parametrize("in_training", [False, True])
def test_decoding_casts_a_frozen_weight_once_and_writes_the_same(in_training, monkeypatch):
    model = wrapped("lora", *[SETTING] * in_training).eval()
    prompt = {name: CASES["lora"].batch()[name][:2, :6] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_scores": True}

    def answers():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model.generate(**prompt, **settings, return_dict_in_generate=True).scores

    expected, kinds, casts = answers(), [type(each) for each in model.modules()], []
    weight_in = packed.CastLinear.weight_in

    def counted(layer, dtype):
        weight = weight_in(layer, dtype)
        casts.append(weight.data_ptr())
        return weight

    monkeypatch.setattr(packed.CastLinear, "weight_in", counted)
    for change in (None, in_place, by_assignment):
        if change is not None:
            change(model)
            expected = answers()
            casts.clear()
        with torch.autocast("cpu", torch.bfloat16), cast_for_decoding(model):
            assert_equal(answers(), expected)
        assert len(casts) > 3 * len(set(casts)) > 0  # each copy serves all tokens
    assert [type(each) for each in model.modules()] == kinds
    assert not any(packed.CAST in vars(each) for each in model.modules())


def test_decoding_in_float32_and_passes_with_gradients_use_no_copy():
    model = wrapped("lora").eval()
    with cast_for_decoding(model):
        assert all(type(each) is not packed.HeldLinear for each in model.modules())
    expected = step(model, "lora")
    with torch.autocast("cpu", torch.bfloat16), cast_for_decoding(model):
        found = step(model, "lora")
    assert_equal(found, expected)
