"""Gathering of MoS's shards: in training, under checkpointing, with several adapters."""

import pytest
import torch
from mos_fixtures import LINEARS, TINY, batch, pools, randomize, wrapped

import petl
from petl.core.layers import context
from petl.errors import UnsupportedError
from petl.methods.mos import adapter as mos_adapter

__all__ = ["batch"]


def in_training(**checkpointing):
    model = wrapped().train()
    randomize(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def pool_gradients(model):
    return {name: pool.grad for name, pool in pools(model).items()}


@pytest.fixture
def gathers(monkeypatch):
    """Records the rank of each gather from a pool."""
    ranks, gather = [], mos_adapter.gather

    def note(pool, index, rank):
        ranks.append(rank)
        return gather(pool, index, rank)

    monkeypatch.setattr(mos_adapter, "gather", note)
    return ranks


def test_a_training_forward_gathers_once_for_all_layers_of_a_group(batch, gathers):
    model = in_training()
    model(**batch).loss.backward()
    assert gathers == [3 * TINY["r"]] * 2 * len(LINEARS)
    gathers.clear()
    with torch.no_grad():
        model(**batch)
    assert gathers == [TINY["r"]] * 2 * len(LINEARS) * 3


def test_reentrant_checkpointing_gathers_for_each_layer_in_its_segment(batch, gathers):
    loss = in_training(use_reentrant=True)(**batch).loss
    gathers.clear()
    loss.backward()
    assert gathers == [TINY["r"]] * 2 * len(LINEARS) * 3


def test_a_forward_without_gradients_before_backward_does_not_affect_checkpointing(batch):
    expected, model = in_training(), in_training(use_reentrant=False)
    expected(**batch).loss.backward()
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    loss.backward()
    torch.testing.assert_close(pool_gradients(model), pool_gradients(expected))


def test_layers_called_alone_after_a_step_use_the_new_shards(batch):
    model = in_training()
    model(**batch).loss.backward()
    randomize(model)
    with torch.no_grad():
        for pool in pools(model).values():
            pool.mul_(2)
    model.zero_grad()
    layer = model.base_model.model.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(3, 64)
    A, B, scale = layer.adapters["default"].factors()
    y = layer(x)
    torch.testing.assert_close(y, layer.base_layer(x) + scale * (x @ A.t()) @ B.t())
    y.sum().backward()
    assert pools(model)["pool_B_model__layers__mlp__up_proj"].grad.any()


def test_a_second_active_adapter_and_a_frozen_one_have_their_own_gradients(batch):
    model = in_training()
    model.add_adapter("second", petl.build_config("mos", **TINY, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    for pool in pools(model, "second").values():
        pool.data.normal_(std=0.2)
        pool.requires_grad_(requires_grad=True)
    for pool in pools(model).values():
        pool.requires_grad_(requires_grad=False)
    model(**batch).loss.backward()
    assert all(pool.grad.any() for pool in pools(model, "second").values())
    assert all(pool.grad is None for pool in pools(model).values())


def test_reentrant_checkpointing_raises_in_several_processes(batch, monkeypatch):
    model = wrapped()
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    monkeypatch.setattr("petl.methods.mos.adapter.num_processes", lambda: 2)
    with pytest.raises(UnsupportedError):
        model(**batch)
    with torch.no_grad():
        model(**batch)  # evaluation is not checkpointed
    model.gradient_checkpointing_disable()
    model(**batch).loss.backward()


def test_several_processes_are_counted():
    assert context.num_processes() == 1
