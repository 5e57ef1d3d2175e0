"""Ranks from importance: sums, order, bounds, costs; configs whose modules have those ranks."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import petl
from petl import testing
from petl.training.ranks import allocate, with_ranks
from petl.training.ranks.allocation import real_ranks

S = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.sampled_from([0.25, 0.5]))
PATHS = ("model.layers.0", "model.layers.1", "model.layers.2")
RANKS = dict(zip(PATHS, (3, 8, 1), strict=True))


@given(
    importance=st.lists(S, min_size=1, max_size=12),
    mean=st.integers(1, 20),
    below=st.integers(0, 19),
    above=st.one_of(st.none(), st.integers(0, 40)),
    power=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)
def test_ranks_keep_sum_order_and_bounds(importance, mean, below, above, power):
    given_S = {str(i): value for i, value in enumerate(importance)}
    least, most = max(1, mean - below), None if above is None else mean + above
    ranks = allocate(given_S, mean, least=least, most=most, power=power)
    assert list(ranks) == list(given_S)
    assert sum(ranks.values()) == mean * len(ranks)
    assert min(ranks.values()) >= least
    assert most is None or max(ranks.values()) <= most
    for one, other in zip(*[sorted(given_S, key=given_S.get)[i:] for i in (0, 1)], strict=False):
        if given_S[one] == given_S[other]:  # an odd unit of the sum goes to one of them
            assert abs(ranks[one] - ranks[other]) <= 1
        else:
            assert ranks[one] <= ranks[other]


@given(
    blocks=st.lists(st.tuples(S, st.integers(1, 60)), min_size=1, max_size=10),
    mean=st.integers(1, 12),
    above=st.one_of(st.none(), st.integers(0, 20)),
)
def test_a_budget_in_parameters_is_kept_within_one_step(blocks, mean, above):
    importance = {str(i): value for i, (value, _) in enumerate(blocks)}
    cost = {str(i): value for i, (_, value) in enumerate(blocks)}
    most = None if above is None else mean + above
    ranks = allocate(importance, mean, most=most, cost=cost)
    left = sum(cost[key] * (mean - rank) for key, rank in ranks.items())
    growing = [cost[key] for key, rank in ranks.items() if most is None or rank < most]
    assert left >= 0
    assert all(left < step for step in growing)


@pytest.mark.parametrize(
    ("importance", "arguments", "expected"),
    [
        ([1, 2, 3], {"mean": 4}, [2, 4, 6]),
        ([1, 2, 3], {"mean": 4, "power": 0}, [4, 4, 4]),
        ([1, 2, 3], {"mean": 14, "power": 2}, [3, 12, 27]),
        ([0.2, 0.2, 0.2], {"mean": 7}, [7, 7, 7]),
        ([0, 0, 0], {"mean": 7}, [7, 7, 7]),
        ([0, 1, 1], {"mean": 3}, [1, 4, 4]),  # 0 has the least
        ([0, 0, 1], {"mean": 4, "most": 6}, [3, 3, 6]),  # m without a bound: the rest to zeros
        ([1, 1, 8], {"mean": 4, "least": 2, "most": 7}, [3, 2, 7]),  # 2.5, 2.5: the first gets it
        ([1, 2, 2], {"mean": 4}, [2, 5, 5]),  # 2.4, 4.8, 4.8
        ([1, 3], {"mean": 4, "cost": [1, 3]}, [1, 5]),  # 1.6, 4.8 of 16: one of cost 3 fits
    ],
)
def test_ranks_by_hand(importance, arguments, expected):
    arguments = dict(arguments)
    if "cost" in arguments:
        arguments["cost"] = {str(i): value for i, value in enumerate(arguments["cost"])}
    ranks = allocate({str(i): float(S) for i, S in enumerate(importance)}, **arguments)
    assert list(ranks.values()) == expected


def test_real_ranks_are_in_one_proportion_between_the_bounds():
    w, cost = {"a": 0.1, "b": 1.0, "c": 2.0, "d": 9.0}, {"a": 5, "b": 1, "c": 2, "d": 3}
    real = real_ranks(w, cost, 4 * 11, least=1, most=8)
    assert (real["a"], real["d"]) == (1, 8)
    assert real["c"] == pytest.approx(2 * real["b"])
    assert sum(cost[key] * rank for key, rank in real.items()) == pytest.approx(44)


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "loha", "delora"])
def test_a_method_of_peft_has_those_ranks_and_one_scaling(name):
    model = testing.tiny_llama(3)
    config = with_ranks(petl.build_config(name, r=4), model, RANKS)
    wrapped = petl.wrap(model, config)
    ranks, scalings = {}, set()
    for key, layer in wrapped.base_model.model.named_modules():
        if hasattr(layer, "base_layer"):
            ranks.setdefault(key[: len(PATHS[0])], set()).add(layer.r["default"])
            scalings.add(round(layer.scaling["default"], 12) if hasattr(layer, "scaling") else None)
    assert ranks == {path: {rank} for path, rank in RANKS.items()}
    assert len(scalings) == 1


@pytest.mark.parametrize("name", ["lora", "mola", "adapter", "binary"])
def test_an_adapter_with_ranks_by_block_loads_and_computes_the_same(name, tmp_path):
    model = testing.tiny_llama(3)
    fields = {"inner": "mola", "save_format": "latent"} if name == "binary" else {}
    config = with_ranks(petl.build_config(name, r=4, **fields), model, RANKS)
    assert config.rank_pattern == {rf"model\.layers\.{i}\..*": r for i, r in enumerate((3, 8, 1))}
    wrapped = testing.stir(petl.wrap(model, config)).eval()
    wrapped.save_pretrained(tmp_path)
    ids = torch.randint(5, 50, (2, 6))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == config.rank_pattern
    base = wrapped.get_base_model()
    loaded = petl.load(plain_copy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, wrapped(ids).logits)


def plain_copy(adapted):
    """A Llama with the base weights of an adapted one."""
    fresh = testing.tiny_llama(3)
    weights = {k.replace(".base_layer", ""): v for k, v in adapted.state_dict().items()}
    fresh.load_state_dict({key: weights[key] for key in fresh.state_dict()})
    return fresh


def test_mola_and_adapter_have_the_shapes_and_the_scaling_of_their_ranks():
    config = with_ranks(petl.build_config("mola", r=4, num_experts=2), testing.tiny_llama(3), RANKS)
    placed = petl.wrap(testing.tiny_llama(3), config).base_model.placed["default"]
    for key, adapter in placed.items():
        assert adapter.lora_A.shape[0] == 2 * RANKS[key[: len(PATHS[0])]]
        assert adapter.scale == 16 / 4
    config = with_ranks(petl.build_config("adapter", scaling=0.5), testing.tiny_llama(3), RANKS)
    placed = petl.wrap(testing.tiny_llama(3), config).base_model.placed["default"]
    for key, adapter in placed.items():
        assert adapter.up_weight.shape[1] == RANKS[key[: len(PATHS[0])]]
        assert adapter.scaling == 0.5


def test_sparse_distributes_its_weights_by_the_shares_of_blocks():
    equal = petl.wrap(testing.tiny_llama(3), "sparse", r=4).active_peft_config.num_deltas
    model = testing.tiny_llama(3)
    config = with_ranks(petl.build_config("sparse", r=4), model, dict.fromkeys(PATHS, 4) | RANKS)
    found = petl.wrap(model, config).active_peft_config.num_deltas
    assert sum(found.values()) == pytest.approx(sum(equal.values()), abs=len(found))
    for key, count in found.items():
        rank = RANKS[key[: len(PATHS[0])]]
        assert count == pytest.approx(equal[key] * rank / (sum(RANKS.values()) / 3), abs=1)


@pytest.mark.parametrize("name", ["mola", "adapter"])
def test_rows_of_adapters_with_other_ranks_are_computed_in_one_batch(name):
    model = petl.wrap(testing.tiny_llama(3), name, r=4, rank_pattern={"model.layers.0.*": 6})
    model.add_adapter("other", petl.build_config(name, r=5))
    testing.stir(model).eval()
    ids = torch.randint(5, 50, (4, 6))
    names = ["default", "other", "other", "default"]
    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits
        for i, adapter in enumerate(names):
            model.set_adapter(adapter)
            assert torch.allclose(model(ids[i : i + 1]).logits[0], mixed[i], atol=1e-5)


def test_the_longest_path_comes_first():
    ranks = {f"model.layers.{i}": i + 1 for i in range(11)}
    config = with_ranks(petl.build_config("lora"), testing.tiny_llama(11), ranks)
    model = petl.wrap(testing.tiny_llama(11), config)
    layers = model.get_base_model().model.layers
    assert [layer.self_attn.q_proj.r["default"] for layer in layers] == list(range(1, 12))
    assert next(iter(config.rank_pattern)) == r"model\.layers\.10\..*"
