"""Sparse fine-tuning in training: SM3, resuming, processes, Trainer."""

import math

import pytest
import torch
from datasets import Dataset
from kept_processes import in_processes
from sparse_fixtures import (
    CYCLE,
    A,
    adamw,
    adapters,
    batches,
    randomized,
    step_through,
    trained,
    wrapped,
)
from torch import nn
from transformers import Trainer, TrainingArguments

import petl
from petl import testing
from petl.errors import InputError
from petl.methods.sparse import SparseSM3

# SM3


def test_sm3_follows_the_equations_entry_by_entry():
    model = randomized(wrapped(selection_algorithm="sm3"))
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
            for name, sums in (("row", row[key]), ("column", column[key])):  # squares: tiny
                torch.testing.assert_close(state[name], torch.tensor(sums), atol=0, rtol=1e-4)


def test_sm3_grows_at_the_largest_products_of_accumulators():
    model = randomized(
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
    assert all(a.candidates is None for a in adapters(model).values())


@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (2, 3, 4)])
def test_sm3_trains_other_tensors_as_adamw_does(shape):
    model = wrapped(selection_algorithm="sm3")
    head = nn.Parameter(torch.randn(shape))
    twin = nn.Parameter(head.detach().clone())
    settings = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.95)}
    optimizers = SparseSM3([head], model, **settings), torch.optim.AdamW([twin], **settings)
    for _ in range(4):
        head.grad = torch.randn(shape)
        twin.grad = head.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(head, twin)


def test_sm3_state_is_small_and_can_be_saved():
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


def test_sm3_state_of_a_half_precision_head_is_restored_in_float32():
    model = wrapped(selection_algorithm="sm3")
    heads = [nn.Parameter(torch.randn(4, 5).bfloat16()) for _ in range(2)]
    heads[1].data.copy_(heads[0])
    whole, first = (SparseSM3([head], model) for head in heads)
    second = SparseSM3(heads[1:], model)
    for step in range(4):
        for head in heads:
            head.grad = torch.full((4, 5), 0.3**step).bfloat16()
        if step == 2:
            second.load_state_dict(first.state_dict())
        whole.step()
        (first if step < 2 else second).step()
    assert torch.equal(*heads)
    moments = [
        optimizer.state[head] for optimizer, head in zip((whole, second), heads, strict=True)
    ]
    for name in ("exp_avg", "exp_avg_sq"):
        assert moments[0][name].dtype == torch.float32
        assert torch.equal(moments[0][name], moments[1][name])


# A further training


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_first_selection_of_a_further_training_exchanges_no_more_than_later_ones(
    is_loaded, tmp_path
):
    model = wrapped(initial_reselection_rate=0.2)
    step_through(model, adamw(model), [[b] for b in batches(4)])
    if is_loaded:  # else trained again in the same process
        model.save_pretrained(tmp_path)
        model = petl.load(testing.tiny_llama(), tmp_path, is_trainable=True)
    before = {key: a.indices.clone() for key, a in adapters(model).items()}
    optimizer = adamw(model)
    petl.lifecycle(model).attach_optimizer(optimizer)
    step_through(model, optimizer, [[b] for b in batches(2)])
    # also if it is interrupted before that selection
    model.save_pretrained(tmp_path)
    again = petl.load(testing.tiny_llama(), tmp_path, is_trainable=True)
    petl.lifecycle(again).load_state_dict(petl.lifecycle(model).state_dict())
    optimizer = adamw(again)
    petl.lifecycle(again).attach_optimizer(optimizer, 2)
    step_through(again, optimizer, [[b] for b in batches(1)], first=3)
    for key, adapter in adapters(again).items():
        kept = torch.isin(adapter.indices, before[key]).sum()
        assert len(before[key]) * 0.8 <= kept < len(before[key])


# Processes and resuming


@pytest.mark.thorough
@pytest.mark.parametrize("stop", [2, pytest.param(9, marks=pytest.mark.thorough), 5])
def test_a_run_resumed_in_any_phase_equals_the_uninterrupted_one(tmp_path, stop):
    data = [[b] for b in batches(13)]
    whole = wrapped()
    step_through(whole, adamw(whole), data)

    first = wrapped()
    optimizer = adamw(first)
    step_through(first, optimizer, data, stop=stop)
    first.save_pretrained(tmp_path)
    state = petl.lifecycle(first).state_dict()
    assert bool(sum(".candidates" in key for key in state)) == (stop in (2, 9))

    second = petl.load(testing.tiny_llama(), tmp_path, is_trainable=True)
    resumed = adamw(second)
    resumed.load_state_dict(optimizer.state_dict())
    petl.lifecycle(second).load_state_dict({key: t.clone() for key, t in state.items()})
    step_through(second, resumed, data[stop:], first=stop + 1)
    for a, b in zip(adapters(whole).values(), adapters(second).values(), strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.values, b.values)


def test_a_state_of_another_model_raises():
    model = wrapped()
    step_through(model, adamw(model), [[batches(1)[0]]])
    state = petl.lifecycle(model).state_dict()
    other = petl.wrap(testing.tiny_gpt2(), "sparse", **CYCLE)
    with pytest.raises(InputError, match="does not have"):
        petl.lifecycle(other).load_state_dict(state)


def test_trainer_exchanges_the_same_entries_as_an_explicit_loop(tmp_path):
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

    optimizer, lifecycle = adamw(twin), petl.lifecycle(twin)
    for step in range(1, A + 2):
        for start in (4 * step - 4, 4 * step - 2):
            part = {name: t[start : start + 2] for name, t in rows.items()}
            (twin.train()(**part).loss / 2).backward()
        nn.utils.clip_grad_norm_(trained(twin), 0.5)
        optimizer.step()
        lifecycle.after_step(step, optimizer)
        optimizer.zero_grad()
    for a, b in zip(adapters(model).values(), adapters(twin).values(), strict=True):
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-3)


STEPS = A + 2


def train_a_share():
    """Indices, values and candidates' sums of one of two processes, each with its own rows."""
    rank = torch.distributed.get_rank()
    model = nn.parallel.DistributedDataParallel(wrapped())
    optimizer = adamw(model)
    shares = [
        [{n: t[2 * rank : 2 * rank + 2] for n, t in b.items()}] for b in batches(STEPS, rows=4)
    ]
    step_through(model, optimizer, shares)
    return {key: (a.indices, a.values.detach()) for key, a in adapters(model).items()}


@pytest.mark.thorough
def test_two_processes_with_different_data_agree_and_equal_one_on_the_joined_batch():
    ranks = in_processes(2, train_a_share)
    model = wrapped()
    for key, (indices, values) in ranks[0].items():
        assert torch.equal(ranks[1][key][0], indices), key
        assert torch.equal(ranks[1][key][1], values), key
    shares = [
        [{n: t[i : i + 2] for n, t in b.items()} for i in (0, 2)] for b in batches(STEPS, rows=4)
    ]
    step_through(model, adamw(model), shares)
    for key, adapter in adapters(model).items():
        assert torch.equal(adapter.indices, ranks[0][key][0]), key
        torch.testing.assert_close(adapter.values.detach(), ranks[0][key][1], atol=1e-5, rtol=1e-3)
