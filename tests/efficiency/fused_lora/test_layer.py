"""`petl.fuse_lora`: PEFT's LoRA with a fused forward pass where that is possible."""

import copy

import pytest
import torch
from bench.counters import count
from torch.utils._python_dispatch import TorchDispatchMode

import petl
from petl import testing
from petl.core.compat import LoraLinear
from petl.efficiency.fused_lora.layer import FusedLoraLinear
from petl.testing import Case

FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": "block-linear"}


def pair(model="llama", *, half=False, **fields):
    """Return the same wrapped model twice: PEFT's, and fused."""
    case = Case("lora", model, {**FIELDS, **fields}).without_head()
    theirs = case.wrap_stirred(case.base().bfloat16() if half else None)
    ours = copy.deepcopy(theirs)
    assert petl.fuse_lora(ours) == len(testing.tuner_layers(ours))
    return case, ours, theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: model.add_weighted_adapter(["default"], [0.5], "weaker"),
        lambda model: model.base_model.set_adapter([]),
    ],
    ids=["disabled", "merged", "another", "none"],
)
def test_switching_does_the_same_as_pefts(change):
    case, ours, theirs = pair()
    for model in (ours, theirs):
        change(model)
    gap = testing.difference(*(testing.logits(m, case.batch()) for m in (ours, theirs)))
    assert gap < 1e-5


def test_two_active_adapters_run_pefts_code():
    case, ours, theirs = pair()
    batch = case.batch()
    for model in (ours, theirs):
        torch.manual_seed(5)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.base_model.set_adapter(["default", "other"])
        testing.stir(model, "other")
    assert testing.difference(*(testing.logits(m, batch) for m in (ours, theirs))) < 1e-5


def products(layer, x, names):
    """Return the matrix products of a mixed batch without gradients, and the output."""
    made = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        y = layer(x, adapter_names=names)
    return [name for name in made if name in ("mm", "addmm", "bmm", "baddbmm_")], y


def extra_trainable(case, **fields):
    """Return a fused model with adapters "default" and "other", PEFT's, and a layer of each."""
    _, ours, theirs = pair(case)
    for model in (ours, theirs):
        torch.manual_seed(5)
        other = copy.deepcopy(model.peft_config["default"])
        for name, value in fields.items():
            setattr(other, name, value)
        model.add_adapter("other", other)
        model.set_adapter("other")
        testing.stir(model, "other").eval().set_adapter("default")
    return ours, theirs, *(next(iter(testing.tuner_layers(m).values())) for m in (ours, theirs))


NAMES = ["default", "other", "__base__", "default"]


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize("tokens", [1, 13])
def test_a_mixed_batch_equals_pefts_and_needs_two_products(model, tokens):
    _, _, ours, theirs = extra_trainable(model, lora_alpha=24)  # scales that differ
    x = torch.randn(4, tokens, ours.in_features)
    found, y = products(ours, x, NAMES)
    assert testing.difference(y, products(theirs, x, NAMES)[1]) < 1e-5
    assert found[1:] == ["bmm", "baddbmm_"]


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_a_batch_of_one_adapter_is_computed_as_if_it_were_active(model):
    ours, theirs, layer, _ = extra_trainable(model, lora_alpha=24)
    batch, names = pair(model)[0].batch(), ["other"] * 4
    found = testing.logits(ours, batch, adapter_names=names)
    assert testing.difference(found, testing.logits(theirs, batch, adapter_names=names)) < 1e-5
    layer.base_layer.register_forward_hook(lambda *_: None)  # which must be called
    assert testing.difference(testing.logits(ours, batch, adapter_names=names), found) < 1e-5


def test_a_mixed_batch_of_very_different_ranks_runs_pefts_code():
    _, _, ours, theirs = extra_trainable("llama", r=64)
    x, names = torch.randn(4, 13, ours.in_features), ["default", "other", "default", "default"]
    (found, y), (expected, wanted) = (products(layer, x, names) for layer in (ours, theirs))
    assert found == expected
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("fields", [{"lora_bias": True}, {"use_rslora": True}])
def test_a_mixed_batch_of_variants_runs_pefts_code(fields):
    ours, theirs, *_ = extra_trainable("bert", **fields)
    batch = pair("bert")[0].batch()
    mixed = [testing.logits(model, batch, adapter_names=NAMES) for model in (ours, theirs)]
    assert testing.difference(*mixed) < 1e-5


def test_a_mixed_batch_on_a_merged_layer_is_refused_as_by_peft():
    ours, _, layer, _ = extra_trainable("llama")
    ours.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        layer(torch.randn(1, 1, layer.in_features), adapter_names=["default"])


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_run_pefts_code(fields):
    case, ours, theirs = pair("bert", **fields)
    batch = case.batch()
    assert torch.equal(testing.logits(ours, batch), testing.logits(theirs, batch))


def test_a_trained_bias_gets_the_same_gradient_as_in_peft():
    case, ours, theirs = pair("bert", bias="all")
    batch = case.batch()
    assert testing.difference(*(testing.logits(m, batch) for m in (ours, theirs))) < 1e-6
    found, expected = testing.gradients(ours, batch), testing.gradients(theirs, batch)
    assert any("bias" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_hook_on_the_base_layer_is_called():
    case, ours, _ = pair()
    seen = []
    layer = next(iter(testing.tuner_layers(ours).values()))
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    testing.logits(ours, case.batch())
    assert seen == [1]


def test_dropout_keeps_the_mean_and_depends_on_the_seed():
    case, ours, _ = pair(lora_dropout=0.25)
    batch = case.batch()
    plain = testing.logits(ours, batch)

    def dropped(seed):
        torch.manual_seed(seed)
        return ours.train()(**batch).logits.detach()

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    layer = next(iter(testing.tuner_layers(ours).values())).train()
    x = torch.randn(1, 1, layer.in_features)
    base, full = layer.base_layer(x), layer.eval()(x)
    mean = layer.train()(x.expand(4000, 1, -1)).mean(0, keepdim=True)
    assert testing.difference(mean, full) < 0.1 * testing.difference(base, full)
    assert torch.equal(testing.logits(ours, batch), plain)


def test_half_precision_saves_no_float32_copy_of_an_input():
    case, ours, theirs = pair(half=True)
    batch = case.batch()

    def kept(model):
        return count(lambda: model(**batch).loss.backward(), model.train(), batch.values()).kept

    plain = case.base().bfloat16().requires_grad_(False)
    hook = plain.get_input_embeddings().register_forward_hook(
        lambda m, a, out: out.requires_grad_()
    )
    floor = count(lambda: plain(**batch).loss.backward(), plain.train(), batch.values()).kept
    hook.remove()
    assert kept(ours) - floor < (kept(theirs) - floor) / 2
    assert all(g.dtype == torch.float32 for g in testing.gradients(ours, batch).values())


def test_unloading_gives_the_base():
    case, ours, _ = pair()
    base = ours.unload()
    assert not any(isinstance(module, LoraLinear) for module in base.modules())
    assert torch.equal(
        testing.logits(base, case.batch()), testing.logits(case.base(), case.batch())
    )


def test_quantized_factors_equal_those_in_pefts_code():
    case = Case("binary", "llama", {"inner": "lora", **FIELDS}).without_head()
    ours = case.wrap_stirred()
    layers = testing.tuner_layers(ours)
    assert all(isinstance(layer, FusedLoraLinear) for layer in layers.values())
    batch = case.batch()
    found = testing.logits(ours, batch), testing.gradients(ours, batch)
    for layer in layers.values():
        layer._only_active = lambda: None  # so that PEFT's code runs
    assert testing.difference(found[0], testing.logits(ours, batch)) < 1e-5
    for name, gradient in testing.gradients(ours, batch).items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_without_gradients_outputs_equal_pefts_and_input_and_base_are_unchanged():
    _, ours, theirs = pair("bert")
    layer, plain = (next(iter(testing.tuner_layers(m).values())) for m in (ours, theirs))
    x = torch.randn(2, 3, layer.in_features)
    before, weight = x.clone(), layer.base_layer.weight.clone()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-5)
        seen = []
        layer.base_layer.register_forward_hook(lambda m, args, out: seen.append((out, out.clone())))
        torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(x, before)
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(*seen[0])  # what a hook has seen is not added to


def test_each_row_of_a_mixed_batch_has_the_scale_of_its_adapter():
    _, _, ours, theirs = extra_trainable("llama", lora_alpha=40)
    x = torch.randn(4, 5, ours.in_features)
    (found, y), (_, wanted) = (products(layer, x, NAMES) for layer in (ours, theirs))
    assert found[1:] == ["bmm", "baddbmm_"]
    assert testing.difference(y, wanted) < 1e-5
