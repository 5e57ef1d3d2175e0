"""DARE and DAREx: masks, divisors, and their searches."""

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import petl
from petl.adapters import deltas
from petl.adapters.deltas.full_model import prune_model

P = 0.9


def drawn(outputs=16, inputs=64, tokens=40):
    torch.manual_seed(0)
    # means other than 0, so that products do not cancel
    return torch.randn(outputs, inputs) + 0.3, torch.randn(tokens, inputs) + 1


def test_mean_and_variance_are_those_of_the_formula():
    delta, q, count = {"w": torch.full((50,), 2.0)}, 0.25, 4000
    draws = torch.stack([deltas.prune(delta, P, q=q, seed=s)["w"] for s in range(count)])
    mean, variance = (1 - P) / q * 2, P * (1 - P) / q**2 * 4
    assert draws.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / draws.numel()))
    assert draws.var().item() == pytest.approx(variance, rel=0.02)
    kept = (draws != 0).sum().item()
    assert kept == pytest.approx(
        0.1 * draws.numel(), abs=4 * math.sqrt(draws.numel() * P * (1 - P))
    )


def test_a_mask_follows_from_seed_and_name_alone():
    delta = {name: torch.ones(20) for name in "abc"}
    torch.manual_seed(5)
    one = deltas.prune(delta, 0.5, seed=3)
    torch.rand(7)
    other = deltas.prune({name: delta[name] for name in "cab"}, 0.5, seed=3)
    assert all(torch.equal(one[name], other[name]) for name in "abc")
    assert not torch.equal(one["a"], one["b"])
    digest = hashlib.sha256(b"3 b").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    assert torch.equal(one["b"], (torch.rand(20, generator=generator) >= 0.5) / 0.5)


def test_nothing_dropped_is_the_delta_bit_for_bit():
    delta = {"w": torch.randn(30).bfloat16(), "v": torch.randn(3, 3), "i": torch.arange(3)}
    same = deltas.prune(delta, 0, q=1)
    assert all(torch.equal(same[n], t) and same[n].dtype == t.dtype for n, t in delta.items())
    kept = deltas.prune(delta, 0.5, q={"w": 1.0}, exclude=["v"])
    assert torch.equal(kept["v"], delta["v"])


def error(delta, x, q, seeds):
    """Squared error of the pruned layer's outputs over masks of `seeds`."""
    right = x @ delta.T
    return sum(
        (x @ deltas.prune({"w": delta}, P, q=q, seed=s)["w"].T - right).square().sum().item()
        for s in seeds
    )


def test_the_closed_form_is_the_least_expected_error():
    delta, x = drawn()
    S = x @ delta.T
    V = x.square() @ delta.square().T
    q = deltas.closed_q(S.square().sum().item(), V.sum().item(), P)

    def expected(q):
        bias, variance = S * ((1 - P) / q - 1), P * (1 - P) * V / q**2
        return (bias.square() + variance).sum().item()

    scan = min((1 - P + P * k / 2000 for k in range(2001)), key=expected)
    assert q == pytest.approx(scan, abs=P / 2000)
    seeds = range(300)
    drawn_error = error(delta, x, q, seeds) / len(seeds)
    assert drawn_error == pytest.approx(expected(q), rel=0.1)
    assert drawn_error < min(error(delta, x, other, seeds) / len(seeds) for other in (1 - P, 1.0))


def test_the_closed_form_at_its_limits():
    assert deltas.closed_q(1.0, 0.0, P) == pytest.approx(1 - P)
    assert deltas.closed_q(1.0, 100.0, P) == 1
    assert deltas.closed_q(0.0, 0.0, P) == 1
    assert deltas.closed_q(4.0, 1.0, 0.0) == 1


@pytest.mark.parametrize("p", [0.9, 0.99, 0.3])
@pytest.mark.parametrize("stop", [0.5, 1.0])
def test_the_analytic_divisor_is_that_of_a_loop(p, stop):
    torch.manual_seed(0)
    products, eta = torch.randn(6, 30).double(), 1.3
    phi = (1 - 2 * p) / math.log((1 - p) / p)
    best, chosen, passed = [math.inf] * 6, [1 - p] * 6, [False] * 6
    k = 0
    while 1 - p + 0.001 * k <= 0.998 + 1e-9:
        q = 1 - p + 0.001 * k
        for o in range(6):
            S, V = products[o].sum().item(), products[o].square().sum().item()
            value = abs(eta * S * (1 - (1 - p) / q) + eta**2 * phi * V / (4 * q * q) + math.log(40))
            passed[o] |= value >= best[o]
            if value <= best[o]:
                best[o], chosen[o] = value, q
        k += 1
        if sum(passed) / 6 >= stop:
            break
    found = deltas.analytic_q(products, p, eta=eta, stop=stop)
    assert found.tolist() == pytest.approx(chosen, abs=1e-9)


def test_divisors_spread_to_biases_and_others():
    q = {"a.weight": 0.2, "b.weight": 0.4}
    spread = deltas.spread_q(["a.weight", "a.bias", "b.bias", "norm"], q)
    assert spread == pytest.approx({"a.weight": 0.2, "a.bias": 0.2, "b.bias": 0.4, "norm": 0.3})


def test_moments_of_a_layer_are_those_of_its_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).train()
    delta = {"2.weight": torch.randn(3, 6), "2.bias": torch.randn(3)}
    batches = [{"input": torch.randn(2, 5, 8)}, {"input": torch.randn(4, 5, 8)}]
    found = deltas.output_moments(model, batches, delta)
    assert list(found) == ["2.weight"]
    S2 = V = 0.0
    for batch in batches:
        for x in torch.tanh(model[0](batch["input"])).reshape(-1, 6):
            products = delta["2.weight"] * x
            S2 += products.sum(1).square().sum().item()
            V += products.square().sum().item()
    assert found["2.weight"] == pytest.approx((S2, V), rel=1e-5)
    assert model.training
    assert not model[2]._forward_hooks


def test_padding_does_not_count():
    class Masked(nn.Linear):
        def forward(self, x, attention_mask):
            return super().forward(x)

    model = nn.ModuleDict({"one": Masked(4, 2)})
    model.forward = lambda **batch: model["one"](batch["x"], batch["attention_mask"])
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    delta = {"one.weight": torch.randn(2, 4)}
    (found,) = deltas.output_moments(model, [{"x": x, "attention_mask": mask}], delta).values()
    assert found[0] == pytest.approx((x[mask.bool()] @ delta["one.weight"].T).square().sum().item())


def test_a_search_stops_after_four_worse_and_goes_on_in_tenths(caplog):
    asked = []

    def score(q, seed):
        asked.append(q)
        return (q - 0.43) ** 2

    found = deltas.find_q(score, P, grid=[k / 10 for k in range(1, 11)])
    assert found.q == pytest.approx(0.43)
    assert asked[:8] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert asked[8:] == pytest.approx([0.4 + k / 100 for k in range(-9, 11) if k])
    assert not caplog.records
    deltas.find_q(lambda q, seed: q, P)
    assert "lowest" in caplog.text


def test_of_several_scores_the_furthest_is_left_out():
    values = {0: 1.0, 1: 2.0, 2: 30.0}
    found = deltas.find_q(lambda q, seed: values[seed], P, grid=[0.5], seeds=(0, 1, 2))
    assert found.history == [(0.5, 1.5)]


def test_a_shard_of_excluded_tensors_alone_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    tuned = {"a.weight": torch.randn(30, 4), "lm_head.weight": torch.randn(5, 4)}
    base = {name: tensor + 0.1 for name, tensor in tuned.items()}
    for folder in ("tuned", "base"):
        (tmp_path / folder).mkdir()
    for name, tensor in tuned.items():
        save_file({name: tensor}, tmp_path / "tuned" / f"{name}.safetensors")
    save_file(base, tmp_path / "base" / "model.safetensors")
    folders = [tmp_path / "tuned", tmp_path / "base", tmp_path / "out"]
    kept, changed = prune_model(*folders, 0.5, exclude=["lm_head"])
    assert 0 < kept < changed == 120
    head = load_file(tmp_path / "out" / "lm_head.weight.safetensors")["lm_head.weight"]
    torch.testing.assert_close(head, tuned["lm_head.weight"])
    delta = deltas.extract({"a.weight": tuned["a.weight"]}, {"a.weight": base["a.weight"]})
    expected = base["a.weight"] + deltas.prune(delta, 0.5)["a.weight"]
    found = load_file(tmp_path / "out" / "a.weight.safetensors")["a.weight"]
    assert torch.equal(found, expected)
    with pytest.raises(petl.InputError):
        prune_model(*folders[:2], tmp_path / "none", 0.5, exclude=["weight"])
    assert not (tmp_path / "none").exists()


def test_extract_and_apply():
    base = {"w": torch.randn(3, 3), "half": torch.randn(3).bfloat16(), "i": torch.arange(3)}
    tuned = {"w": base["w"] + 1, "half": base["half"] * 2, "i": torch.arange(3)}
    delta = deltas.extract(tuned, base)
    assert set(delta) == {"w", "half"}
    again = deltas.apply(base, delta)
    assert all(torch.allclose(again[name], tuned[name]) for name in tuned)
