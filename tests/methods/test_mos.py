"""MoS: initialization, update and file, against dense weights composed by loops."""

import peft
import pytest
import torch
from mos_fixtures import (
    LINEARS,
    TINY,
    adapter_at,
    batch,
    dense_weights,
    pools,
    randomize,
    trainable,
    wrapped,
)
from safetensors.torch import load_file
from torch.func import functional_call

import petl
from petl.errors import InputError
from petl.testing.models import tiny_llama
from petl.training.optimizer import groups
from petl.training.runs.settings import TrainConfig

CONTRACT = {"fields": {"r": 3, "equivalent_rank": 3}}

__all__ = ["batch"]


def test_initially_only_b_pools_get_a_gradient(batch):
    model = wrapped()
    model(**batch).loss.backward()
    for name, pool in pools(model).items():
        assert pool.grad.any() == name.startswith("pool_B")


def test_a_pools_are_initialized_by_the_fan_in_of_the_complete_vector():
    for name, pool in pools(wrapped(equivalent_rank=8, r=8, private_rank=2)).items():
        if name.startswith("pool_A"):
            bound = (96 if "down_proj" in name else 64) ** -0.5
            assert 0.98 * bound < pool.abs().max() <= bound
        else:
            assert not pool.any()
        assert pool.dtype == torch.float32


def test_logits_and_pool_gradients_equal_dense_weights_built_shard_by_shard(batch):
    model = wrapped(lora_alpha=6)
    randomize(model)
    out = model(**batch)
    out.loss.backward()
    gradients = {name: pool.grad.clone() for name, pool in pools(model).items()}
    model.zero_grad()

    plain = functional_call(tiny_llama(), dense_weights(model, 6 / 4), kwargs=batch)
    torch.testing.assert_close(out.logits, plain.logits, atol=2e-5, rtol=0)
    plain.loss.backward()
    for name, pool in pools(model).items():
        torch.testing.assert_close(gradients[name], pool.grad, atol=2e-5, rtol=1e-4)


def test_file_has_each_pool_once_and_the_indices(tmp_path, batch):
    model = wrapped()
    randomize(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    floats = [t for t in tensors.values() if t.is_floating_point()]
    assert sum(t.numel() for t in floats) == trainable(model)
    integers = [t for t in tensors.values() if t.dtype == torch.int32]
    assert len(floats) + len(integers) == len(tensors)
    assert sum(t.numel() for t in integers) == 2 * 4 * 4 * 3 * len(LINEARS)
    loaded = petl.load(tiny_llama(), tmp_path)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_loading_uses_the_indices_of_the_file_not_of_the_seed(tmp_path, batch):
    model = wrapped(seed=3)
    randomize(model)
    model.save_pretrained(tmp_path)
    other = wrapped(seed=4)
    assert not torch.equal(adapter_at(other, 0).index_A, adapter_at(model, 0).index_A)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(other, tensors)
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_excluded_layers_make_the_pool_smaller():
    model = wrapped(layers=5, layers_to_transform=[1, 3, 4])
    pool = pools(model)["pool_A_model__layers__self_attn__q_proj"]
    assert len(pool) == 2 * 3 * 4
    own = [adapter_at(model, i).index_A[-4:].tolist() for i in (1, 3, 4)]
    assert own == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]


def test_a_second_shape_under_one_path_has_its_own_pool():
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(torch.nn.Linear(8, o) for o in (8, 16, 8))}
    )
    wrapped = petl.wrap(model, "mos", **{**TINY, "r": 2})
    shapes = {n: tuple(p.shape) for n, p in pools(wrapped).items()}
    assert shapes == {
        "pool_A_layers": (2 * 2 * 4, 2),
        "pool_B_layers": (2 * 2 * 4, 2),
        "pool_A_layers__8x16": (2 * 1 * 4, 2),
        "pool_B_layers__8x16": (2 * 1 * 4, 4),
    }


def test_factors_are_a_plain_lora_of_rank_r(batch):
    model = wrapped(lora_alpha=6)
    randomize(model)
    names = [n.split(".")[1] for n in LINEARS]
    lora = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)
    )
    with torch.no_grad():
        for name, layer in lora.base_model.model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                ours = model.base_model.model.get_submodule(name)
                assert ours.supports_lora_conversion()
                A, B, scale = ours.adapters["default"].factors()
                assert scale == layer.scaling["default"]
                layer.lora_A["default"].weight.copy_(A)
                layer.lora_B["default"].weight.copy_(B)
        torch.testing.assert_close(lora(**batch).logits, model(**batch).logits, atol=2e-5, rtol=0)


def test_lora_plus_trains_the_b_pools_faster():
    model = wrapped()
    optimizer = petl.loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_loop = {
        id(p): group["lr"]
        for group in groups(model, TrainConfig(lr=1e-3, loraplus_ratio=8))
        for p in group["params"]
    }
    for name, pool in pools(model).items():
        assert rates[id(pool)] == by_loop[id(pool)] == (8e-3 if name.startswith("pool_B") else 1e-3)


def test_shards_that_no_layer_uses_are_logged(caplog):
    with caplog.at_level("INFO", logger="petl.methods.mos.draw"):
        wrapped(r=6, private_rank=0, target_modules=["q_proj"])
        wrapped(r=2, private_rank=1, target_modules=["q_proj"], subset_selection=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"MoS: 66.7 % of the shards in pool {side} are drawn by no layer and will not train; "
        "a higher r or a lower equivalent_rank leaves fewer unused"
        for side in "AB"
    ]


@pytest.mark.parametrize(
    ("fields", "max_r", "min_rank"),
    [
        ({"r": 8}, 4, 4),  # three layers: r <= 1 + (2 - 1) 3, equivalent_rank >= 1 + 7 / 3
        ({"r": 9, "private_rank": 0}, 6, 3),
        ({"r": 30, "equivalent_rank": 5, "private_rank": 2}, 11, 12),
    ],
)
def test_the_values_suggested_for_too_few_layers_are_the_limits(fields, max_r, min_rank):
    """They hold for all groups; the smallest group decides."""
    targets = (
        r".*(q_proj|layers\.[012]\.mlp\.up_proj)"  # four layers in one group, three in the other
    )

    def build(**more):
        return wrapped(layers=4, target_modules=targets, **{**fields, **more})

    with pytest.raises(InputError, match=f"r <= {max_r} .*>= {min_rank}$"):
        build()
    build(r=max_r)
    build(equivalent_rank=min_rank)
    for beyond in ({"r": max_r + 1}, {"equivalent_rank": min_rank - 1}):
        with pytest.raises(InputError):
            build(**beyond)


def test_target_modules_null_means_every_linear_layer():
    assert trainable(wrapped(target_modules=None)) == trainable(wrapped())
