"""Combinations of states, entry by entry."""

import pytest
import torch
from peft.utils.merge_utils import ties as pefts_ties

import petl
from petl.adapters.deltas import combine
from petl.adapters.deltas.prune import mask


def states(count=3, d=41):
    torch.manual_seed(0)
    drawn = [torch.randn(d) * (torch.rand(d) > 0.2) for _ in range(count)]
    return [{"a": t[:30].reshape(5, 6), "b": t[30:], "i": torch.arange(3)} for t in drawn]


def flat(state):
    return torch.cat([state["a"].flatten(), state["b"]])


def sign(x):
    return (x > 0) - (x < 0)


def ties_by_hand(taus, weights, density, how, aggregate):
    d = len(taus[0])
    n = max(1, int(density * d + 0.5))
    kept = []
    for tau in taus:
        chosen = sorted(range(d), key=lambda i: (-abs(tau[i].item()), i))[:n]
        kept.append([tau[i].item() if i in chosen else 0.0 for i in range(d)])
    votes = [[sign(k[i]) if how == "frequency" else k[i] for k in kept] for i in range(d)]
    elected = [sign(sum(torch.tensor(v, dtype=torch.float32)).item()) for v in votes]
    majority = sign(sum(elected))
    result = []
    for i in range(d):
        e = elected[i] or majority
        chosen = [(w, k[i]) for w, k in zip(weights, kept, strict=True) if k[i] and sign(k[i]) == e]
        total = sum(w * x for w, x in chosen)
        result.append(total / max(1, len(chosen)) if aggregate == "mean" else total)
    return torch.tensor(result)


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("how", ["total", "frequency"])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_ties_is_that_of_the_paper(density, how, aggregate):
    given, weights = states(), [1.0, 0.5, 2.0]
    found = combine(given, "ties", weights=weights, density=density, sign=how, aggregate=aggregate)
    expected = ties_by_hand([flat(s) for s in given], weights, density, how, aggregate)
    torch.testing.assert_close(flat(found), expected)
    assert torch.equal(found["i"], given[0]["i"])


def test_ties_of_one_tensor_is_pefts():
    tensors = [state["a"] for state in states()]
    found = combine(
        [{"a": t} for t in tensors], "ties", density=0.5, scope="tensor", weights=[1, 2, 3]
    )
    expected = pefts_ties(tensors, torch.tensor([1.0, 2.0, 3.0]), density=0.5)
    # PEFT sums weighted entries and divides by their number; undecided signs do not occur here
    torch.testing.assert_close(found["a"], expected)


def test_linear_and_magnitude():
    given = states(2)
    found = combine(given, "linear", weights=[2, -1])
    torch.testing.assert_close(flat(found), 2 * flat(given[0]) - flat(given[1]))
    pruned = combine(given, "magnitude_prune", density=0.25)
    expected = torch.zeros(41)
    for state in given:
        chosen = flat(state).abs().topk(10).indices
        expected[chosen] += flat(state)[chosen]
    torch.testing.assert_close(flat(pruned), expected)


@pytest.mark.thorough
def test_dare_has_a_mask_for_each_state():
    given, density = states(2), 0.4
    found = combine(given, "dare_linear", density=density, seed=7)
    for name in "ab":
        parts = [
            state[name].flatten() * mask(f"7 {i} {name}", state[name].flatten().shape, 0.6) / 0.4
            for i, state in enumerate(given)
        ]
        torch.testing.assert_close(found[name].flatten(), sum(parts))
    draws = [flat(combine(given, "dare_linear", density=density, seed=s)) for s in range(2000)]
    expected = flat(given[0]) + flat(given[1])
    spread = (0.6 / 0.4 * (flat(given[0]) ** 2 + flat(given[1]) ** 2) / 2000).sqrt()
    assert ((torch.stack(draws).mean(0) - expected).abs() <= 5 * spread + 1e-5).all()
    assert torch.equal(
        flat(combine(given, "dare_linear", density=1.0)), flat(combine(given, "linear"))
    )


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_states_on_a_device_are_combined_there(method, device):
    given = states(2)
    moved = [{name: tensor.to(device) for name, tensor in state.items()} for state in given]
    found = combine(moved, method, density=0.5)
    expected = combine(given, method, density=0.5)
    for name, tensor in found.items():
        assert tensor.device.type == torch.device(device).type
        torch.testing.assert_close(tensor.cpu(), expected[name])


def test_a_reference_and_the_dtype_of_the_first():
    given = [{"w": torch.full((4,), x, dtype=torch.bfloat16)} for x in (1.5, 2.0)]
    found = combine(given, "linear", reference={"w": torch.ones(4)})
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [2.5] * 4


def test_what_is_excluded_may_have_another_shape_or_lack():
    one = {"w": torch.ones(2), "head.bias": torch.ones(3)}
    two = {"w": torch.full((2,), 3.0), "head.bias": torch.ones(5)}
    for other in (two, {"w": two["w"]}):
        found = combine([one, other], "linear", exclude=[r"^head\."])
        assert found["w"].tolist() == [4.0, 4.0]
        assert found["head.bias"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(petl.InputError, match=r"head\.bias"):
        combine([one, two], "linear")


def test_empty_tensors_stay_empty():
    given = [{"a": torch.ones(3), "e": torch.zeros(0, 2)} for _ in range(2)]
    assert combine(given, "ties", scope="tensor", density=0.5)["e"].shape == (0, 2)
