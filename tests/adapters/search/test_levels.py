"""The levels of an adapter: against ComPEFT's code, the SVD and the quantizer, one by one."""

import pytest
import torch
from peft import get_peft_model_state_dict

import petl
from petl import testing
from petl.adapters import deltas, search
from petl.adapters.search.density import CompressedCandidate
from petl.adapters.search.tensors import adapter_tensors, grouped
from petl.ops.quantize import quantize
from petl.ops.rice import parameter
from petl.testing.models import tiny_llama

FIELDS = {
    "lora": {"r": 4},
    "mola": {"num_experts": 2},
    "mos": {"r": 3},
    "adapter": {},
    "compacter": {"phm_dim": 2},
    "ia3": {},
}
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def wrapped(name, **fields):
    torch.manual_seed(0)
    return testing.stir(petl.wrap(tiny_llama(2), name, **fields)).eval()


@pytest.mark.parametrize("name", FIELDS)
def test_densities_are_those_of_compeft_on_each_module_alone(name):
    model = wrapped(name, **FIELDS[name])
    units, live = search.levels_of(model, "density"), dict(model.named_parameters())
    state = get_peft_model_state_dict(model)
    start = 1.0 if name == "ia3" else 0.0
    covered = [key for unit in units for key in unit.tensors[0]]
    assert len(covered) == len({*covered}) == sum(t.is_floating_point() for t in state.values())
    for unit in units:
        assert unit.values == DENSITIES
        # tensors that layers share belong to the tuner, outside the base model
        places = f"base_model.model.{unit.name}", f"base_model.{unit.name}"
        assert all(key.startswith(places) for key in unit.tensors[0])
        tau = torch.cat([live[key].detach().flatten() - start for key in unit.tensors[0]])
        sigma = tau.double().std() if len(tau) > 1 else tau.abs()[0]
        for level, density in enumerate(DENSITIES):
            kept = torch.cat([t.flatten() - start for t in unit.tensors[level].values()])
            count = min(len(tau), max(1, int(density * len(tau) + 0.5)))
            assert (kept != 0).sum() == count
            largest = tau.abs().topk(count).values.min()
            assert (tau.abs()[kept != 0] >= largest).all()
            expected = sigma.float() * tau.sign() * (kept != 0)
            torch.testing.assert_close(kept, expected, atol=2e-7, rtol=1e-5)


def test_densities_cost_the_bytes_of_their_codes():
    model = wrapped("lora", r=4)
    for unit in search.levels_of(model, "density"):
        for level, cost in enumerate(unit.costs):
            total = 0
            for tensor in unit.tensors[level].values():
                values = tensor.flatten().tolist()
                places = [i for i, value in enumerate(values) if value]
                b = parameter(len(places), len(values))
                gaps = [j - i - 1 for i, j in zip([-1, *places], places, strict=False)]
                total += -(-sum((gap >> b) + 1 + b + 1 for gap in gaps) // 8)
            assert cost == total
        assert list(unit.costs) == sorted(unit.costs)


def test_ranks_are_the_best_approximations_of_the_update():
    model = wrapped("lora", r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2})
    units, live = search.levels_of(model, "rank"), dict(model.named_parameters())
    assert {unit.name.rpartition(".")[2]: unit.levels for unit in units} == {
        "q_proj": 2,
        "down_proj": 4,
    }
    for unit in units:
        a, b = unit.tensors[0]
        update = live[b].detach() @ live[a].detach()
        U, S, V = torch.linalg.svd(update)
        for level, (rank, cost) in enumerate(zip(unit.values, unit.costs, strict=True)):
            A, B = unit.tensors[level][a], unit.tensors[level][b]
            assert (A.shape, B.shape) == (live[a].shape, live[b].shape)
            best = (U[:, :rank] * S[:rank]) @ V[:rank]
            torch.testing.assert_close(B @ A, best, atol=1e-5, rtol=1e-4)
            assert cost == rank * (update.shape[0] + update.shape[1])
            if rank < unit.levels:
                assert not A[rank:].any()
                assert not B[:, rank:].any()
        assert torch.equal(unit.tensors[-1][a], live[a])


def test_a_rank_above_the_width_of_a_layer():
    model = wrapped("lora", r=40, target_modules=["k_proj"])  # 32 outputs
    unit = search.levels_of(model, "rank")[0]
    live = dict(model.named_parameters())
    a, b = unit.tensors[0]
    torch.testing.assert_close(
        unit.tensors[31][b] @ unit.tensors[31][a],
        (live[b] @ live[a]).detach(),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.fixture
def packed(tmp_path):
    """An adapter of 4 bits, loaded from a packed file."""
    torch.manual_seed(0)
    fields = {"inner": "lora", "r": 4, "bits": 4, "target_modules": ["q_proj", "v_proj"]}
    model = testing.stir(petl.wrap(tiny_llama(2), "binary", **fields))
    model.save_pretrained(tmp_path / "packed")
    return petl.load(tiny_llama(2), tmp_path / "packed").eval()


def test_bits_are_requantized_from_the_stored_values(packed):
    units, live = search.levels_of(packed, "bits"), dict(packed.named_parameters())
    assert len(units) == 8
    for unit in units:
        assert unit.values == (1, 2, 4)
        (name,) = unit.tensors[0]
        stored = live[name].detach()
        for level, bits in ((0, 1), (1, 2)):
            assert torch.equal(unit.tensors[level][name], quantize(stored, bits))
            assert len(unit.tensors[level][name].unique()) <= 2**bits
        assert torch.equal(unit.tensors[2][name], stored)
        assert unit.costs == tuple(-(-stored.numel() * b // 8) + 8 for b in (1, 2, 4))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), search.swapped(packed, units) as to:
        to([2] * 8)
        every = packed(input_ids=ids).logits
        to([0] * 8)
        assert not torch.allclose(packed(input_ids=ids).logits, every)


def test_heads_are_no_units():
    model = wrapped("lora", modules_to_save=["lm_head"])
    for what in ("density", "rank"):
        units = search.levels_of(model, what)
        assert units
        assert not [name for unit in units for name in unit.tensors[0] if "lm_head" in name]


def test_a_mixed_state_is_saved_and_read_again(tmp_path):
    model = wrapped("lora", r=4)
    own = adapter_tensors(model)
    coded = CompressedCandidate.of(own.state, grouped(model, own.live), None)
    units = search.levels_of(model, "density")
    state = [i % 6 for i in range(len(units))]
    mixed = coded.mixed(state)
    mixed.save(tmp_path / "ternary.safetensors")
    found = deltas.Ternary.load(tmp_path / "ternary.safetensors")
    expected = {}
    for unit, level in zip(units, state, strict=True):
        expected |= unit.tensors[level]
    dense = found.dense()
    assert len(dense) == len(expected)
    for key, tensor in dense.items():
        assert torch.equal(tensor, expected[own.live[key]])
    sizes = sum(unit.costs[level] for unit, level in zip(units, state, strict=True))
    assert sum(len(code) for code, *_ in found.codes) == sizes
