"""IncreLoRA's mathematics, growth, saving and learning rates."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DebertaV2Config, DebertaV2Model

import petl
from petl.errors import InputError
from petl.lora_form import as_lora, save_lora
from petl.testing import tiny_llama, tiny_vit
from petl.testing.models import causal_batch

RESERVE = 1e-5
ADAPTER = "adapter_model.safetensors"


def tokens(rows: int, seed: int = 0) -> dict[str, Tensor]:
    return causal_batch(rows, seed)


def grown(**fields: Any) -> PeftModel:
    """A tiny Llama that grows every second step, with weights that matter."""
    torch.manual_seed(0)
    defaults = {"tinit": 1, "deltaT": 2, "lora_alpha": 8, "restart_warmup": False}
    model = petl.wrap(tiny_llama(2), "increlora", **{**defaults, **fields})
    with torch.no_grad():
        for layer in layers(model).values():
            R = layer.live
            layer.E[:R] = torch.randn(R, 1)
            layer.lora_A.mul_(10)
            layer.lora_B.mul_(10)
    return model.train()


def layers(model: PeftModel) -> dict[str, Any]:
    tuner: Any = model.base_model
    return tuner.active_layers


def dense(layer: Any, *, reserve: int = 0) -> Tensor:
    """The update as the equation has it, component by component."""
    R, (I, O) = int(layer.rank), layer.shape
    update = torch.zeros(O, I)
    for i in range(R + reserve):
        weight = layer.E[i, 0] if i < R else RESERVE
        update = update + weight * torch.outer(layer.lora_B[:, i], layer.lora_A[i])
    return layer.config.lora_alpha / (R + 1e-5) * update


def orthogonality(model: PeftModel, reserve: int) -> Tensor:
    found = []
    for layer in layers(model).values():
        n = int(layer.rank) + reserve
        A, B = layer.lora_A[:n], layer.lora_B[:, :n]
        grams = (A @ A.t(), B.t() @ B)
        found.extend((gram - torch.eye(n)).square().sum().sqrt() for gram in grams)
    return torch.stack(found).mean()


def train(model: PeftModel, steps: range, optimizer: Any) -> list[float]:
    life = petl.lifecycle(model)
    losses = []
    for step in steps:
        loss = model(**tokens(4, seed=step)).loss
        loss.backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trained(model: PeftModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# The update


@pytest.mark.parametrize("steps", [0, 2, 8], ids=["at the start", "while growing", "at the end"])
def test_forward_is_the_dense_formula(steps):
    model = grown(target_total_rank=20, rank_step=2, top_h=2)
    train(model, range(1, steps + 1), torch.optim.SGD(trained(model), lr=0.01))
    tuner: Any = model.base_model
    assert tuner.growth_finished == (steps == 8)
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
        assert A.shape[0] == B.shape[1] == layer.live
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


def test_aux_loss_is_the_weighted_penalty_as_it_stands():
    model = grown(orth_reg_weight=0.3)
    tuner: Any = model.base_model
    assert float(tuner.aux_loss()) == pytest.approx(0.3 * float(orthogonality(model, 1)), rel=1e-5)


def test_only_living_components_have_gradients():
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


def test_dropout_falls_on_the_input_of_the_update_alone():
    model = grown(lora_dropout=0.5)
    module: Any = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    x = torch.ones(1, 400, 64)
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    effect = module(x) - module.base_layer(x)
    assert not torch.equal(effect[0, 0], effect[0, 1])
    expected = x[0, 0] @ dense(layer, reserve=1).t()
    assert float((effect[0].mean(0) - expected).abs().max()) < 0.3 * float(expected.abs().max())


# Importance


@pytest.mark.parametrize("norm", ["sqrt", "mean"])
def test_importance_is_that_of_a_simulation_from_inputs_and_output_gradients(norm):
    model = grown(score_norm=norm, target_r=3, top_h=3, tinit=2, deltaT=3, lora_dropout=0.2)
    base, tuner = model.get_base_model(), model.base_model
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(key):
        def hook(module, args, output):
            output.register_hook(lambda grad: seen.update({key: (module.dropped, grad)}))

        return hook

    for key, layer in layers(model).items():
        module = base.get_submodule(key)
        module.register_forward_hook(watch(key))
        drop = layer.drop

        def remember(x, module=module, drop=drop):
            module.dropped = drop(x)
            return module.dropped

        layer.drop = remember
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    I, U = dict.fromkeys(layers(model), 0.0), dict.fromkeys(layers(model), 0.0)
    for step in range(7):
        optimizer.zero_grad()
        model(**tokens(4, seed=step)).loss.backward()
        ranks = tuner.get_rank_pattern()
        for key, layer in layers(model).items():
            x, grad = seen[key]
            gradient = torch.einsum("bto,bti->oi", grad, x)
            entries = gradient.numel() if norm == "mean" else math.sqrt(gradient.numel())
            score = float((dense(layer, reserve=1) * gradient).abs().sum() / entries)
            I[key] = 0.85 * I[key] + 0.15 * score
            U[key] = 0.85 * U[key] + 0.15 * abs(score - I[key])
        grew = tuner.update_and_allocate(step)
        for key, scores in tuner.importance_scores().items():
            assert scores["I"] == pytest.approx(I[key], rel=2e-4)
            assert scores["U"] == pytest.approx(U[key], rel=2e-4)
            assert scores["score"] == pytest.approx(I[key] * U[key], rel=4e-4)
        assert grew == (step in (3, 6))
        if grew:
            best = sorted(ranks, key=lambda key: -I[key] * U[key])[:3]
            assert {k for k, r in tuner.get_rank_pattern().items() if r > ranks[k]} == set(best)
        optimizer.step()


def test_score_of_micro_batches_is_the_mean_of_their_scores():
    model = grown()
    tuner: Any = model.base_model
    parts = [tokens(2, seed=s) for s in (1, 2)]
    alone = []
    for part in parts:
        model(**part).loss.backward()
        alone.append({key: float(layer.take_score()) for key, layer in layers(model).items()})
    for part in parts:
        (model(**part).loss / 2).backward()
    tuner.update_and_allocate(0)
    for key, scores in tuner.importance_scores().items():
        assert scores["I"] == pytest.approx(0.15 * (alone[0][key] + alone[1][key]) / 2, rel=1e-4)


def test_a_step_that_is_not_finite_counts_for_nothing():
    model = grown()
    tuner: Any = model.base_model
    for step, factor in ((0, 1.0), (1, 1.0), (2, math.inf)):
        kept = tuner.importance_scores()
        (model(**tokens(2, seed=step)).loss * factor).backward()
        grew = tuner.update_and_allocate(step)
    assert not grew
    assert tuner.importance_scores() == kept
    model(**tokens(2)).loss.backward()
    tuner.update_and_allocate(3)
    assert tuner.importance_scores() != kept
    model(**tokens(2)).loss.backward()
    assert tuner.update_and_allocate(4)


def test_scoring_before_events_alone_makes_the_same_choice():
    found = {}
    for window in (None, 48):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(6)))
        fields = {"tinit": 100, "deltaT": 100, "top_h": 2, "restart_warmup": False}
        model = petl.wrap(net, "increlora", score_window=window, **fields).train()
        tuner: Any = model.base_model
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
        x, y = torch.randn(64, 12), torch.randn(64, 12)
        scored = 0
        for step in range(201):
            rows = torch.randperm(64)[:16]
            (model(x[rows]) - y[rows]).square().mean().backward()
            scored += layers(model)["0"].probe.grad is not None
            tuner.update_and_allocate(step)
            optimizer.step()
            optimizer.zero_grad()
        assert scored == (201 if window is None else 48)
        found[window] = tuner.get_rank_pattern(), tuner.importance_scores()
    assert found[48][0] == found[None][0]
    assert sum(found[48][0].values()) == 8
    for key, scores in found[None][1].items():
        assert found[48][1][key]["I"] == pytest.approx(scores["I"], rel=0.02)


# Growth


def test_events_come_after_the_warm_up_at_each_interval():
    model = grown(tinit=100, deltaT=100, top_h=5, target_r=2)
    tuner: Any = model.base_model
    events = {step: tuner.update_and_allocate(step) for step in range(601)}
    assert [step for step, grew in events.items() if grew] == [200, 300, 400]
    assert sum(tuner.get_rank_pattern().values()) == 28


@pytest.mark.parametrize(
    ("fields", "totals"),
    [
        ({"target_total_rank": 17, "top_h": 5, "rank_step": 1}, [14, 17]),
        ({"target_total_rank": 31, "top_h": 3, "rank_step": 2}, [14, 20, 26, 31]),
        ({"target_total_rank": 15, "top_h": 4, "rank_step": 3}, [14, 15]),
        ({"target_r": 4, "top_h": 99, "rank_step": 2, "max_r": 4}, [14, 42, 56]),
        ({"target_total_rank": 30, "init_r": 2, "target_r": 2, "max_r": 3}, [28, 30]),
        ({"target_total_rank": 26, "top_h": 1, "max_r": 3}, [14, *range(15, 27)]),
        ({"target_total_rank": 14}, [14]),
    ],
)
def test_total_meets_any_budget_exactly(fields, totals):
    model = grown(**fields)
    tuner: Any = model.base_model
    found = [sum(tuner.get_rank_pattern().values())]
    for step in range(60):
        if tuner.update_and_allocate(step):
            found.append(sum(tuner.get_rank_pattern().values()))
            if "max_r" in fields:
                assert max(tuner.get_rank_pattern().values()) <= fields["max_r"]
    assert found == totals
    assert tuner.growth_finished


def test_the_highest_scores_grow_and_ties_go_to_the_first():
    model = grown(top_h=3)
    tuner: Any = model.base_model
    keys = list(layers(model))
    layers(model)[keys[9]].ema.copy_(torch.tensor([2.0, 3.0]))  # their product counts
    layers(model)[keys[4]].ema.copy_(torch.tensor([5.0, 1.0]))
    tuner.update_and_allocate(2)
    assert [k for k, r in tuner.get_rank_pattern().items() if r > 1] == [keys[0], keys[4], keys[9]]


def test_reserve_moves_on_with_the_rank():
    model = grown(rank_step=2, target_r=4, top_h=1)
    tuner: Any = model.base_model
    first = next(iter(layers(model).values()))
    assert first.steps[:, :6].tolist() == [[0, 0, 0, -1, -1, -1], [0, -1, -1, -1, -1, -1]]
    assert first.E.shape[0] == first.config.limit(14) + 2
    tuner.update_and_allocate(2)
    assert (first.live, int(first.rank)) == (3, 3)
    assert first.steps[:, :6].tolist() == [[0, 0, 0, 2, 2, -1], [0, 2, 2, -1, -1, -1]]


def test_without_advance_learning_there_is_no_reserve():
    model = grown(advance_learn=False, top_h=2)
    layer = next(iter(layers(model).values()))
    assert layer.E.shape[0] == layer.config.limit(14)
    assert not layer.E[1:].any()
    model(**tokens(2)).loss.backward()
    assert not layer.lora_A.grad[1:].any()
    layer.take_score()
    layer.ema.copy_(torch.tensor([1e3, 1e3]))
    model.base_model.update_and_allocate(2)
    assert layer.steps[:, :3].tolist() == [[0, 2, -1], [0, 2, -1]]


def test_after_growth_the_reserve_is_gone_and_nothing_is_scored():
    model = grown(target_total_rank=16, top_h=2)
    tuner: Any = model.base_model
    tuner.update_and_allocate(2)
    assert tuner.growth_finished
    batch = tokens(4)
    loss = model(**batch).loss
    loss.backward()
    assert all(layer.probe.grad is None for layer in layers(model).values())
    assert all(not layer.lora_A.grad[layer.live :].any() for layer in layers(model).values())
    task = float(model.eval()(**batch).loss)
    assert float(loss.detach()) == pytest.approx(
        task + 0.1 * float(orthogonality(model, 0)), rel=1e-5
    )
    kept = tuner.get_rank_pattern(), tuner.importance_scores()
    assert not any(tuner.update_and_allocate(step) for step in range(3, 20))
    assert (tuner.get_rank_pattern(), tuner.importance_scores()) == kept


def test_counts_are_the_published_ones():
    config = DebertaV2Config(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=128,
        position_biased_input=False,
    )
    with torch.device("meta"):
        base = DebertaV2Model(config)
    parts = "query_proj|key_proj|value_proj|attention.output.dense|intermediate.dense|output.dense"
    fields = {"target_modules": rf".*\.({parts})", "tinit": 0, "deltaT": 1}
    for target_r, top_h, allocated, active in (
        (2, 5, 2_821_320, 331_920),
        (8, 9, 10_123_560, 1_327_680),
    ):
        model = petl.wrap(
            copy.deepcopy(base), "increlora", target_r=target_r, top_h=top_h, **fields
        )
        tuner: Any = model.base_model
        assert len(layers(model)) == 72
        assert tuner.active_parameter_count() == 165_960
        assert sum(p.numel() for p in trained(model)) == allocated
        assert {layer.E.shape[0] for layer in layers(model).values()} == {
            17 if target_r == 2 else 61
        }
        for layer in layers(model).values():
            layer.growth.ranks[layer.site.key] = target_r
        assert tuner.active_parameter_count() == active


def test_unnamed_steps_of_a_grant_are_half_the_target():
    for target_r, expected in ((1, 1), (2, 1), (4, 2), (5, 2), (6, 3), (8, 4)):
        assert petl.build_config("increlora", target_r=target_r).grant == expected
    config: Any = petl.build_config("increlora", top_h=1, max_r=100)
    assert config.limit(72) + config.reserve == 74


# Saving


def same_outputs(one: PeftModel, other: PeftModel, tolerance: float = 1e-6) -> None:
    batch = tokens(3, seed=9)
    expected = one.eval()(**batch).logits
    torch.testing.assert_close(other.eval()(**batch).logits, expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("steps", [0, 3, 8], ids=["before", "in", "after growth"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_adapter_saves_and_loads(tmp_path, steps, is_trainable):
    model = grown(target_total_rank=24, top_h=4, rank_step=2)
    optimizer = torch.optim.SGD(trained(model), lr=0.01)
    train(model, range(1, steps + 1), optimizer)
    model.save_pretrained(tmp_path)
    finished = model.base_model.growth_finished
    assert finished == (steps == 8)
    ranks = model.base_model.get_rank_pattern()
    saved = load_file(tmp_path / ADAPTER)
    for key, layer in layers(model).items():
        rows = ranks[key] if finished else layer.E.shape[0]
        stem = f"base_model.model.{key}.petl_increlora_adapters."
        assert saved[f"{stem}lora_A"].shape[0] == saved[f"{stem}lora_B"].shape[1] == rows
        assert saved[f"{stem}steps"].shape == (2, rows)
        assert int(saved[f"{stem}rank"]) == ranks[key]
    for loader in (petl.load, PeftModel.from_pretrained):
        loaded = loader(tiny_llama(2), tmp_path, is_trainable=is_trainable)
        assert loaded.peft_config["default"].rank_pattern == ranks
        assert loaded.base_model.get_rank_pattern() == ranks
        assert loaded.base_model.importance_scores() == model.base_model.importance_scores()
        assert loaded.base_model.growth_finished == (finished or not is_trainable)
        same_outputs(model, loaded)
        full = is_trainable and not finished
        for key, layer in layers(loaded).items():
            assert layer.E.shape[0] == (layers(model)[key].E.shape[0] if full else ranks[key])
        again = tmp_path / f"again-{loader.__name__}"
        loaded.save_pretrained(again)
        same_outputs(model, petl.load(tiny_llama(2), again))


def test_trimmed_file_loads_into_a_model_of_full_capacity(tmp_path):
    model = grown(target_total_rank=24, top_h=4, rank_step=2)
    train(model, range(1, 9), torch.optim.SGD(trained(model), lr=0.01))
    model.save_pretrained(tmp_path)
    other = grown(target_total_rank=24, top_h=4, rank_step=2)
    assert not other.base_model.growth_finished
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert other.base_model.growth_finished
    assert other.base_model.get_rank_pattern() == model.base_model.get_rank_pattern()
    same_outputs(model, other)


def test_files_whose_components_do_not_fit_are_refused(tmp_path):
    grown(target_total_rank=50, top_h=2).save_pretrained(tmp_path)
    model = grown(target_total_rank=24, top_h=4, rank_step=2)
    with pytest.raises(InputError, match="17 components of which 1 are live do not fit into the 7"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    weights = load_file(tmp_path / ADAPTER)
    name = next(key for key in weights if key.endswith(".E"))
    save_file({**weights, name: weights[name][:3]}, tmp_path / ADAPTER)
    with pytest.raises(InputError, match="differ in their number of components"):
        petl.load(tiny_llama(2), tmp_path)


def test_merging_takes_the_living_components_alone():
    model = grown()
    train(model, range(1, 4), torch.optim.SGD(trained(model), lr=0.01))
    batch = tokens(3)
    expected = model.eval()(**batch).logits
    weights = {k: m.base_layer.weight.clone() for k, m in modules(model)}
    model.merge_adapter()
    for key, module in modules(model):
        update = dense(layers(model)[key])
        torch.testing.assert_close(module.base_layer.weight, weights[key] + update)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for key, module in modules(model):
        torch.testing.assert_close(module.base_layer.weight, weights[key])


@pytest.mark.parametrize("steps", [3, 8], ids=["in growth", "after growth"])
def test_exports_as_a_plain_lora_with_its_ranks(tmp_path, steps):
    model = grown(target_total_rank=24, top_h=4)
    train(model, range(1, steps + 1), torch.optim.SGD(trained(model), lr=0.01))
    save_lora(*as_lora(model), tmp_path)
    exported = PeftModel.from_pretrained(tiny_llama(2), tmp_path)
    assert exported.peft_config["default"].peft_type == "LORA"
    for key, rank in model.base_model.get_rank_pattern().items():
        module: Any = exported.get_base_model().get_submodule(key)
        assert module.r["default"] == rank
    same_outputs(model, exported, tolerance=1e-4)


def modules(model: PeftModel) -> list[tuple[str, Any]]:
    base = model.get_base_model()
    return [(key, base.get_submodule(key)) for key in layers(model)]


# Elsewhere


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "t.default" not in str(func):
            self.seen.add(tuple(result.shape))
        return result


def test_no_update_of_full_size_is_formed_outside_a_scored_backward():
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
    assert model.base_model.growth_finished
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
        found.append([float(layer.take_score()) for layer in layers(model).values()])
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
        found.append([float(layer.take_score()) for layer in layers(which).values()])
    assert {p.dtype for p in trained(half)} == {torch.float32}
    assert found[1] == pytest.approx(found[0], rel=0.15)


def test_one_adapter_grows_at_a_time_and_any_number_serves():
    model = grown()
    model.add_adapter("other", petl.build_config("increlora", tinit=1, deltaT=2))
    tuner: Any = model.base_model
    tuner.update_and_allocate(2)
    grown_ranks = tuner.get_rank_pattern()
    model.set_adapter("other")
    assert set(tuner.get_rank_pattern().values()) == {1}
    assert sum(grown_ranks.values()) == 19
    tuner.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="grows one at a time"):
        tuner.update_and_allocate(4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_r": 0}, "init_r=0 is not a whole number from 1 on"),
        ({"init_r": 3}, "target_r=2 is below init_r=3"),
        ({"target_total_rank": 13}, "target_total_rank=13 is below init_r=1 times 14 modules"),
        (
            {"target_r": 4, "max_r": 2},
            r"max_r \(2\) times 14 modules is below the target total rank 56",
        ),
        ({"beta1": 1.0}, r"beta1=1.0 is not in \(0, 1\)"),
        ({"beta2": 0.0}, r"beta2=0.0 is not in \(0, 1\)"),
        ({"top_h": 0}, "top_h=0"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"rank_step": 0}, "rank_step=0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1 is negative"),
        ({"score_norm": "max"}, "score_norm='max' is not sqrt or mean"),
        ({"score_window": 0}, "score_window=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"bias": "all"}, "bias='all' is not 'none'"),
        ({"rank_pattern": {"nowhere": 2}}, "rank_pattern names 'nowhere'"),
        ({"target_modules": ["embed_tokens"]}, "not a linear layer"),
    ],
)
def test_refuses_what_it_cannot_do(fields, message):
    with pytest.raises(InputError, match=message):
        petl.wrap(tiny_llama(2), "increlora", **fields)


def test_picture_shows_the_final_rank_by_layer_and_module(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    model = grown()
    train(model, range(1, 4), torch.optim.SGD(trained(model), lr=0.01))
    files = petl.lifecycle(model).pictures(tmp_path)
    assert files == [tmp_path / "ranks.png"]
    pixels = image.imread(files[0])
    assert pixels.shape[0] > 100
    assert len({tuple(p) for p in pixels.reshape(-1, 4)[::97].tolist()}) > 3
