"""IncreLoRA's update and penalty; checkpointing, half precision, errors."""

from typing import Any

import pytest
import torch
from increlora_fixtures import dense, grown, layers, orthogonality, tokens, train, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import petl
from petl.errors import InputError
from petl.methods.increlora import growth_finished, rank_pattern
from petl.testing import tiny_llama, tiny_vit

CONTRACT = {
    "acts_with": {
        ("tinit", "deltaT", "restart_warmup", "warmup_steps"): {
            "tinit": 1,
            "deltaT": 2,
            "total_step": 8,
        },
        "total_step": {"tinit": 1, "deltaT": 2, "total_step": 5},
        "parameter_budget": {"tinit": 1, "deltaT": 1, "target_r": 3, "parameter_budget": 3000},
        "target_total_rank": {"tinit": 1, "deltaT": 1, "top_h": 30, "target_total_rank": 30},
    },
}

# The update


@pytest.mark.parametrize("steps", [0, 2, 8], ids=["at the start", "while growing", "at the end"])
def test_forward_equals_the_dense_formula(steps):
    model = grown(target_total_rank=20, rank_step=2, top_h=2)
    train(model, range(1, steps + 1), torch.optim.SGD(trained(model), lr=0.01))
    assert growth_finished(model) == (steps == 8)
    x = torch.randn(2, 5, 64)
    for key in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        module = model.get_base_model().get_submodule(key)
        layer, base = layers(model)[key], module.base_layer(x)
        for mode, reserve in ((True, 0 if steps == 8 else 2), (False, 0)):
            module.train(mode)
            expected = base + x @ dense(layer, reserve=reserve).t()
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module.get_delta_weight("default"), dense(layer))
        A, B, scale = layer.factors()
        assert A.shape[0] == B.shape[1] == layer.active_rank
        torch.testing.assert_close(scale * B @ A, dense(layer))


@pytest.mark.parametrize(("base", "task_type"), [(tiny_llama, "CAUSAL_LM"), (tiny_vit, None)])
def test_starts_at_the_base_model_exactly_in_evaluation(base, task_type):
    batch = tokens(2) if task_type else {"pixel_values": torch.randn(2, 3, 16, 16)}
    expected = base().eval()(**batch).logits
    model = petl.wrap(base(), "increlora", task_type=task_type).eval()
    assert torch.equal(model(**batch).logits, expected)
    gap = float((model.train()(**batch).logits - expected).abs().max())
    assert 0 < gap < 1e-5  # the reserve


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_loss_is_the_task_plus_the_mean_penalty_and_so_is_its_gradient(task_type):
    model = grown(orth_reg_weight=0.3, target_r=4, task_type=task_type)
    batch = tokens(4)
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for layer in layers(model).values():
        layer.config.orth_reg_weight = 0.0
    task = model(**batch).loss
    penalty = 0.3 * orthogonality(model, reserve=2)
    (task + penalty).backward()
    assert float(loss) == pytest.approx(float(task + penalty), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert float(model.eval()(**batch).loss) == pytest.approx(float(task), abs=1e-4)


def test_aux_loss_is_the_current_weighted_penalty():
    model = grown(orth_reg_weight=0.3)
    tuner: Any = model.base_model
    model(**tokens(2))
    assert float(tuner.aux_loss()) == pytest.approx(0.3 * float(orthogonality(model, 1)), rel=1e-5)


def test_only_active_and_reserve_components_have_gradients():
    model = grown(rank_step=2, target_r=3)
    model(**tokens(4)).loss.backward()
    for layer in layers(model).values():
        A, B, E = layer.lora_A.grad, layer.lora_B.grad.t(), layer.E.grad
        assert (A[:3].abs().amax(1) > 0).all()
        assert (B[:3].abs().amax(1) > 0).all()
        assert float(E[0].abs()) > 0
        assert not E[1:].any()
        assert not A[3:].any()
        assert not B[3:].any()


def test_dropout_applies_to_the_input_of_the_update_only():
    model = grown(lora_dropout=0.5)
    module: Any = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    x = torch.ones(1, 400, 64)
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    effect = module(x) - module.base_layer(x)
    assert not torch.equal(effect[0, 0], effect[0, 1])
    expected = x[0, 0] @ dense(layer, reserve=1).t()
    assert float((effect[0].mean(0) - expected).abs().max()) < 0.3 * float(expected.abs().max())


# Memory, checkpointing, precision


class Shapes(TorchDispatchMode):
    """Records the shape of every computed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "t.default" not in str(func):
            self.seen.add(tuple(result.shape))
        return result


def test_no_dense_update_is_materialized_except_in_a_scored_backward():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(37, 41), nn.Linear(41, 43))
    model = petl.wrap(base, "increlora", restart_warmup=False, tinit=0, deltaT=1)
    large = {(41, 37), (37, 41), (43, 41), (41, 43)}
    x = torch.randn(7, 37)
    with Shapes() as shapes, torch.no_grad():
        model.eval()(x)
    assert not shapes.seen & large
    loss = model.train()(x).square().mean()
    with Shapes() as shapes:
        loss.backward()
    assert shapes.seen & large  # the score is exact, and costs this
    model.base_model.update_and_allocate(1)
    assert growth_finished(model)
    loss = model(x).square().mean()
    with Shapes() as shapes:
        loss.backward()
    assert not shapes.seen & large


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_scores(use_reentrant):
    model: Any = grown()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            options = {"use_reentrant": use_reentrant}
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(**tokens(4)).loss.backward()
        found.append([float(layer.pop_score()) for layer in layers(model).values()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert min(found[0]) > 0


def test_half_precision_base_has_close_scores_and_a_float32_adapter():
    model = grown()
    half: Any = petl.wrap(
        tiny_llama(2).bfloat16(), "increlora", tinit=1, deltaT=2, lora_alpha=8
    ).train()
    half.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "petl_" in k}, strict=False
    )
    found = []
    for which in (model, half):
        which(**tokens(8)).loss.backward()
        found.append([float(layer.pop_score()) for layer in layers(which).values()])
    assert {p.dtype for p in trained(half)} == {torch.float32}
    assert found[1] == pytest.approx(found[0], rel=0.15)


def test_one_adapter_grows_at_a_time_and_any_number_can_be_active_in_inference():
    model = grown()
    model.add_adapter("other", petl.build_config("increlora", tinit=1, deltaT=2))
    tuner: Any = model.base_model
    tuner.update_and_allocate(2)
    grown_ranks = rank_pattern(model)
    model.set_adapter("other")
    assert set(rank_pattern(model).values()) == {1}
    assert sum(grown_ranks.values()) == 19
    tuner.set_adapter(["default", "other"])
    with pytest.raises(InputError):
        tuner.update_and_allocate(4)


def test_evaluation_draws_no_dropout():
    torch.manual_seed(0)
    model = petl.wrap(tiny_llama(), "increlora", total_step=20, lora_dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
        ids = torch.arange(1, 7)[None]
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
