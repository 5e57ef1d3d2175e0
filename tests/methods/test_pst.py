"""PST against its equations, its schedule, its counts, and its promises about masks."""

import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

import petl
from petl import testing
from petl.core.lifecycle import lifecycle
from petl.errors import InputError, UnsupportedError
from petl.methods.pst import PstConfig, sparsity_after
from petl.methods.pst import adapter as pst_adapter
from petl.ops.masks import pack_mask, unpack_mask
from petl.testing import Case
from petl.testing.case import logits, stir, trainable, tuner_layers
from petl.testing.training import train
from petl.training.optimizer import groups
from petl.training.runs.settings import TrainConfig

CONTRACT = {
    "fields": {
        "total_step": 100,
        "initial_warmup": 0.0,
        "initial_sparsity": 0.1,
        "final_sparsity": 0.3,
    },
    "refuses": ("both_adapters_can_be_active",),
}
NAMES = ("U", "V", "A", "B", "R", "C")


def layer_of(out: int, into: int, **fields) -> tuple[Any, PeftModel]:
    """One linear layer in a model, with an adapter of small random tensors."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(into, out)})
    wrapped = petl.wrap(model, "pst", target_modules=["linear"], **fields)
    return wrapped.get_submodule("base_model.model.linear"), wrapped


def adapter_of(layer: nn.Module, name: str = "default"):
    return layer.adapters[name]


def adapters(model: nn.Module, name: str = "default") -> list:
    return [layer.adapters[name] for layer in tuner_layers(model).values()]


def prune(model: nn.Module, share: float, name: str = "default") -> nn.Module:
    """Prune this share of each layer, as the lifecycle would."""
    for adapter in adapters(model, name):
        adapter.end_step(int(adapter.size * share))
    return model


def dense_mask(moved, adapter, pruned: int):
    """The equation: the smallest scores are pruned, of equal ones the first."""
    A, B, R, C = (getattr(adapter, n).detach().double() for n in ("A", "B", "R", "C"))
    _, alpha1, alpha2 = adapter.scales
    scores = moved.double().abs() + alpha1 * A @ B + alpha2 * (R[:, None] + C[None])
    mask = torch.ones(scores.numel())
    mask[scores.flatten().argsort(stable=True)[:pruned]] = 0
    return mask.view(scores.shape)


class StraightThrough(torch.autograd.Function):
    """M of the scores, with dL/dS := dL/dM."""

    @staticmethod
    def forward(ctx, scores, mask):
        return mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("hooked", [False, True])
def test_layer_and_gradients_are_those_of_the_dense_formula(share, hooked):
    layer, _ = layer_of(10, 12, r=3, mask_r=2, beta=0.7, alpha1=1.3, alpha2=0.6, init_weights=False)
    adapter = adapter_of(layer)
    with torch.no_grad():
        for name in NAMES:
            getattr(adapter, name).mul_(15)  # so that the scores reorder the weights
    adapter.end_step(math.floor(10 * 12 * share))
    assert adapter.num_pruned == math.floor(120 * share)
    if hooked:  # then the layer is called, and its hooks run
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 5, 12, requires_grad=True)
    y = layer(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    found = [x.grad, *(getattr(adapter, name).grad for name in NAMES)]

    U, V, A, B, R, C = leaves = [
        getattr(adapter, name).detach().double().requires_grad_() for name in NAMES
    ]
    x2 = x.detach().double().requires_grad_()
    W, b = layer.base_layer.weight.detach().double(), layer.base_layer.bias.detach().double()
    moved = W + 0.7 * U @ V
    scores = moved.abs() + 1.3 * A @ B + 0.6 * (R[:, None] + C[None])
    mask = dense_mask(moved.detach(), adapter, int(adapter.num_pruned)).double()
    expected = F.linear(x2, StraightThrough.apply(scores, mask) * moved, b)
    (expected * weights).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, one, other in zip(("x", *NAMES), found, [x2, *leaves], strict=True):
        torch.testing.assert_close(one.double(), other.grad, rtol=2e-5, atol=2e-5, msg=name)
    merged = adapter.merge(layer.base_layer.weight.data, transposed=False)
    torch.testing.assert_close(merged.double(), mask * moved.detach(), rtol=1e-5, atol=1e-6)


def test_share_follows_the_schedule():
    config = PstConfig(total_step=100)
    found = [round(sparsity_after(step, config), 6) for step in (0, 10, 11, 40, 69, 70, 71, 500)]
    assert found == [0, 0, 0.044254, 0.7875, 0.899996, 0.9, 0.9, 0.9]
    whole = PstConfig(total_step=50, initial_warmup=0.3, final_warmup=0.7, initial_sparsity=0.2)
    assert [sparsity_after(step, whole) for step in (15, 16)] == [0.2, 0.9]


def bert(cls, **settings):
    with torch.device("meta"):
        return cls(BertConfig(**settings))


@pytest.mark.thorough
def test_counts_are_those_of_the_paper():
    model = petl.wrap(bert(BertModel), "pst")
    assert len(tuner_layers(model)) == 72
    assert sum(p.numel() for p in trainable(model).values()) == 2_820_096
    headed = petl.wrap(bert(BertForSequenceClassification), "pst", task_type="SEQ_CLS")
    assert sum(p.numel() for p in trainable(headed).values()) == 2_821_634
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
    with torch.device("meta"):
        roberta = RobertaModel(RobertaConfig(num_attention_heads=16, **large))
    wrapped = petl.wrap(roberta, "pst")
    assert sum(p.numel() for p in trainable(wrapped).values()) == 7_520_256


def test_tensors_have_their_names_shapes_and_start():
    layer, model = layer_of(300, 200, save_mask=True)
    adapter = adapter_of(layer)
    shapes = {
        "U": (300, 8), "V": (8, 200), "A": (300, 8), "B": (8, 200), "R": (300,), "C": (200,)
    }  # fmt: skip
    for name, shape in shapes.items():
        parameter = model.get_parameter(f"base_model.model.linear.petl_pst_adapters.default.{name}")
        assert parameter.shape == shape
        assert parameter.dtype == torch.float32
        if name in "UA":
            assert abs(float(parameter.detach().std()) - 1) < 0.06
        else:
            assert not parameter.any()
    assert adapter.num_pruned.dtype == torch.int64
    assert adapter.num_pruned.shape == ()
    assert adapter.mask.shape == (300 * 200 // 8,)
    assert (adapter.mask == 255).all()
    small = adapter_of(layer_of(300, 200, init_weights=False)[0])
    for name in NAMES:
        assert abs(float(getattr(small, name).detach().std()) - 0.02) < 0.004
    assert "mask" not in dict(small.named_buffers())


class PrunedCase(Case):
    """A case whose stirred adapter prunes: the contract's own prune nothing yet."""

    def wrap_stirred(self, base: nn.Module | None = None) -> PeftModel:
        return prune(super().wrap_stirred(base), 0.3)


DEPENDS_ON_MASKS = (
    "half_precision_base_keeps_a_float32_adapter",
    "half_precision_adapter_works_too",
    "autocast_computes_the_same",
    "copies_are_the_same_and_apart",
    "adapters_do_not_disturb_each_other",
    "disabled_adapters_give_the_base_model",
    "merging_and_unmerging_change_nothing",
    "merged_model_computes_the_same",
    "unloading_gives_the_plain_model",
    "every_trainable_tensor_gets_a_gradient",
    "accumulated_gradients_add_up",
    "two_forwards_before_one_backward",
    "training_forward_leaves_nothing_behind",
    "resumed_training_equals_a_straight_run",
    "transformers_loads_it_or_it_is_refused",
)


@pytest.mark.cells(4)
@pytest.mark.parametrize("check", DEPENDS_ON_MASKS)
def test_contract_holds_while_weights_are_pruned(check):
    testing.run(check, PrunedCase("pst", "llama", CONTRACT["fields"]))


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_model_computes_as_one_with_the_masked_weights(model, share):
    case = Case("pst", model, {**CONTRACT["fields"]}).without_head()
    wrapped = prune(case.wrap_stirred(), share)
    plain, batch = case.base(), case.batch()
    for adapter in adapters(wrapped):
        module = plain.get_submodule(adapter.info.key)
        W = module.weight.detach().t() if model == "gpt2" else module.weight.detach()
        moved = W + adapter.U @ adapter.V
        mask = dense_mask(moved.detach(), adapter, int(adapter.num_pruned))
        assert int((mask == 0).sum()) == math.floor(W.numel() * share)
        masked = (mask * moved).detach()
        module.weight.data = masked.t().contiguous() if model == "gpt2" else masked
    torch.testing.assert_close(logits(wrapped, batch), logits(plain, batch), rtol=1e-4, atol=1e-4)


def test_merging_writes_exact_zeros_and_unmerging_the_original_bits():
    case = Case("pst", "gpt2", {**CONTRACT["fields"]})
    model, batch = prune(case.wrap_stirred().to(torch.bfloat16), 0.5), case.batch()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    expected = logits(model, batch)
    model.merge_adapter()
    for layer in tuner_layers(model).values():
        zeros = int((layer.base_layer.weight == 0).sum())
        assert zeros >= int(adapter_of(layer).num_pruned)
    assert torch.equal(logits(model, batch), expected)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    counts = {adapter.info.key: adapter.pruned for adapter in adapters(model)}
    plain = model.merge_and_unload()
    for key, count in counts.items():
        weight = plain.get_submodule(key).weight
        assert int((weight == 0).sum()) == count
    assert torch.equal(logits(plain, batch), expected)


@pytest.mark.thorough
@pytest.mark.parametrize(("save_mask", "interval"), [(False, 1), (True, 3)])
def test_resumed_in_mid_schedule_the_masks_are_those_of_a_straight_run(
    save_mask, interval, tmp_path
):
    fields = {"save_mask": save_mask, "mask_interval": interval, "final_warmup": 0.1}
    case = Case("pst", "llama", {**fields, "initial_warmup": 0.0})
    batch = case.batch()
    whole = case.wrap().train()
    train(whole, batch, steps=8, lr=1e-3)
    model = case.wrap().train()
    model.active_peft_config.total_step = 8
    optimizer = train(model, batch, steps=4, lr=1e-3).optimizer
    model.save_pretrained(tmp_path)
    again = petl.load(case.base(), tmp_path, is_trainable=True).train()
    assert [a.pruned for a in adapters(again)] == [a.pruned for a in adapters(model)]
    share = sparsity_after(4 // interval * interval, again.active_peft_config)
    assert all(adapter.pruned == int(adapter.size * share) for adapter in adapters(again))
    assert torch.equal(logits(again, batch), logits(model, batch))
    lifecycle(again).load_state_dict(lifecycle(model).state_dict())
    train(again, batch, steps=8, done=4, lr=1e-3, state=optimizer.state_dict())
    for one, other in zip(adapters(again), adapters(whole), strict=True):
        assert one.pruned == other.pruned == int(0.9 * one.size)
        for key, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key


def test_saved_mask_holds_on_loading(tmp_path):
    case = Case("pst", "llama", {**CONTRACT["fields"], "save_mask": True})
    model = case.wrap().train()
    train(model, case.batch(), steps=4, lr=1e-3)
    for adapter in adapters(model):
        assert int((~unpack_mask(adapter.mask, (adapter.size,))).sum()) == adapter.pruned > 0
        # another mask than that of the scores
        turned = unpack_mask(adapter.mask, (adapter.size,)).flip(0)
        adapter.mask.copy_(pack_mask(turned))
    model.save_pretrained(tmp_path)
    loaded = petl.load(case.base(), tmp_path)
    assert torch.equal(logits(loaded, case.batch()), logits(model, case.batch()))
    for one, other in zip(adapters(loaded), adapters(model), strict=True):
        assert torch.equal(one.mask, other.mask)


def test_pruned_weight_comes_back():
    layer, _ = layer_of(2, 4, r=1, mask_r=1)
    adapter = adapter_of(layer)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[0.1, 1, 2, 3], [4, 5, 6, 7.0]]))
    adapter.end_step(1)
    x = torch.eye(4)
    assert layer(x)[0, 0] == layer.base_layer.bias[0]  # the smallest is pruned
    optimizer = torch.optim.SGD([adapter.R, adapter.C], lr=5.0)
    # the target needs the pruned entry, and not the one beside it
    target = torch.tensor([[9.0, 0, 2, 3], [4, 5, 6, 7]])
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x) - F.linear(x, target, layer.base_layer.bias)).square().sum().backward()
        optimizer.step()
        adapter.end_step(1)
    keep = unpack_mask(adapter.mask_now(layer.base_layer.weight)[0], (2, 4))
    assert keep[0, 0]


def test_nothing_of_the_weights_size_is_kept_for_backward():
    layer, _ = layer_of(64, 48)
    adapter_of(layer).end_step(64 * 48 // 2)
    own = {t.data_ptr() for t in layer.base_layer.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 48, requires_grad=True))
    large = [t for t in kept if t.numel() >= 64 * 48 and t.data_ptr() not in own]
    assert not large
    assert sum(t.numel() for t in kept if t.dtype == torch.uint8) == 64 * 48 // 8


def test_half_precision_base_is_scored_in_float32():
    layer, _ = layer_of(30, 20, init_weights=False)
    twin, _ = layer_of(30, 20, init_weights=False)
    adapter = adapter_of(layer)
    twin.load_state_dict(layer.state_dict())
    layer.base_layer.to(torch.bfloat16)
    twin.base_layer.weight.data = layer.base_layer.weight.data.float()
    for each in (adapter, adapter_of(twin)):
        assert each.U.dtype == torch.float32
        each.end_step(300)
    x = torch.randn(7, 20)
    y = layer(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), twin(x), rtol=0.05, atol=0.05)
    one, other = (adapter_of(each).mask_now(each.base_layer.weight)[0] for each in (layer, twin))
    assert torch.equal(one, other)


def test_autocast_leaves_scores_in_float32():
    layer, _ = layer_of(30, 20, init_weights=False)
    adapter, weight = adapter_of(layer), layer.base_layer.weight
    adapter.end_step(300)
    mask = adapter.mask_now(weight)[0].clone()
    adapter.forget()
    x = torch.randn(7, 20, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        packed = adapter.mask_now(weight)[0]
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(packed, mask)
    plain, factors = adapter.new_weight(weight), adapter.factors_of_pruning
    expected = F.linear(x.float(), plain, layer.base_layer.bias)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)
    assert all(t.grad.dtype == torch.float32 for t in factors)


@pytest.mark.thorough
def test_training_prunes_half_and_masks_of_micro_batches_are_made_once(monkeypatch):
    case = Case("pst", "llama", {"final_sparsity": 0.5, "target_modules": ["q_proj", "down_proj"]})
    model, batch = case.wrap().train(), case.batch()
    made, keep = [], pst_adapter.keep_largest
    monkeypatch.setattr(pst_adapter, "keep_largest", lambda s, n: made.append(n) or keep(s, n))
    micro = [({k: v[i : i + 2] for k, v in batch.items()}, 0.5) for i in (0, 2)]
    losses = train(model, batch, steps=60, lr=1e-3, micro=micro).losses
    assert losses[-1] < losses[0]
    for adapter in adapters(model):
        assert adapter.pruned == adapter.size // 2
    # after the warm-up of 6 steps, one mask per layer and step
    assert len(made) == (60 - 7) * len(adapters(model))
    found = lifecycle(model).metrics()
    assert found["sparsity"] == 0.5
    assert 0 <= found["pruned_share"] < 0.1


def test_share_that_changed_side_is_counted_from_the_last_mask():
    layer, model = layer_of(8, 8)
    tuner: Any = model.base_model
    model.train()
    x = torch.randn(2, 8)
    tuner.context.recording = True  # as in a training forward of a model
    layer(x)
    assert tuner.series() == {"sparsity": 0.0, "pruned_share": 0.0}
    adapter_of(layer).end_step(16)
    layer(x)
    assert tuner.series() == {"sparsity": 0.25, "pruned_share": 0.25}
    layer(x)  # another micro-batch
    assert tuner.series()["pruned_share"] == 0.25
    before = adapter_of(layer).mask_now(layer.base_layer.weight)[0]
    with torch.no_grad():
        adapter_of(layer).R.copy_(torch.randn(8))
    adapter_of(layer).end_step(16)
    layer(x)
    after = adapter_of(layer).mask_now(layer.base_layer.weight)[0]
    flips = int((unpack_mask(before, (64,)) != unpack_mask(after, (64,))).sum())
    assert flips > 0
    assert tuner.series()["pruned_share"] == flips / 64


@pytest.mark.parametrize("save_mask", [False, True])
@pytest.mark.parametrize("interval", [1, 2])
def test_share_that_changed_side_holds_until_the_next_mask(save_mask, interval):
    fields = {"total_step": 8, "initial_warmup": 0.0, "final_warmup": 0.0, "final_sparsity": 0.5}
    layer, model = layer_of(8, 8, save_mask=save_mask, mask_interval=interval, **fields)
    tuner: Any = model.base_model
    tuner.attach_optimizer(torch.optim.SGD(trainable(model).values(), lr=0.1))
    model.train()
    tuner.context.recording = True  # as in a training forward of a model
    adapter, x = adapter_of(layer), torch.randn(2, 8)
    layer(x)
    counts = [0]
    for step in range(1, 7):
        tuner.update_and_allocate(step)
        layer(x)
        if step % interval == 0:
            # the parameters are those of before, so that masks only lose entries
            counts.append(int(64 * sparsity_after(step, model.active_peft_config)))
        assert adapter.pruned == counts[-1]
        assert tuner.series()["pruned_share"] == (counts[-1] - counts[-2] if counts[1:] else 0) / 64


def test_evaluation_computes_the_pruned_weight_once_and_again_after_a_change(monkeypatch):
    layer, model = layer_of(8, 8)
    model.eval()
    adapter_of(layer).end_step(16)
    made, moved = [], pst_adapter.moved_weight
    monkeypatch.setattr(pst_adapter, "moved_weight", lambda *args: made.append(1) or moved(*args))
    x = torch.randn(2, 8)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(made) == 1
        adapter_of(layer).V.add_(1)
        assert not torch.equal(layer(x), first)
        assert len(made) == 2


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    layer, _ = layer_of(8, 8)
    adapter_of(layer).end_step(16)
    x = torch.randn(2, 8)
    with torch.inference_mode():
        expected = layer.eval()(x)
    y = layer.train()(x)
    y.sum().backward()
    assert torch.equal(y, expected)


def test_several_adapters_switch_and_are_refused_together():
    case = Case("pst", "llama", {**CONTRACT["fields"]})
    model = case.wrap_stirred()
    model.add_adapter("second", case.config())
    tuner = model.base_model
    tuner.set_adapter("second")
    stir(model, "second", seed=5)
    prune(prune(model, 0.4), 0.2, "second")
    with pytest.raises(UnsupportedError):
        tuner.set_adapter(["default", "second"])
    weights = {k: t.clone() for k, t in model.state_dict().items()}
    for names in (["default", "second"], ["second", "default"]):
        with pytest.raises(UnsupportedError):
            model.merge_adapter(names)
    model.merge_adapter(["default"])
    with pytest.raises(UnsupportedError):
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())
    layer = next(iter(tuner_layers(model).values()))
    layer.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError):
        logits(model, case.batch())


def test_length_of_the_run_must_be_known_and_is_taken_from_the_trainer():
    model = Case("pst", "llama").wrap()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    with pytest.raises(InputError):
        lifecycle(model).attach_optimizer(optimizer)
    with pytest.raises(InputError):
        lifecycle(model).after_step(1, optimizer)
    lifecycle(model).attach_optimizer(optimizer, total_steps=17)
    assert model.active_peft_config.total_step == 17


def test_a_further_training_has_its_own_length(tmp_path):
    def attached(model: PeftModel, steps: int) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        lifecycle(model).attach_optimizer(optimizer, total_steps=steps)
        return optimizer

    model = Case("pst", "llama").wrap()
    for steps in (4, 100):
        lifecycle(model).after_step(4, attached(model, steps))
        share = sparsity_after(4, PstConfig(total_step=steps))
        assert [a.pruned for a in adapters(model)] == [int(a.size * share) for a in adapters(model)]
    # the length of a finished training is not that of the next one; one that was chosen is
    model.save_pretrained(tmp_path)
    again = petl.load(Case("pst", "llama").base(), tmp_path, is_trainable=True)
    attached(again, 50)
    assert again.active_peft_config.total_step == 50
    chosen = petl.wrap(Case("pst", "llama").base(), "pst", total_step=8)
    attached(chosen, 50)
    assert chosen.active_peft_config.to_dict()["total_step"] == 8


@pytest.mark.parametrize("count", [-1, 10**6])
def test_impossible_numbers_in_a_file_are_refused(count, tmp_path):
    case = Case("pst", "llama", {**CONTRACT["fields"]})
    model = case.wrap()
    adapters(model)[0].num_pruned.fill_(count)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"num_pruned={count}"):
        petl.load(case.base(), tmp_path)


def test_compiled_layer_computes_the_same_while_the_number_changes():
    layer, model = layer_of(16, 24, init_weights=False)
    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pruned in (0, 100, 200, 300):
            adapter_of(layer).end_step(pruned)
            found = []
            for each in (layer, compiled):
                model.zero_grad()
                y = each(x)
                y.square().sum().backward()
                grads = [p.grad.clone() for p in adapter_of(layer).parameters()]
                found.append([y.detach(), *grads])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other)


def test_weight_decay_leaves_its_tensors_out():
    model = Case("pst", "bert", {**CONTRACT["fields"]}).wrap()
    found = groups(model, TrainConfig(weight_decay=0.1))
    by_name = {id(p): n for n, p in model.named_parameters()}
    decaying = [by_name[id(p)] for g in found if g["weight_decay"] for p in g["params"]]
    assert decaying
    assert not [name for name in decaying if "petl_pst_" in name]


def test_pictures_show_the_share_and_what_magnitude_would_keep():
    case = Case("pst", "llama", {**CONTRACT["fields"]})
    model = prune(case.wrap(), 0.25)
    maps = {m.name: m for m in lifecycle(model).heat_maps()}
    assert {"pruned_weights", "pruned_by_score", "weight_change"} <= set(maps)
    cells = [v for row in maps["pruned_weights"].cells for v in row]
    assert all(abs(v - 25) < 0.5 for v in cells)
    # at the start the score is the magnitude
    assert not any(v for row in maps["pruned_by_score"].cells for v in row)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.R.copy_(torch.randn_like(adapter.R))
    maps = {m.name: m for m in lifecycle(model).heat_maps()}
    assert all(v > 1 for row in maps["pruned_by_score"].cells for v in row)
