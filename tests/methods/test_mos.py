"""MoS against the paper: explicit loops over shards, dense weights, the authors' logged counts."""

import copy
import os
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import petl
from petl.core import context
from petl.errors import InputError, UnsupportedError
from petl.methods.mos import MosConfig, draw
from petl.methods.mos import adapter as mos_adapter
from petl.optim import groups
from petl.settings import TrainConfig
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


@pytest.mark.parametrize(("e", "shards"), [(2, 4), (3, 1), (4, 16)])
def test_pools_have_the_shapes_and_the_count_of_a_lora_of_the_budget(e, shards):
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


@pytest.mark.parametrize("name", PUBLISHED)
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
    assert len({tuple(draw) for draw in seen}) == 6  # sides differ, layers differ


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


def test_draw_is_the_same_in_another_process():
    code = (
        "from petl.methods.mos import MosConfig, draw\n"
        f"print(draw(MosConfig(**{TINY}), 'attn', 3, 1, 'A').tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(draw(MosConfig(**TINY), "attn", 3, 1, "A").tolist())


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
    assert sorted(rows.tolist()) == list(range(2 * 3 * 4))  # r = e L: pure sharing, all of them


def test_without_vector_sharding_a_shard_is_a_vector():
    model = wrapped(shards_per_vector=1)
    pool = pools(model)["pool_A_model__layers__self_attn__q_proj"]
    adapter = adapter_at(model, 1)
    assert torch.equal(adapter.factors().A, pool[adapter.index_A.long()])


def test_all_private_is_plain_lora_with_a_row_for_one_layer_only():
    model = wrapped(r=2, private_rank=2, shards_per_vector=1)
    rows = [int(row) for i in range(3) for row in adapter_at(model, i).index_A]
    assert rows == list(range(6))


def test_start_is_the_base_model_bit_for_bit(batch):
    model = wrapped()
    base = tiny_llama()
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_at_the_start_only_b_pools_get_a_gradient(batch):
    model = wrapped()
    model(**batch).loss.backward()
    for name, pool in pools(model).items():
        assert pool.grad.any() == name.startswith("pool_B")


def test_a_pools_start_uniform_over_the_fan_of_the_whole_vector():
    for name, pool in pools(wrapped(equivalent_rank=8, r=8, private_rank=2)).items():
        if name.startswith("pool_A"):
            bound = (96 if "down_proj" in name else 64) ** -0.5
            assert 0.98 * bound < pool.abs().max() <= bound
        else:
            assert not pool.any()
        assert pool.dtype == torch.float32


def test_half_precision_base_keeps_float32_pools(batch):
    model = petl.wrap(tiny_llama().bfloat16(), "mos", **TINY)
    assert all(pool.dtype == torch.float32 for pool in pools(model).values())
    randomise(model)
    model(**batch).loss.backward()
    assert all(pool.grad.dtype == torch.float32 for pool in pools(model).values())


def test_logits_and_pool_gradients_equal_dense_weights_built_shard_by_shard(batch):
    model = wrapped(lora_alpha=6)
    randomise(model)
    out = model(**batch)
    out.loss.backward()
    gradients = {name: pool.grad.clone() for name, pool in pools(model).items()}
    model.zero_grad()

    plain = functional_call(tiny_llama(), dense_weights(model, 6 / 4), kwargs=batch)
    torch.testing.assert_close(out.logits, plain.logits, atol=2e-5, rtol=0)
    plain.loss.backward()
    for name, pool in pools(model).items():
        torch.testing.assert_close(gradients[name], pool.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_and_taking_it_back_change_no_output(name):
    tiny = TINY_MODELS[name]
    batch = tiny.batch()
    model = petl.wrap(tiny.base(), "mos", **{**TINY, "r": 3})
    randomise(model)
    with torch.no_grad():
        adapted = model(**batch).logits
        model.merge_adapter()
        merged = model(**batch).logits
        model.unmerge_adapter()
        back = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        plain = model.merge_and_unload()(**batch).logits
    for logits in (merged, back, plain):
        torch.testing.assert_close(logits, adapted, atol=2e-5, rtol=0)
    assert (base - adapted).abs().max() > 1e-2


def test_file_holds_each_pool_once_and_the_indices(tmp_path, batch):
    model = wrapped()
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    floats = [t for t in tensors.values() if t.is_floating_point()]
    assert sum(t.numel() for t in floats) == trainable(model)
    integers = [t for t in tensors.values() if t.dtype == torch.int32]
    assert len(floats) + len(integers) == len(tensors)
    assert sum(t.numel() for t in integers) == 2 * 4 * 4 * 3 * len(LINEARS)
    loaded = petl.load(tiny_llama(), tmp_path)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_loading_takes_the_indices_of_the_file_not_of_the_seed(tmp_path, batch):
    model = wrapped(seed=3)
    randomise(model)
    model.save_pretrained(tmp_path)
    other = wrapped(seed=4)
    assert not torch.equal(adapter_at(other, 0).index_A, adapter_at(model, 0).index_A)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(other, tensors)
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_layers_left_out_shrink_the_pool():
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


def test_each_adapter_has_pools_of_its_own_that_switch_and_go_with_it(batch):
    model = wrapped()
    second = petl.build_config("mos", **TINY, layers_to_transform=[0, 2], target_modules=["q_proj"])
    with pytest.raises(InputError, match="exceeds the 2 public vectors"):
        model.add_adapter("second", copy.deepcopy(second))
    second.r = 3
    model.add_adapter("second", second)
    assert list(pools(model, "second")) == [
        "pool_A_model__layers__self_attn__q_proj",
        "pool_B_model__layers__self_attn__q_proj",
    ]
    model.set_adapter("second")
    assert all(p.requires_grad for p in pools(model, "second").values())
    assert not any(p.requires_grad for p in pools(model).values())
    model.delete_adapter("default")
    assert not any("default" in key for key in model.state_dict())
    model(**batch).loss.backward()


def test_factors_are_a_plain_lora_without_any_decomposition(batch):
    model = wrapped(lora_alpha=6)
    randomise(model)
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(batch, reentrant):
    def gradients(model):
        randomise(model)
        model.train()
        model(**batch).loss.backward()
        return {name: pool.grad for name, pool in pools(model).items()}

    expected = gradients(wrapped())
    model = wrapped()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name])


def in_training(**checkpointing):
    model = wrapped().train()
    randomise(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def pool_gradients(model):
    return {name: pool.grad for name, pool in pools(model).items()}


@pytest.fixture
def gathers(monkeypatch):
    """The ranks of what is gathered from pools."""
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


def test_a_reference_pass_before_backward_does_not_disturb_checkpointing(batch):
    expected, model = in_training(), in_training(use_reentrant=False)
    expected(**batch).loss.backward()
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    loss.backward()
    torch.testing.assert_close(pool_gradients(model), pool_gradients(expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_may_precede_a_backward_under_checkpointing(batch, reentrant):
    other = TINY_MODELS["llama"].batch(seed=5)
    expected, model = in_training(), in_training(use_reentrant=reentrant)
    for one in (batch, other):
        expected(**one).loss.backward()
    (model(**batch).loss + model(**other).loss).backward()
    torch.testing.assert_close(pool_gradients(model), pool_gradients(expected))


def test_layers_called_by_themselves_after_a_step_see_the_new_shards(batch):
    model = in_training()
    model(**batch).loss.backward()
    randomise(model)
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


def test_reentrant_checkpointing_is_refused_in_several_processes(batch, monkeypatch):
    model = wrapped()
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    monkeypatch.setattr("petl.methods.mos.adapter.num_processes", lambda: 2)
    with pytest.raises(UnsupportedError, match="use_reentrant': False"):
        model(**batch)
    with torch.no_grad():
        model(**batch)  # evaluation in between is no checkpoint
    model.gradient_checkpointing_disable()
    model(**batch).loss.backward()


def test_several_processes_are_counted():
    assert context.num_processes() == 1


def test_compiles_without_a_graph_break(batch):
    model = wrapped().train()
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def test_shards_that_no_layer_uses_are_logged(caplog):
    with caplog.at_level("INFO", logger="petl.methods.mos.draw"):
        wrapped(r=6, private_rank=0, target_modules=["q_proj"])
        wrapped(r=2, private_rank=1, target_modules=["q_proj"], subset_selection=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"MoS: 66.7 % of the shards in pool {side} are drawn by no layer, so nothing trains them; "
        "a higher r or a lower equivalent_rank leaves fewer idle"
        for side in "AB"
    ]


REFUSALS = {
    "r=0 is not a whole number from 1": {"r": 0},
    "equivalent_rank=0 is not a whole number from 1": {"equivalent_rank": 0},
    "shards_per_vector=0 is not a whole number from 1": {"shards_per_vector": 0},
    "private_rank=-1 is not a whole number from 0": {"private_rank": -1},
    "private_rank=3 exceeds equivalent_rank=2": {"private_rank": 3},
    "private_rank=2 exceeds r=1": {"private_rank": 2, "r": 1},
    "r=6 must equal equivalent_rank=2 when all shards are private": {"r": 6, "private_rank": 2},
    "q_proj: in_features=64 is not divisible by shards_per_vector=3; 1, 2, 4, 8, 16, 32 divide": {
        "shards_per_vector": 3
    },
    "r - private_rank = 7 exceeds the 3 public vectors of group model__layers__self_attn__q_proj": {
        "r": 8
    },
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses(message):
    base = tiny_llama()
    before = list(base.state_dict())
    with pytest.raises(InputError, match=message):
        petl.wrap(base, "mos", **{**TINY, **REFUSALS[message]})
    assert list(base.state_dict()) == before
    assert not base._forward_pre_hooks


@pytest.mark.parametrize(
    ("fields", "most", "least"),
    [
        ({"r": 8}, 4, 4),  # three layers: 1 + (2 - 1) 3, and 1 + 7 / 3
        ({"r": 9, "private_rank": 0}, 6, 3),
        ({"r": 30, "equivalent_rank": 5, "private_rank": 2}, 11, 12),
    ],
)
def test_what_the_refusal_of_too_few_layers_advises_is_the_limit(fields, most, least):
    """For all groups at once, the smallest of which decides."""
    targets = r".*(q_proj|layers\.[012]\.mlp\.up_proj)"  # four layers of one, three of the other

    def build(**more):
        return wrapped(layers=4, target_modules=targets, **{**fields, **more})

    with pytest.raises(InputError, match=f"r to at most {most}, or .*_rank to at least {least}$"):
        build()
    build(r=most)
    build(equivalent_rank=least)
    for beyond in ({"r": most + 1}, {"equivalent_rank": least - 1}):
        with pytest.raises(InputError, match="exceeds the"):
            build(**beyond)


def test_refuses_modules_that_are_not_linear():
    with pytest.raises(TypeError, match="input_layernorm is LlamaRMSNorm"):
        petl.wrap(tiny_llama(), "mos", **TINY, target_modules=["input_layernorm"])


def test_none_targets_every_linear_layer():
    assert trainable(wrapped(target_modules=None)) == trainable(wrapped())
