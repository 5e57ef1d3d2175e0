"""Sparse fine-tuning: the drop-and-grow cycle, against the paper's rules on dense gradients."""

import math

import pytest
import torch
from accelerate import Accelerator
from sparse_fixtures import (
    CYCLE,
    A,
    R,
    adamw,
    adapters,
    batches,
    dense_gradients,
    randomized,
    step_through,
    trained,
    wrapped,
)
from torch import nn

import petl
from petl import testing
from petl.methods.sparse import SparseConfig, schedule


def test_the_schedule_accumulates_over_a_updates_in_every_phase():
    config = SparseConfig(**CYCLE | {"total_step": 20})
    accumulated = [step for step in range(1, 40) if schedule.accumulates(config, step)]
    assert accumulated == [1, 2, 3, 9, 10, 11, 17, 18, 19]  # R = 8, A = 3
    assert [step for step in range(1, 40) if schedule.selects(config, step)] == [3, 11, 19]
    short = SparseConfig(
        **CYCLE | {"total_step": 18}
    )  # no selection would follow the third accumulation
    assert [step for step in range(1, 40) if schedule.accumulates(short, step)] == [
        1,
        2,
        3,
        9,
        10,
        11,
    ]


@pytest.mark.parametrize(
    ("fields", "fractions"),
    [
        ({}, [1.0, 0.2 * (1 - 11 / 20)]),
        ({"full_first_reselection": False}, [0.2 * (1 - 3 / 20), 0.2 * (1 - 11 / 20)]),
        (
            {"reselection_rate_policy": "cosine", "initial_reselection_rate": 0.5},
            [0.25 * (1 + math.cos(math.pi * u / 20)) for u in (3, 11)],
        ),
        (
            {"reselection_rate_policy": "cosine", "full_first_reselection": True},
            [1.0, 0.1 * (1 + math.cos(math.pi * 11 / 20))],
        ),
    ],
)
def test_the_fraction_exchanged_decays_by_its_policy(fields, fractions):
    config = SparseConfig(**CYCLE | {"total_step": 20} | fields)
    assert [schedule.exchange_fraction(config, u) for u in (3, 11)] == pytest.approx(fractions)
    # of a set that was trained before, few are exchanged also at first
    assert schedule.exchange_fraction(config, 3, is_random=False) <= config.initial_reselection_rate


@pytest.mark.parametrize("expected_count", [None, 1])
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_first_candidates_are_the_largest_gradients_of_the_first_update(pieces, expected_count):
    model = wrapped()
    data = batches(A * pieces)
    updates = [data[i : i + pieces] for i in range(0, len(data), pieces)]
    gradients = [dense_gradients(model, batch) for batch in updates[0]]
    if pieces == 1 and expected_count:
        petl.lifecycle(model).expect_micro_batches(1)
    step_through(model, adamw(model, lr=0.0), updates)
    for key, adapter in adapters(model).items():
        whole = sum(gradient[key] for gradient in gradients).view(-1)
        best = whole.abs().topk(len(adapter.values)).indices
        assert adapter.indices.tolist() == best.sort().values.tolist(), key
        assert not adapter.values.any()


def later_selection(model, updates, count_of):
    """Indices and values by the cycle's rules after A updates, and the dense gradients."""
    gradients = [[dense_gradients(model, b, 1 / len(m)) for b in m] for m in updates]
    expected = {}
    for key, adapter in adapters(model).items():
        index, values = adapter.indices.tolist(), adapter.values.tolist()
        k, m = len(index), count_of(len(index))
        first = sum(g[key] for g in gradients[0]).view(-1)
        candidates = set(first.abs().topk(k).indices.tolist())
        sums = sum(g[key] for micro in gradients for g in micro).view(-1).tolist()
        held = dict(zip(index, values, strict=True))
        dropped = sorted(held, key=lambda at: abs(held[at]))[:m]
        remaining = set(held) - set(dropped)
        grown = sorted(candidates - remaining, key=lambda at: -abs(sums[at]))[:m]
        leaving = [at for at in dropped if at not in grown]
        coming = [at for at in grown if at not in dropped]
        new = dict(held)
        for gone, come in zip(leaving, coming, strict=False):
            del new[gone]
            new[come] = 0.0
        expected[key] = dict(sorted(new.items()))
    return expected, gradients


def test_a_later_selection_follows_the_set_algebra():
    model = randomized(wrapped(initial_reselection_rate=0.5))
    data = [[b] for b in batches(A)]
    share = 0.5 * (1 - (R + A) / 1000)
    expected, _ = later_selection(model, data, lambda k: int(k * share))
    before = {key: a.indices.tolist() for key, a in adapters(model).items()}
    optimizer = adamw(model, lr=0.0)
    petl.lifecycle(model).after_step(R, optimizer)  # the update before the selection phase
    step_through(model, optimizer, data, first=R + 1)
    changed = 0
    for key, adapter in adapters(model).items():
        found = dict(zip(adapter.indices.tolist(), adapter.values.tolist(), strict=True))
        assert found == pytest.approx(expected[key]), key
        changed += len(set(before[key]) - set(found))
    assert changed > 100


@pytest.mark.parametrize("pieces", [1, 2])
def test_moments_of_grown_entries_are_means_of_the_candidate_gradients(pieces):
    model = wrapped()
    data = batches(A * pieces)
    updates = [data[i : i + pieces] for i in range(0, len(data), pieces)]
    _, gradients = later_selection(model, updates, lambda k: k)
    before = {key: set(a.indices.tolist()) for key, a in adapters(model).items()}
    optimizer = adamw(model, lr=0.0)
    step_through(model, optimizer, updates)
    b1, b2 = optimizer.param_groups[0]["betas"]
    for key, adapter in adapters(model).items():
        whole = torch.stack([sum(g[key] for g in micro).view(-1) for micro in gradients])
        seen = whole[:, adapter.indices.long()]
        state = optimizer.state[adapter.values]
        grown = torch.tensor([at not in before[key] for at in adapter.indices.tolist()])
        first, second = state["exp_avg"] / (1 - b1**A), state["exp_avg_sq"] / (1 - b2**A)
        torch.testing.assert_close(first[grown], seen.mean(0)[grown], atol=1e-7, rtol=1e-3)
        torch.testing.assert_close(
            second[grown], seen.square().mean(0)[grown], atol=1e-9, rtol=1e-3
        )
        average = torch.zeros(
            seen.shape[1]
        )  # remaining entries: AdamW's moments from the same gradients
        for gradient in seen:
            average = b1 * average + (1 - b1) * gradient
        torch.testing.assert_close(state["exp_avg"][~grown], average[~grown], atol=1e-7, rtol=1e-3)


def test_candidate_gradients_are_clipped_like_the_optimizers():
    """Otherwise new entries would start with moments far above those of the others."""
    model = wrapped()
    data = batches(A)
    gradients = [dense_gradients(model, batch) for batch in data]
    before = {key: set(a.indices.tolist()) for key, a in adapters(model).items()}
    optimizer, lifecycle, factors = adamw(model, lr=0.0), petl.lifecycle(model), []
    for step, batch in enumerate(data, 1):
        model.train()(**batch).loss.backward()
        norm = nn.utils.clip_grad_norm_(trained(model), 0.01 * step)
        factors.append(0.01 * step / (float(norm) + 1e-6))
        optimizer.step()
        lifecycle.after_step(step, optimizer)
        optimizer.zero_grad()
    assert max(factors) < 0.5
    for key, adapter in adapters(model).items():
        index = adapter.indices.long()
        seen = torch.stack(
            [f * g[key].view(-1)[index] for f, g in zip(factors, gradients, strict=True)]
        )
        grown = torch.tensor([at not in before[key] for at in index.tolist()])
        found = optimizer.state[adapter.values]["exp_avg_sq"] / (1 - 0.999**A)
        torch.testing.assert_close(
            found[grown], seen.square().mean(0)[grown], atol=1e-12, rtol=1e-3
        )


def test_state_is_found_through_wrappers_by_its_shape():
    """Accelerate's wrapper, and an optimizer with other names in its state."""

    class Rising(torch.optim.SGD):  # stores the initial value of each entry
        def step(self, closure=None):
            for p in trained(model):
                state = self.state[p]
                state.setdefault("born", p.detach().clone())
                state["whole"] = torch.zeros(3)

    model = randomized(wrapped(full_first_reselection=False, initial_reselection_rate=0.5))
    optimizer = Accelerator(cpu=True).prepare(Rising(trained(model), lr=0.1))
    step_through(model, optimizer, [[b] for b in batches(A)])
    grown = 0
    for adapter in adapters(model).values():
        born = optimizer.state[adapter.values]["born"]
        assert torch.equal(born, adapter.values)  # moved with its entry; 0 for a new one
        grown += int((born == 0).sum())
    assert grown > 100


def test_ages_of_the_authors_optimizer_count_the_coming_gradient():
    model = wrapped()
    optimizer = adamw(model)
    data = [[b] for b in batches(A)]
    step_through(model, optimizer, data, stop=A - 1)
    for p in trained(model):
        optimizer.state[p]["age"] = torch.full_like(p, 50)
    step_through(model, optimizer, data[A - 1 :], first=A)
    ages = torch.cat([optimizer.state[a.values]["age"] for a in adapters(model).values()])
    assert set(ages.tolist()) == {A + 1, 50}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_counts_once(use_reentrant):
    model, plain = wrapped(), wrapped()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    for m in (model, plain):
        petl.lifecycle(m).expect_micro_batches(1)
        m.train()(**batches(1)[0]).loss.backward()
    for a, b in zip(adapters(model).values(), adapters(plain).values(), strict=True):
        assert torch.equal(a.candidates.candidates, b.candidates.candidates)
        torch.testing.assert_close(a.candidates.update, b.candidates.update)


@pytest.mark.thorough
def test_the_selection_does_not_depend_on_the_size_of_micro_batches():
    """Updates of 8 rows in 1, 2 and 8 pieces, and rows of different length."""
    data = batches(R + A, rows=8)
    items = [testing.TINY_MODELS["llama"].items(batch) for batch in data]
    found = []
    for pieces in (1, 2, 8):
        model = wrapped(initial_reselection_rate=0.5).train()
        optimizer, lifecycle = (
            torch.optim.AdamW(trained(model), 1e-2, eps=1e-4),
            petl.lifecycle(model),
        )
        for step, batch in enumerate(data, 1):
            for rows in torch.arange(8).split(8 // pieces):
                part = testing.training.rows_of(batch, rows.tolist())
                weight = testing.TINY_MODELS["llama"].items(part) / items[step - 1]
                (model(**part).loss * weight).backward()
            optimizer.step()
            lifecycle.after_step(step, optimizer)
            optimizer.zero_grad()
        found.append({key: a.indices.tolist() for key, a in adapters(model).items()})
    for other in found[1:]:
        assert other == found[0]


def test_a_layer_called_twice_is_judged_by_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.fc(self.fc(x).tanh())

    torch.manual_seed(0)
    base, x = Twice(), torch.randn(5, 8)
    plain = Twice()
    plain.load_state_dict(base.state_dict())
    plain(x).square().sum().backward()
    model = wrapped(base, target_modules=["fc"], num_tunable_weights=9).train()
    petl.lifecycle(model).expect_micro_batches(1)
    optimizer = adamw(model, lr=0.0)
    for step in range(1, A + 1):
        model(x).square().sum().backward()
        optimizer.step()
        petl.lifecycle(model).after_step(step, optimizer)
        optimizer.zero_grad()
    (adapter,) = adapters(model).values()
    best = plain.fc.weight.grad.view(-1).abs().topk(9).indices
    assert adapter.indices.tolist() == best.sort().values.tolist()


def test_evaluation_and_a_static_mask_have_no_candidates():
    model = wrapped().eval()
    model(**batches(1)[0]).loss.backward()
    static = petl.wrap(testing.tiny_llama(), "sparse", density=0.05, selection_algorithm="none")
    before = {key: a.indices.clone() for key, a in adapters(static).items()}
    step_through(static, torch.optim.SGD(trained(static), lr=0.1), [[b] for b in batches(A)])
    for m in (model, static):
        assert all(a.candidates is None for a in adapters(m).values())
    assert all(torch.equal(a.indices, before[key]) for key, a in adapters(static).items())


def test_only_the_trained_adapter_exchanges_entries():
    model = wrapped()
    model.add_adapter("second", petl.build_config("sparse", **CYCLE | {"init_seed": 1}))
    model.set_adapter("second")
    before = {key: a.indices.clone() for key, a in adapters(model).items()}
    second = {key: a.indices.clone() for key, a in adapters(model, "second").items()}
    step_through(model, adamw(model), [[b] for b in batches(A)])
    for key, adapter in adapters(model).items():
        assert torch.equal(adapter.indices, before[key])
        assert not torch.equal(adapters(model, "second")[key].indices, second[key])


@pytest.mark.slow
def test_compiled_training_accumulates_equal_gradients():
    torch._dynamo.reset()
    model, plain = wrapped(), wrapped()
    for m in (torch.compile(model, fullgraph=True, backend="aot_eager"), plain):
        m.train()(**batches(1)[0]).loss.backward()
    for a, b in zip(adapters(model).values(), adapters(plain).values(), strict=True):
        torch.testing.assert_close(a.first.whole, b.first.whole)
        torch.testing.assert_close(a.first.own, b.first.own)


def test_a_dense_gradient_is_that_of_the_stored_weight():
    """The helper of these tests, against finite differences of one weight entry."""
    model = randomized(wrapped().double())
    batch = batches(1)[0]
    gradients = dense_gradients(model, batch)
    for key in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        adapter = adapters(model)[key]
        at = int(adapter.indices[7])
        losses = []
        for shift in (1e-2, -2e-2):
            with torch.no_grad():
                adapter.values[7] += shift
            losses.append(float(model(**batch).loss))
        slope = (losses[0] - losses[1]) / 2e-2
        assert float(gradients[key].view(-1)[at]) == pytest.approx(slope, rel=1e-2, abs=1e-5)
