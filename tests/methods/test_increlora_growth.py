"""IncreLoRA's importance scores and the growth of ranks."""

import copy
import math
from typing import Any

import pytest
import torch
from increlora_fixtures import dense, grown, grows, layers, orthogonality, tokens, trained
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model

import petl
from petl.methods.increlora import (
    active_parameters,
    growth_finished,
    importance_scores,
    rank_pattern,
)

# Importance


@pytest.mark.parametrize("norm", ["sqrt", "mean"])
def test_importance_is_that_of_a_simulation_from_inputs_and_output_gradients(norm):
    model = grown(score_norm=norm, target_r=3, top_h=3, tinit=2, deltaT=3, lora_dropout=0.2)
    base = model.get_base_model()
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
        ranks = rank_pattern(model)
        for key, layer in layers(model).items():
            x, grad = seen[key]
            gradient = torch.einsum("bto,bti->oi", grad, x)
            entries = gradient.numel() if norm == "mean" else math.sqrt(gradient.numel())
            score = float((dense(layer, reserve=1) * gradient).abs().sum() / entries)
            I[key] = 0.85 * I[key] + 0.15 * score
            U[key] = 0.85 * U[key] + 0.15 * abs(score - I[key])
        grew = grows(model, step)
        for key, scores in importance_scores(model).items():
            assert scores["I"] == pytest.approx(I[key], rel=2e-4)
            assert scores["U"] == pytest.approx(U[key], rel=2e-4)
            assert scores["score"] == pytest.approx(I[key] * U[key], rel=4e-4)
        assert grew == (step in (3, 6))
        if grew:
            best = sorted(ranks, key=lambda key: -I[key] * U[key])[:3]
            assert {k for k, r in rank_pattern(model).items() if r > ranks[k]} == set(best)
            assert model.peft_config["default"].rank_pattern == rank_pattern(model)
        optimizer.step()


def test_score_of_micro_batches_is_the_mean_of_their_scores():
    model = grown()
    tuner: Any = model.base_model
    parts = [tokens(2, seed=s) for s in (1, 2)]
    alone = []
    for part in parts:
        model(**part).loss.backward()
        alone.append({key: float(layer.pop_score()) for key, layer in layers(model).items()})
    for part in parts:
        (model(**part).loss / 2).backward()
    tuner.update_and_allocate(0)
    for key, scores in importance_scores(model).items():
        assert scores["I"] == pytest.approx(0.15 * (alone[0][key] + alone[1][key]) / 2, rel=1e-4)


def test_scores_that_are_not_finite_are_ignored():
    model = grown()
    tuner: Any = model.base_model
    for step, factor in ((0, 1.0), (1, 1.0), (2, math.inf)):
        kept = importance_scores(model)
        (model(**tokens(2, seed=step)).loss * factor).backward()
        grew = grows(model, step)
    assert not grew
    assert importance_scores(model) == kept
    model(**tokens(2)).loss.backward()
    tuner.update_and_allocate(3)
    assert importance_scores(model) != kept
    model(**tokens(2)).loss.backward()
    assert grows(model, 4)


@pytest.mark.thorough
def test_scoring_only_before_growth_steps_makes_the_same_choice():
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
        found[window] = rank_pattern(model), importance_scores(model)
    assert found[48][0] == found[None][0]
    assert sum(found[48][0].values()) == 8
    for key, scores in found[None][1].items():
        assert found[48][1][key]["I"] == pytest.approx(scores["I"], rel=0.02)


# Growth


def test_growth_happens_at_each_interval_after_the_warmup():
    model = grown(tinit=100, deltaT=100, top_h=5, target_r=2)
    events = {step: grows(model, step) for step in range(601)}
    assert [step for step, grew in events.items() if grew] == [200, 300, 400]
    assert sum(rank_pattern(model).values()) == 28


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
def test_total_rank_meets_any_budget_exactly(fields, totals):
    model = grown(**fields)
    found = [sum(rank_pattern(model).values())]
    for step in range(60):
        if grows(model, step):
            found.append(sum(rank_pattern(model).values()))
            if "max_r" in fields:
                assert max(rank_pattern(model).values()) <= fields["max_r"]
    assert found == totals
    assert growth_finished(model)


def test_the_highest_scores_grow_and_ties_prefer_the_first():
    model = grown(top_h=3)
    tuner: Any = model.base_model
    keys = list(layers(model))
    layers(model)[keys[9]].ema.copy_(torch.tensor([2.0, 3.0]))  # their product is the score
    layers(model)[keys[4]].ema.copy_(torch.tensor([5.0, 1.0]))
    tuner.update_and_allocate(2)
    assert [k for k, r in rank_pattern(model).items() if r > 1] == [keys[0], keys[4], keys[9]]


def test_reserve_moves_with_the_rank():
    model = grown(rank_step=2, target_r=4, top_h=1)
    tuner: Any = model.base_model
    first = next(iter(layers(model).values()))
    assert first.steps[:, :6].tolist() == [[0, 0, 0, -1, -1, -1], [0, -1, -1, -1, -1, -1]]
    assert first.E.shape[0] == first.config.limit(14) + 2
    tuner.update_and_allocate(2)
    assert (first.active_rank, int(first.rank)) == (3, 3)
    assert first.steps[:, :6].tolist() == [[0, 0, 0, 2, 2, -1], [0, 2, 2, -1, -1, -1]]


def test_without_advance_learning_there_is_no_reserve():
    model = grown(advance_learn=False, top_h=2)
    layer = next(iter(layers(model).values()))
    assert layer.E.shape[0] == layer.config.limit(14)
    assert not layer.E[1:].any()
    model(**tokens(2)).loss.backward()
    assert not layer.lora_A.grad[1:].any()
    layer.pop_score()
    layer.ema.copy_(torch.tensor([1e3, 1e3]))
    model.base_model.update_and_allocate(2)
    assert layer.steps[:, :3].tolist() == [[0, 2, -1], [0, 2, -1]]


def test_after_growth_there_is_no_reserve_and_no_scoring():
    model = grown(target_total_rank=16, top_h=2)
    tuner: Any = model.base_model
    tuner.update_and_allocate(2)
    assert growth_finished(model)
    batch = tokens(4)
    loss = model(**batch).loss
    loss.backward()
    assert all(layer.probe.grad is None for layer in layers(model).values())
    assert all(not layer.lora_A.grad[layer.active_rank :].any() for layer in layers(model).values())
    task = float(model.eval()(**batch).loss)
    assert float(loss.detach()) == pytest.approx(
        task + 0.1 * float(orthogonality(model, 0)), rel=1e-5
    )
    kept = rank_pattern(model), importance_scores(model)
    assert not any(grows(model, step) for step in range(3, 20))
    assert (rank_pattern(model), importance_scores(model)) == kept


@pytest.mark.thorough
def test_parameter_counts_are_the_published_ones():
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
        assert len(layers(model)) == 72
        assert active_parameters(model) == 165_960
        assert sum(p.numel() for p in trained(model)) == allocated
        assert {layer.E.shape[0] for layer in layers(model).values()} == {
            17 if target_r == 2 else 61
        }
        for layer in layers(model).values():
            layer.growth.ranks[layer.info.key] = target_r
        assert active_parameters(model) == active


def test_rank_step_defaults_to_half_the_target():
    for target_r, expected in ((1, 1), (2, 1), (4, 2), (5, 2), (6, 3), (8, 4)):
        assert petl.build_config("increlora", target_r=target_r).rank_increase == expected
    config: Any = petl.build_config("increlora", top_h=1, max_r=100)
    assert config.limit(72) + config.reserve == 74
