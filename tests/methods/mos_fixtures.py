"""A tiny Llama with MoS on it, and its weights put together shard by shard."""

import pytest
import torch

import petl
from petl.testing.models import TINY_MODELS, tiny_llama

TINY = {"r": 4, "equivalent_rank": 2, "shards_per_vector": 4, "private_rank": 1}
LINEARS = {  # of a tiny Llama: in, out
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}


@pytest.fixture
def batch():
    return TINY_MODELS["llama"].batch()


def wrapped(layers=3, **fields):
    torch.manual_seed(0)
    return petl.wrap(tiny_llama(layers), "mos", **{**TINY, **fields})


def pools(model, adapter="default"):
    return dict(model.base_model.pools[adapter].named_parameters())


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for pool in pools(model).values():
            pool.normal_(std=0.2)


def adapter_at(model, layer, linear="self_attn.q_proj", name="default"):
    return model.base_model.model.get_submodule(f"model.layers.{layer}.{linear}").adapters[name]


def glued(pool, index, rank, shards):
    """The vectors, shard by shard: entry j s + t of `index` is piece t of vector j."""
    rows = []
    for j in range(rank):
        pieces = [pool[int(index[j * shards + t])] for t in range(shards)]
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


def dense_weights(model, scale, rank=4, shards=4):
    """Base weights plus (alpha / r) B^T A of each linear layer, by the name of the weight."""
    weights = {}
    for i in range(model.config.num_hidden_layers):
        for linear in LINEARS:
            layer = model.base_model.model.get_submodule(f"model.layers.{i}.{linear}")
            group = "model__layers__" + linear.replace(".", "__")
            adapter = layer.adapters["default"]
            A = glued(pools(model)[f"pool_A_{group}"], adapter.index_A, rank, shards)
            B = glued(pools(model)[f"pool_B_{group}"], adapter.index_B, rank, shards)
            weights[f"model.layers.{i}.{linear}.weight"] = layer.base_layer.weight + scale * B.T @ A
    return weights
