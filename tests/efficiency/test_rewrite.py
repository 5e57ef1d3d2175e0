"""Every rewrite: the same loss and gradients, in copies too, and undone without a trace."""

import copy
import pickle
from itertools import permutations

import pytest
import torch

import petl
from petl.efficiency.rewrite import REWRITES, apply_rewrites, rewrite, rewrites_of
from petl.errors import UnsupportedError
from petl.testing import Case
from petl.training.runs.settings import TrainConfig

CASES = {
    "lora on llama": Case("lora", "llama", {"target_modules": "block-linear"}),
    "lora on bert": Case("lora", "bert", {"target_modules": ["query", "value"]}),
    "lora on the top": Case(
        "lora", "llama", {"target_modules": ["q_proj"], "layers_to_transform": "top:1"}
    ),
    "lora with a head": Case(
        "lora", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
    ),
    "mola on llama": Case("mola", "llama", {"num_experts": 3, "target_modules": "block-linear"}),
    "sparse on bert": Case("sparse", "bert", {"density": 0.1, "selection_algorithm": "none"}),
    "lora on vit": Case("lora", "vit", {"target_modules": ["q_proj"]}),
}
# of which setting a model takes, with the value of its rewrite
TAKES = {
    "lora on llama": {"fuse_lora", "recompute_mlp", "loss_segment", "skip_unread", "cast_once"},
    "lora on bert": {"fuse_lora", "recompute_mlp", "skip_unread", "cast_once"},
    "lora on the top": {*REWRITES} - {"fast_dropout"},  # its base has no dropout
    "lora with a head": {"fuse_lora", "recompute_mlp", "skip_unread", "cast_once"},
    "mola on llama": {"recompute_mlp", "loss_segment", "skip_unread", "cast_once"},
    "sparse on bert": {"recompute_mlp", "skip_unread", "cast_once"},
    "lora on vit": {"fuse_lora", "skip_unread", "cast_once"},
}


def wrapped(name):
    return CASES[name].without_head().wrap_stirred().train()


def step(model, batch):
    """Return loss and gradients."""
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients


def assert_same(found, expected, *, exact):
    torch.testing.assert_close(found[0], expected[0], rtol=0 if exact else 1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    scale = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        allowed = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 2e-6 * scale}
        torch.testing.assert_close(found[1][name], gradient, msg=name, **allowed)


def trace(model):
    """Return all that a rewrite could leave in a model: classes, attributes, hooks, tensors."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (
            type(module),
            sorted(vars(module)),
            [len(getattr(module, each)) for each in hooks],
            [(key, id(tensor)) for key, tensor in module.named_parameters(recurse=False)],
            type(module._modules),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("setting", REWRITES)
def test_loss_and_gradients_stay_and_undoing_leaves_no_trace(setting, name):
    model, batch, each = wrapped(name), CASES[name].batch(), rewrite(setting)
    plain, before = step(model, batch), trace(model)
    if setting not in TAKES[name]:
        with pytest.raises(UnsupportedError):
            each.apply(model)
        assert trace(model) == before
        return
    assert each.refusal(model, each.value) == ""
    assert trace(model) == before
    assert each.apply(model) > 0
    assert trace(model) != before
    found = step(model, batch)
    assert_same(found, plain, exact=each.exact)
    twins = [copy.deepcopy(model)]
    if not each.needs_rows:  # a store is open, of which there is no copy in a file
        twins.append(pickle.loads(pickle.dumps(model)))  # our own bytes
    for twin in twins:
        assert_same(step(twin, batch), found, exact=True)
    each.undo(model)
    assert trace(model) == before
    assert_same(step(model, batch), plain, exact=True)


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", CASES)
def test_all_that_a_run_asks_for_are_applied_together_and_undone_in_any_order(name):
    plain, batch = wrapped(name), CASES[name].batch()
    expected, before = step(plain, batch), trace(plain)
    asked = rewrites_of(TrainConfig(recompute_mlp="recompute_mlp" in TAKES[name]))
    taken = TAKES[name] & {*asked}
    for order in list(permutations(taken))[::7]:
        assert set(apply_rewrites(plain, asked)) == taken
        assert_same(step(plain, batch), expected, exact=False)
        for setting in order:
            rewrite(setting).undo(plain)
        assert trace(plain) == before


def test_what_is_asked_for_is_refused_and_what_is_tried_is_left_out():
    model = wrapped("lora with a head")
    assert apply_rewrites(model, {"loss_segment": "auto"}) == []
    assert apply_rewrites(model, {"loss_segment": 5}) == ["loss_segment"]
    for case, setting, value in (("vit", "recompute_mlp", True), ("bert", "loss_segment", 5)):
        with pytest.raises(UnsupportedError, match=f"train.{setting}="):
            apply_rewrites(wrapped(f"lora on {case}"), {setting: value})


def test_an_evaluation_asks_for_what_changes_passes_without_gradients():
    settings = TrainConfig(recompute_mlp=True)
    assert [*rewrites_of(settings), "cache_frozen"] == list(REWRITES)
    assert list(rewrites_of(settings, trains=False)) == ["fuse_lora", "skip_unread"]
    on = ("fuse_lora", "skip_unread", "fast_dropout", "cast_once")
    off = dict.fromkeys(on, False)
    assert rewrites_of(TrainConfig(**off, loss_segment=None)) == {}


def test_a_loss_that_reads_logits_or_positions_excludes_what_leaves_them_out():
    model = wrapped("lora on llama")
    loss = petl.losses.build_loss("distill", logit_weight=1.0, feature_weight=0.0)
    petl.losses.attach(model, loss)
    assert "compares logits" in rewrite("loss_segment").refusal(model, "auto")
    for setting in ("skip_unread", "cache_frozen"):
        assert "an extra loss" in rewrite(setting).refusal(model)
    assert rewrite("fuse_lora").refusal(model) == ""
