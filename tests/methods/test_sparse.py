"""Sparse fine-tuning against the paper's cycle, written out on dense gradients."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import petl
from petl import testing
from petl.core.config import MethodConfig
from petl.errors import InputError, UnsupportedError
from petl.methods.sparse import SparseAdapter, SparseConfig, SparseSM3, schedule

LINEARS = 21  # of tiny Llama
A, R = 3, 8
CYCLE = {
    "density": 0.05,
    "reselection_steps": R,
    "selection_accumulation_steps": A,
    "total_step": 1000,
}


def wrapped(base=None, **fields):
    base = testing.tiny_llama() if base is None else base
    return petl.wrap(base, "sparse", **(CYCLE | fields))


def adapters(model, name="default"):
    """By path of the module."""
    return {
        a.site.key: a
        for a in model.modules()
        if isinstance(a, SparseAdapter) and a.site.adapter_name == name
    }


@torch.no_grad()
def stirred(model, name="default"):
    for adapter in adapters(model, name).values():
        adapter.values.normal_(std=0.05)
    return model


def batches(count, rows=2):
    llama = testing.TINY_MODELS["llama"]
    return [llama.batch(rows, seed=seed) for seed in range(count)]


def dense_gradients(model, batch, scale=1.0):
    """Gradient of the loss with respect to W + D of each target, as it is stored, written out."""
    plain = testing.tiny_llama().train()
    for key, adapter in adapters(model).items():
        weight = plain.get_submodule(key).weight
        with torch.no_grad():
            weight.view(-1)[adapter.indices.long()] += adapter.values
    (plain(**batch).loss * scale).backward()
    return {key: plain.get_submodule(key).weight.grad for key in adapters(model)}


def step_through(model, optimizer, updates, first=1, stop=None):
    """Train on lists of micro-batches, one list an update, as a loop does."""
    model.train()
    life = petl.lifecycle(model)
    for step, micro in enumerate(updates, first):
        for batch in micro:
            (model(**batch).loss / len(micro)).backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        if step == stop:
            break


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.0)


# The layer


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_outputs_and_gradients_are_those_of_the_dense_weight_plus_values(name):
    tiny = testing.TINY_MODELS[name]
    model = stirred(wrapped(tiny.base(), modules_to_save=[])).train()
    batch = tiny.batch()
    dense = tiny.base().train()
    for key, adapter in adapters(model).items():
        with torch.no_grad():  # as the weight is stored, Conv1D too
            dense.get_submodule(key).weight.view(-1)[adapter.indices.long()] += adapter.values
    output, expected = model(**batch), dense(**batch)
    torch.testing.assert_close(output.logits, expected.logits, atol=2e-5, rtol=2e-5)
    output.loss.backward()
    expected.loss.backward()
    for key, adapter in adapters(model).items():
        wanted = dense.get_submodule(key).weight.grad.view(-1)[adapter.indices.long()]
        torch.testing.assert_close(adapter.values.grad, wanted, atol=2e-5, rtol=2e-5)
    base = {n: p for n, p in model.named_parameters() if "base_layer" in n}
    assert base
    assert all(p.grad is None for p in base.values())


@pytest.mark.parametrize("reason", ["hook", "second adapter", "mixed batch"])
def test_a_base_layer_that_is_looked_at_is_called(reason):
    """Then the update is added to its output, with the same result and gradients."""
    model = stirred(wrapped())
    batch = batches(1)[0]
    expected, gradients = testing.logits(model, batch), testing.gradients(model, batch)
    calls = []
    if reason == "hook":
        for layer in testing.tuner_layers(model).values():
            layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    elif reason == "second adapter":
        model.add_adapter("zero", petl.build_config("sparse", **CYCLE))
        model.base_model.set_adapter(["zero", "default"])  # the second is added to the first
    options = {"adapter_names": ["default"] * 2} if reason == "mixed batch" else {}
    torch.testing.assert_close(testing.logits(model, batch, **options), expected, atol=2e-5, rtol=0)
    if reason == "hook":
        assert calls
    if reason != "mixed batch":
        found = testing.gradients(model, batch)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, atol=2e-5, rtol=0)


def test_values_stay_float32_and_indices_are_sorted_distinct_and_in_range():
    model = wrapped(testing.tiny_llama().bfloat16())
    for key, adapter in adapters(model).items():
        size = model.get_base_model().get_submodule(key).base_layer.weight.numel()
        found = adapter.indices.tolist()
        assert adapter.values.dtype == torch.float32
        assert adapter.indices.dtype == torch.int32
        assert found == sorted(set(found))
        assert found[0] >= 0
        assert found[-1] < size
        assert len(found) == len(adapter.values)


def test_the_random_start_is_of_the_seed_and_the_module_alone():
    first, second, other = wrapped(), wrapped(), wrapped(init_seed=1)
    starts = [a.indices.tolist() for a in adapters(first).values()]
    torch.manual_seed(99)
    assert starts == [a.indices.tolist() for a in adapters(second).values()]
    assert starts != [a.indices.tolist() for a in adapters(other).values()]
    assert len({tuple(s) for s in starts}) == LINEARS


# The budget


def meta(kind, config):
    with torch.device("meta"):
        return kind(config)


@pytest.fixture(scope="module")
def llama_7b():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    return lambda: meta(LlamaForCausalLM, config)


@pytest.mark.parametrize(
    ("fields", "number", "trainable"),
    [({"r": 64}, 159_907_840, 159_907_744), ({"density": 0.01}, 67_384_156, 67_384_032)],
)
def test_counts_of_llama_2_7b(llama_7b, fields, number, trainable):
    base = llama_7b()
    assert sum(p.numel() for p in base.parameters()) == 6_738_415_616
    model = petl.wrap(base, "sparse", **fields)
    deltas = model.active_peft_config.num_deltas
    assert model.get_nb_trainable_parameters()[0] == sum(deltas.values()) == trainable
    sizes = {a.site.key: math.prod(a.shape) for a in adapters(model).values()}
    assert sum(sizes.values()) == 6_476_005_376
    assert deltas == {key: number * size // 6_476_005_376 for key, size in sizes.items()}
    if "r" in fields:
        assert deltas["model.layers.0.self_attn.q_proj"] == 414_269
        assert deltas["model.layers.31.mlp.down_proj"] == 1_113_347


def test_counts_of_vit_b_16():
    base = meta(ViTForImageClassification, ViTConfig(num_labels=2))
    assert sum(p.numel() for p in base.parameters()) == 85_800_194
    model = petl.wrap(base, "sparse", density=0.01)
    assert sum(model.active_peft_config.num_deltas.values()) == 857_976


def test_the_budget_is_of_the_base_whatever_is_on_it_already():
    model = wrapped(modules_to_save=["lm_head"])
    model.add_adapter("second", petl.build_config("sparse", **CYCLE))
    assert model.peft_config["second"].num_deltas == model.peft_config["default"].num_deltas


def test_an_absolute_number_overrides_rank_and_density():
    model = wrapped(num_tunable_weights=5000, r=3, density=0.5)
    assert 5000 - LINEARS < sum(model.active_peft_config.num_deltas.values()) <= 5000


def test_given_deltas_override_all_and_must_be_about_the_targets():
    deltas = dict.fromkeys(wrapped().active_peft_config.num_deltas, 7)
    model = wrapped(num_deltas=deltas)
    assert all(len(a.values) == 7 for a in adapters(model).values())
    with pytest.raises(InputError, match="num_deltas and target_modules name different modules"):
        wrapped(num_deltas={"model.layers.0.mlp.up_proj": 7})


def test_a_target_without_any_weight_is_warned_of_and_trains_along():
    with pytest.warns(UserWarning, match="targets get no tunable weight"):
        model = wrapped(num_tunable_weights=40)
    assert any(len(a.values) == 0 for a in adapters(model).values())
    step_through(model, adamw(model), [[b] for b in batches(A + 1)])


# The cycle


def test_the_schedule_watches_a_updates_in_every_phase():
    config = SparseConfig(**CYCLE | {"total_step": 20})
    watched = [step for step in range(1, 40) if schedule.observes(config, step)]
    assert watched == [1, 2, 3, 9, 10, 11, 17, 18, 19]  # R = 8, A = 3
    assert [step for step in range(1, 40) if schedule.selects(config, step)] == [3, 11, 19]
    short = SparseConfig(**CYCLE | {"total_step": 18})  # no selection would follow the third phase
    assert [step for step in range(1, 40) if schedule.observes(short, step)] == [1, 2, 3, 9, 10, 11]


@pytest.mark.parametrize(
    ("fields", "shares"),
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
def test_the_share_exchanged_falls_by_its_policy(fields, shares):
    config = SparseConfig(**CYCLE | {"total_step": 20} | fields)
    assert [schedule.share(config, u) for u in (3, 11)] == pytest.approx(shares)


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_first_selection_takes_the_largest_gradients_of_the_first_micro_batch(pieces):
    model = wrapped()
    data = batches(A * pieces)
    updates = [data[i : i + pieces] for i in range(0, len(data), pieces)]
    expected = dense_gradients(model, data[0])
    step_through(model, adamw(model, lr=0.0), updates)
    for key, adapter in adapters(model).items():
        best = expected[key].view(-1).abs().topk(len(adapter.values)).indices
        assert adapter.indices.tolist() == best.sort().values.tolist(), key
        assert not adapter.values.any()


def later_selection(model, updates, count_of):
    """Indices with values that the cycle's rules give after the A updates, and dense gradients."""
    gradients = [[dense_gradients(model, b, 1 / len(m)) for b in m] for m in updates]
    expected = {}
    for key, adapter in adapters(model).items():
        index, values = adapter.indices.tolist(), adapter.values.tolist()
        k, m = len(index), count_of(len(index))
        first = gradients[0][0][key].view(-1)
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
    model = stirred(wrapped(initial_reselection_rate=0.5))
    data = [[b] for b in batches(A)]
    share = 0.5 * (1 - (R + A) / 1000)
    expected, _ = later_selection(model, data, lambda k: int(k * share))
    before = {key: a.indices.tolist() for key, a in adapters(model).items()}
    optimizer = adamw(model, lr=0.0)
    petl.lifecycle(model).after_step(R, optimizer)  # the update before the phase
    step_through(model, optimizer, data, first=R + 1)
    changed = 0
    for key, adapter in adapters(model).items():
        found = dict(zip(adapter.indices.tolist(), adapter.values.tolist(), strict=True))
        assert found == pytest.approx(expected[key]), key
        changed += len(set(before[key]) - set(found))
    assert changed > 100


@pytest.mark.parametrize("pieces", [1, 2])
def test_moments_of_grown_entries_are_the_means_of_what_was_watched(pieces):
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
        average = torch.zeros(seen.shape[1])  # survivors: what AdamW made of the same gradients
        for gradient in seen:
            average = b1 * average + (1 - b1) * gradient
        torch.testing.assert_close(state["exp_avg"][~grown], average[~grown], atol=1e-7, rtol=1e-3)


def test_watched_gradients_are_clipped_as_the_optimizers_are():
    """Else new entries would start from moments far above those of the others."""
    model = wrapped()
    data = batches(A)
    gradients = [dense_gradients(model, batch) for batch in data]
    before = {key: set(a.indices.tolist()) for key, a in adapters(model).items()}
    optimizer, life, factors = adamw(model, lr=0.0), petl.lifecycle(model), []
    for step, batch in enumerate(data, 1):
        model.train()(**batch).loss.backward()
        norm = nn.utils.clip_grad_norm_(trained(model), 0.01 * step)
        factors.append(0.01 * step / (float(norm) + 1e-6))
        optimizer.step()
        life.after_step(step, optimizer)
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
    """Accelerate's wrapper, and an optimizer whose state has names of its own."""

    class Rising(torch.optim.SGD):  # notes for each entry the value it was made with
        def step(self, closure=None):
            for p in trained(model):
                state = self.state[p]
                state.setdefault("born", p.detach().clone())
                state["whole"] = torch.zeros(3)

    model = stirred(wrapped(full_first_reselection=False, initial_reselection_rate=0.5))
    optimizer = Accelerator(cpu=True).prepare(Rising(trained(model), lr=0.1))
    step_through(model, optimizer, [[b] for b in batches(A)])
    grown = 0
    for adapter in adapters(model).values():
        born = optimizer.state[adapter.values]["born"]
        assert torch.equal(born, adapter.values)  # moved with its entry; 0 for a grown one
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
def test_a_recomputed_forward_is_watched_once(use_reentrant):
    model, plain = wrapped(), wrapped()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    for m in (model, plain):
        m.train()(**batches(1)[0]).loss.backward()
    for a, b in zip(adapters(model).values(), adapters(plain).values(), strict=True):
        assert torch.equal(a.watch.candidates, b.watch.candidates)
        torch.testing.assert_close(a.watch.update, b.watch.update)


def test_evaluation_and_a_static_mask_watch_nothing():
    model = wrapped().eval()
    model(**batches(1)[0]).loss.backward()
    static = wrapped(selection_algorithm="none", total_step=None)
    before = {key: a.indices.clone() for key, a in adapters(static).items()}
    step_through(static, torch.optim.SGD(trained(static), lr=0.1), [[b] for b in batches(A)])
    for m in (model, static):
        assert all(a.watch is None for a in adapters(m).values())
    assert all(torch.equal(a.indices, before[key]) for key, a in adapters(static).items())


def test_only_the_adapter_that_is_trained_is_revised():
    model = wrapped()
    model.add_adapter("second", petl.build_config("sparse", **CYCLE | {"init_seed": 1}))
    model.set_adapter("second")
    before = {key: a.indices.clone() for key, a in adapters(model).items()}
    second = {key: a.indices.clone() for key, a in adapters(model, "second").items()}
    step_through(model, adamw(model), [[b] for b in batches(A)])
    for key, adapter in adapters(model).items():
        assert torch.equal(adapter.indices, before[key])
        assert not torch.equal(adapters(model, "second")[key].indices, second[key])


def test_no_dense_gradient_outlives_a_row_block():
    """What a phase keeps is five tensors of K entries a layer."""
    model = wrapped().train()
    model(**batches(1)[0]).loss.backward()
    for adapter in adapters(model).values():
        kept = [t for t in vars(adapter.watch).values() if isinstance(t, torch.Tensor)]
        assert len(kept) == 5
        assert {len(t) for t in kept} == {len(adapter.values)}


@pytest.mark.slow
def test_compiled_training_watches_the_same():
    torch._dynamo.reset()
    model, plain = wrapped(), wrapped()
    for m in (torch.compile(model, fullgraph=True, backend="aot_eager"), plain):
        m.train()(**batches(1)[0]).loss.backward()
    for a, b in zip(adapters(model).values(), adapters(plain).values(), strict=True):
        assert a.watch.candidates.tolist() == b.watch.candidates.tolist()
        torch.testing.assert_close(a.watch.update, b.watch.update)


def test_five_steps_of_loss_stay_what_they_were():
    model = wrapped(reselection_steps=3, selection_accumulation_steps=2).train()
    losses = testing.training.train(model, batches(1)[0], steps=5, lr=1e-2).losses
    assert losses == pytest.approx(PINNED, abs=2e-4)


PINNED = [4.562859, 4.387739, 4.477952, 4.297458, 4.272021]


# SM3


def test_sm3_follows_the_equations_entry_by_entry():
    model = stirred(wrapped(selection_algorithm="sm3"))
    optimizer = SparseSM3(trained(model), model, lr=0.1, weight_decay=0.5)
    values = {key: a.values.tolist() for key, a in adapters(model).items()}
    row = {key: [0.0] * a.stored_shape[0] for key, a in adapters(model).items()}
    column = {key: [0.0] * a.stored_shape[1] for key, a in adapters(model).items()}
    for batch in batches(2):
        model.train()(**batch).loss.backward()
        for key, adapter in adapters(model).items():
            r, c, at = list(row[key]), list(column[key]), adapter.indices.tolist()
            for n, (index, g) in enumerate(zip(at, adapter.values.grad.tolist(), strict=True)):
                i, j = divmod(index, adapter.stored_shape[1])
                a = min(row[key][i], column[key][j]) + g**2
                r[i], c[j] = max(r[i], a), max(c[j], a)
                values[key][n] *= 1 - 0.1 * 0.5
                values[key][n] -= 0.1 * g / math.sqrt(a + 1e-8)
            row[key], column[key] = r, c
        optimizer.step()
        optimizer.zero_grad()
        for key, adapter in adapters(model).items():
            expected = torch.tensor(values[key])
            torch.testing.assert_close(adapter.values.detach(), expected, atol=1e-5, rtol=1e-4)
            state = optimizer.state[adapter.values]
            torch.testing.assert_close(state["row"], torch.tensor(row[key]))
            torch.testing.assert_close(state["column"], torch.tensor(column[key]))


def test_sm3_grows_where_the_product_of_accumulators_is_largest():
    model = stirred(
        wrapped(
            selection_algorithm="sm3", full_first_reselection=False, initial_reselection_rate=0.3
        )
    )
    optimizer = petl.lifecycle(model).make_optimizer([{"params": trained(model), "lr": 1e-3}])
    data = [[b] for b in batches(A)]
    step_through(model, optimizer, data[:-1])
    for _, batch in enumerate(data[-1]):
        model(**batch).loss.backward()
    optimizer.step()
    before = {key: (a.indices.tolist(), a.values.tolist()) for key, a in adapters(model).items()}
    petl.lifecycle(model).after_step(A, optimizer)
    for key, adapter in adapters(model).items():
        index, values = before[key]
        state = optimizer.state[adapter.values]
        m = int(len(index) * 0.3 * (1 - A / 1000))
        scores = torch.outer(state["row"], state["column"]).view(-1)
        scores[torch.tensor(index)] = -1
        threshold = scores.topk(m).values[-1]
        kept = dict(zip(index, values, strict=True))
        for gone in sorted(kept, key=lambda at: abs(kept[at]))[:m]:
            del kept[gone]
        found = dict(zip(adapter.indices.tolist(), adapter.values.tolist(), strict=True))
        grown = set(found) - set(index)
        assert len(grown) == m
        assert all(scores[at] >= threshold and found[at] == 0 for at in grown)
        assert {at: v for at, v in found.items() if at not in grown} == kept
    assert all(a.watch is None for a in adapters(model).values())


@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (2, 3, 4)])
def test_sm3_serves_a_head_that_is_trained_whole(shape):
    model = wrapped(selection_algorithm="sm3")
    head = nn.Parameter(torch.randn(shape))
    optimizer = SparseSM3([head], model, lr=0.1)
    expected, bounds = head.detach().clone(), None
    for _ in range(3):
        head.grad = torch.randn(shape)
        second = head.grad**2
        if bounds is not None:
            second = second + torch.stack(torch.broadcast_tensors(*bounds)).amin(0)
        axes = range(len(shape))
        bounds = [
            second.amax([o for o in axes if o != axis], keepdim=True) if len(shape) > 1 else second
            for axis in axes
        ] or [second]
        expected -= 0.1 * head.grad / (second + 1e-8).sqrt()
        optimizer.step()
        torch.testing.assert_close(head.detach(), expected)


def test_sm3_state_is_small_and_survives_its_file():
    model = wrapped(selection_algorithm="sm3")
    data = [[b] for b in batches(5)]
    whole = SparseSM3(trained(model), model)
    step_through(model, whole, data)
    for adapter in adapters(model).values():
        sizes = {name: len(t) for name, t in whole.state[adapter.values].items()}
        assert sizes == dict(zip(("row", "column"), adapter.stored_shape, strict=True))
    twin = wrapped(selection_algorithm="sm3")
    first = SparseSM3(trained(twin), twin)
    step_through(twin, first, data, stop=2)
    second = SparseSM3(trained(twin), twin)
    second.load_state_dict(first.state_dict())
    step_through(twin, second, data[2:], first=3)
    for a, b in zip(adapters(model).values(), adapters(twin).values(), strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.values, b.values)


# Merging and files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_and_unmerging_restores_every_bit(dtype):
    model = stirred(wrapped(testing.tiny_llama().to(dtype)))
    batch = batches(1)[0]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = testing.logits(model, batch)
    model.merge_adapter()
    for key, adapter in adapters(model).items():
        wanted = before[f"base_model.model.{key}.base_layer.weight"].float().clone().view(-1)
        wanted[adapter.indices.long()] += adapter.values.detach()
        found = model.get_base_model().get_submodule(key).base_layer.weight
        assert torch.equal(found, wanted.to(dtype).view_as(found))
    assert torch.equal(testing.logits(model, batch), expected)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_the_file_holds_the_indices_and_the_config_the_counts(tmp_path):
    model = wrapped()
    step_through(model, adamw(model), [[b] for b in batches(A + 1)])
    model.save_pretrained(tmp_path)
    loaded = petl.load(testing.tiny_llama(), tmp_path)
    assert loaded.active_peft_config.num_deltas == model.active_peft_config.num_deltas
    for a, b in zip(adapters(model).values(), adapters(loaded).values(), strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.values, b.values)
    batch = batches(1)[0]
    assert torch.equal(testing.logits(loaded, batch), testing.logits(model, batch))


# Processes and resuming


@pytest.mark.parametrize("stop", [2, 3, 5, 9, 10])
def test_a_run_resumed_in_any_phase_equals_the_uninterrupted_one(tmp_path, stop):
    data = [[b] for b in batches(13)]
    whole = wrapped()
    step_through(whole, adamw(whole), data)

    first = wrapped()
    optimizer = adamw(first)
    step_through(first, optimizer, data, stop=stop)
    first.save_pretrained(tmp_path)
    state = petl.lifecycle(first).state_dict()
    assert bool(sum(".candidates" in key for key in state)) == (stop in (2, 9, 10))

    second = petl.load(testing.tiny_llama(), tmp_path, is_trainable=True)
    resumed = adamw(second)
    resumed.load_state_dict(optimizer.state_dict())
    petl.lifecycle(second).load_state_dict({key: t.clone() for key, t in state.items()})
    step_through(second, resumed, data[stop:], first=stop + 1)
    for a, b in zip(adapters(whole).values(), adapters(second).values(), strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.values, b.values)


def test_a_state_of_another_model_is_refused():
    model = wrapped().train()
    model(**batches(1)[0]).loss.backward()
    state = petl.lifecycle(model).state_dict()
    other = petl.wrap(testing.tiny_gpt2(), "sparse", **CYCLE)
    with pytest.raises(InputError, match="which this model lacks"):
        petl.lifecycle(other).load_state_dict(state)


def test_trainer_revises_the_set_as_a_loop_by_hand_does(tmp_path):
    ids = testing.TINY_MODELS["llama"].batch(4 * (A + 1), seed=1)["input_ids"]
    rows = {"input_ids": ids, "labels": ids}  # as many labels in each: a step is a mean of means
    model, twin = (wrapped(task_type="CAUSAL_LM") for _ in range(2))
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=A + 1,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return None

    data = Dataset.from_dict({name: t.tolist() for name, t in rows.items()})
    optimizers = (adamw(model), None)
    callbacks = [petl.Callback()]
    InOrder(
        model, arguments, train_dataset=data, optimizers=optimizers, callbacks=callbacks
    ).train()

    optimizer, life = adamw(twin), petl.lifecycle(twin)
    for step in range(1, A + 2):
        for start in (4 * step - 4, 4 * step - 2):
            part = {name: t[start : start + 2] for name, t in rows.items()}
            (twin.train()(**part).loss / 2).backward()
        nn.utils.clip_grad_norm_(trained(twin), 0.5)
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
    for a, b in zip(adapters(model).values(), adapters(twin).values(), strict=True):
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-3)


STEPS = A + 2


def train_a_share():
    """Indices, values and candidates' sums of one process of two, each with rows of its own."""
    rank = torch.distributed.get_rank()
    model = nn.parallel.DistributedDataParallel(wrapped())
    optimizer = adamw(model)
    shares = [
        [{n: t[2 * rank : 2 * rank + 2] for n, t in b.items()}] for b in batches(STEPS, rows=4)
    ]
    step_through(model, optimizer, shares)
    return {key: (a.indices, a.values.detach()) for key, a in adapters(model).items()}


def test_two_processes_with_different_data_agree_and_equal_one_on_the_joined_batch():
    ranks = testing.in_processes(2, train_a_share)
    model = wrapped()
    for key, (indices, values) in ranks[0].items():
        assert torch.equal(ranks[1][key][0], indices), key
        assert torch.equal(ranks[1][key][1], values), key
    # one process: the first micro-batch is rank 0's first share, and decides the candidates
    shares = [
        [{n: t[i : i + 2] for n, t in b.items()} for i in (0, 2)] for b in batches(STEPS, rows=4)
    ]
    step_through(model, adamw(model), shares)
    for key, adapter in adapters(model).items():
        assert torch.equal(adapter.indices, ranks[0][key][0]), key
        torch.testing.assert_close(adapter.values.detach(), ranks[0][key][1], atol=1e-5, rtol=1e-3)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"selection_algorithm": "set"}, "selection_algorithm must be rigl, sm3 or none"),
        (
            {"reselection_steps": 5, "selection_accumulation_steps": 5},
            "selection_accumulation_steps must be smaller than reselection_steps",
        ),
        (
            {"num_tunable_weights": 10**6},
            "number of tunable weights 1000000 exceeds the 92160 weights of the target modules",
        ),
        ({"reselection_rate_policy": "step"}, "is not linear or cosine"),
        ({"initial_reselection_rate": 1.1}, r"not in \[0, 1\]"),
        ({"r": 0}, "r=0 is not at least 1"),
        ({"target_modules": ["input_layernorm"]}, "not a linear layer"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        wrapped(**fields)


def test_a_run_without_its_length_is_refused_before_it_begins():
    life = petl.lifecycle(wrapped(total_step=None))
    with pytest.raises(InputError, match="total_step must be set when weights are reselected"):
        life.prepare([])
    with pytest.raises(InputError, match="total_step must be set when weights are reselected"):
        life.after_step(1, None)


def test_an_optimizer_that_does_not_fit_is_refused():
    model = wrapped()
    life = petl.lifecycle(model)
    with pytest.raises(InputError, match="pass the optimizer"):
        life.after_step(1)
    with pytest.raises(InputError, match="does not hold the values"):
        life.after_step(1, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    scaled = Accelerator(cpu=True).prepare(adamw(model))
    scaled.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(UnsupportedError, match="fp16"):
        life.after_step(1, scaled)
    by_sm3 = wrapped(selection_algorithm="sm3")
    with pytest.raises(InputError, match="SparseSM3, and the optimizer is AdamW"):
        petl.lifecycle(by_sm3).after_step(1, adamw(by_sm3))
    with pytest.raises(InputError, match="sparse adapters"):
        SparseSM3([nn.Parameter(torch.zeros(1))], testing.tiny_llama())


def test_state_in_bytes_and_sharded_values_are_refused_before_anything_moves():
    model = wrapped()
    optimizer = adamw(model)
    step_through(model, optimizer, [[b] for b in batches(A)], stop=A - 1)
    before = [a.indices.clone() for a in adapters(model).values()]
    for p in trained(model):
        optimizer.state[p]["state1"] = torch.zeros(p.shape, dtype=torch.uint8)
    model(**batches(1)[0]).loss.backward()
    with pytest.raises(UnsupportedError, match="32-bit state"):
        petl.lifecycle(model).after_step(A, optimizer)
    assert all(
        torch.equal(a.indices, b) for a, b in zip(adapters(model).values(), before, strict=True)
    )
    adapter = next(iter(adapters(model).values()))
    adapter.values.data = adapter.values.data[:0]  # as ZeRO-3 leaves it
    with pytest.raises(UnsupportedError, match="reselection needs whole values"):
        petl.lifecycle(model).after_step(A, optimizer)


def test_the_yaml_says_the_defaults_of_the_config():
    path = Path(__file__).parents[2] / "configs/method/sparse.yaml"
    fields = {str(key): value for key, value in OmegaConf.load(path).items() if key != "name"}
    assert petl.build_config("sparse", **fields) == SparseConfig()
    added = {f.name for f in dataclasses.fields(SparseConfig)}
    added -= {f.name for f in dataclasses.fields(MethodConfig)}
    assert added <= set(fields)


def test_a_dense_gradient_is_that_of_the_stored_weight():
    """The tests' own tool: a hand-made layer, so that it does not lean on the method."""
    x, weight = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
    F.linear(x, weight).pow(2).sum().backward()
    assert torch.allclose(weight.grad, 2 * (x @ weight.detach().t()).t() @ x)
