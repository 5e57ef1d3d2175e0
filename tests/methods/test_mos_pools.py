"""MoS's pools: sizes against the published counts, and the shards that each layer draws."""

import os

import peft
import pytest
import torch
from mos_fixtures import LINEARS, TINY, adapter_at, pools, trainable, wrapped
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import petl
from petl import testing
from petl.methods.mos import MosConfig, draw
from petl.testing.models import tiny_llama


@pytest.mark.parametrize(("e", "shards"), [(2, 4), (3, 1), (4, 16)])
def test_pools_have_as_many_parameters_as_lora_of_the_equivalent_rank(e, shards):
    model = wrapped(equivalent_rank=e, shards_per_vector=shards)
    expected = {}
    for linear, (i, o) in LINEARS.items():
        group = "model__layers__" + linear.replace(".", "__")
        expected[f"pool_A_{group}"] = (e * 3 * shards, i // shards)
        expected[f"pool_B_{group}"] = (e * 3 * shards, o // shards)
    assert {name: tuple(pool.shape) for name, pool in pools(model).items()} == expected
    lora = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=e, target_modules=[n.split(".")[1] for n in LINEARS])
    )
    assert trainable(model) == trainable(lora) == 3 * e * sum(i + o for i, o in LINEARS.values())


def test_rank_shards_and_private_rank_do_not_change_the_count():
    counts = {
        trainable(wrapped(r=r, shards_per_vector=shards, private_rank=private))
        for r, shards, private in [(2, 4, 2), (4, 8, 1), (6, 1, 0), (3, 32, 1)]
    }
    assert len(counts) == 1


def llama(hidden, inner, layers, heads, kv_heads):
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


PUBLISHED = {
    "llama-2-7b": (lambda: llama(4096, 11008, 32, 32, 32), 2, 4_997_120),
    "llama-2-7b e=8": (lambda: llama(4096, 11008, 32, 32, 32), 8, 19_988_480),
    "llama-2-13b": (lambda: llama(5120, 13824, 40, 40, 40), 2, 7_823_360),
    "llama-3-8b": (lambda: llama(4096, 14336, 32, 32, 8), 2, 5_242_880),
    "llama-3.2-3b": (lambda: llama(3072, 8192, 28, 24, 8), 2, 3_039_232),
}


@pytest.mark.parametrize(
    "name",
    [
        "llama-2-7b",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in [*PUBLISHED][1:]),
    ],
)
def test_counts_equal_those_the_authors_logged(name):
    build, budget, expected = PUBLISHED[name]
    model = petl.wrap(build(), "mos", r=16, equivalent_rank=budget)
    assert trainable(model) == expected
    if name == "llama-2-7b e=8":
        indices = sum(b.numel() for n, b in model.named_buffers() if ".index_" in n)
        assert indices == 28_672


def test_count_on_an_encoder_equals_the_published_one():
    with torch.device("meta"):
        base = RobertaModel(RobertaConfig(vocab_size=8))
    names = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
    model = petl.wrap(base, "mos", r=8, target_modules=[*names, "output.dense"])
    assert trainable(model) == 331_776


def test_each_layer_draws_public_shards_once_and_then_has_its_own():
    model = wrapped(r=3)
    public, own = 1 * 3 * 4, 1 * 4
    seen = []
    for ordinal in range(3):
        adapter = adapter_at(model, ordinal)
        for index in (adapter.index_A, adapter.index_B):
            assert index.dtype == torch.int32
            assert len(index) == 3 * 4
            drawn, private = index[: 2 * 4], index[2 * 4 :]
            assert len(drawn.unique()) == len(drawn)
            assert drawn.max() < public
            start = public + ordinal * own
            assert private.tolist() == list(range(start, start + own))
            seen.append(drawn.tolist())
    assert len({tuple(draw) for draw in seen}) == 6  # different for each side and layer


def test_draw_depends_on_the_seed_only():
    torch.manual_seed(1)
    first = wrapped()
    torch.manual_seed(2)
    torch.rand(7)
    second = wrapped()
    other = wrapped(seed=1)
    for i in range(3):
        index = adapter_at(first, i).index_A
        assert torch.equal(index, adapter_at(second, i).index_A)
        assert not torch.equal(index[:12], adapter_at(other, i).index_A[:12])


def test_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    draw(MosConfig(**TINY), "q", 3, 0, "A")
    assert torch.equal(state, torch.get_rng_state())


def drawn() -> tuple[int, list[int]]:
    """A hash, which depends on the process, and a draw."""
    return hash("attn"), draw(MosConfig(**TINY), "attn", 3, 1, "A").tolist()


def test_draw_is_the_same_in_another_process():
    (theirs, found), (ours, expected) = testing.in_fresh_process(drawn), drawn()
    assert theirs != ours or "PYTHONHASHSEED" in os.environ
    assert found == expected


def test_without_subset_selection_all_layers_share_their_public_shards():
    model = wrapped(r=3, subset_selection=False)
    public = {tuple(adapter_at(model, i).index_A[:8].tolist()) for i in range(3)}
    private = {tuple(adapter_at(model, i).index_A[8:].tolist()) for i in range(3)}
    assert (len(public), len(private)) == (1, 3)
    assert not torch.equal(adapter_at(model, 0).index_A, adapter_at(model, 0).index_B)


def test_without_pair_dissociation_a_and_b_use_the_same_shards():
    model = wrapped(r=3, pair_dissociation=False)
    for i in range(3):
        assert torch.equal(adapter_at(model, i).index_A, adapter_at(model, i).index_B)
    assert not torch.equal(adapter_at(model, 0).index_A[:8], adapter_at(model, 1).index_A[:8])


def test_without_privatization_all_shards_are_public():
    model = wrapped(r=6, private_rank=0)
    rows = adapter_at(model, 0).index_A
    assert sorted(rows.tolist()) == list(
        range(2 * 3 * 4)
    )  # r = e L: pure sharing, all shards are used


def test_without_vector_sharding_a_shard_is_a_vector():
    model = wrapped(shards_per_vector=1)
    pool = pools(model)["pool_A_model__layers__self_attn__q_proj"]
    adapter = adapter_at(model, 1)
    assert torch.equal(adapter.factors().A, pool[adapter.index_A.long()])


def test_with_private_shards_only_each_row_belongs_to_one_layer():
    model = wrapped(r=2, private_rank=2, shards_per_vector=1)
    rows = [int(row) for i in range(3) for row in adapter_at(model, i).index_A]
    assert rows == list(range(6))
