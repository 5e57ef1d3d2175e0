"""Packed weights: the same products, used only where they are asked for, and never stale."""

import threading

import pytest
import torch
from torch import nn

import petl
from petl import testing
from petl.core.compat import LoraLinear
from petl.ops import packed
from petl.ops.low_rank import is_frozen_linear, linear_with_low_rank, low_rank_linear, owns_output

pytestmark = pytest.mark.skipif(not packed.is_supported(), reason="no x86 CPU with oneDNN here")


@pytest.fixture
def calls(monkeypatch):
    """The numbers of rows of all packed products."""
    found, plain = [], torch.ops.mkldnn._linear_pointwise

    def counted(x, *rest):
        found.append(x.numel() // x.shape[-1])
        return plain(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted, raising=False)
    return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x).relu())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 40])
def test_products_are_the_same_and_packed_for_more_than_one_row(calls, rows):
    net, weights = Net(), packed.PackedWeights()
    x = torch.randn(1, rows, 24)
    plain = net(x)
    weights.update(net)
    assert weights.nbytes == 4 * (24 * 40 + 40 * 8)
    with packed.packed_classes(net):
        assert torch.equal(net(x), plain)
        with weights.active():
            found = net(x)
        assert torch.equal(net(x), plain)
    assert calls == ([] if rows == 1 else [rows, rows])
    assert torch.allclose(found, plain, atol=1e-5)
    assert [type(layer) for layer in net.children()] == [nn.Linear, nn.Linear]


@torch.no_grad()
def test_weights_are_packed_within_a_time(calls):
    net, weights, ticks = Net(), packed.PackedWeights(), iter(range(0, 100, 6))
    plain, x = net(torch.ones(3, 24)), torch.ones(3, 24)
    layers, clock = packed.packable(net), lambda: next(ticks)
    weights.pack(layers, 0.0, clock)
    assert not weights.copies
    weights.pack(layers, 1.0, clock)  # of the first nothing is known: it takes six seconds
    assert [*weights.copies] == [id(net.first.weight)]
    assert weights.seconds == 6
    # 320 values after 960 in six seconds: two
    weights.pack(layers, 2.0, clock)
    assert len(weights.copies) == 1
    with packed.packed_classes(net), weights.active():
        assert torch.allclose(net(x), plain, atol=1e-5)
    assert calls == [3]
    weights.pack(layers, 2.1, clock)
    assert len(weights.copies) == 2


@torch.no_grad()
@pytest.mark.parametrize("change", ["add_", "data", "item", "new"])
def test_a_weight_that_has_changed_is_packed_again(change):
    net, weights, x = Net(), packed.PackedWeights(), torch.randn(3, 24)
    weights.update(net)
    first = weights.copies[id(net.first.weight)]
    weight = net.second.weight
    if change == "add_":
        weight.add_(1)
    elif change == "data":  # as PEFT merges: address and version stay
        weight.data += 1
    elif change == "item":
        weight.data[2, 3] = 7
    else:
        net.second = nn.Linear(40, 8, bias=False)
    weights.update(net)
    assert weights.copies[id(net.first.weight)] is first
    assert len(weights.copies) == 2
    with packed.packed_classes(net), weights.active():
        found = net(x)
    assert torch.allclose(found, net(x), atol=1e-5)


@torch.no_grad()
def test_only_the_thread_that_asks_gets_packed_products(calls):
    net, weights, x = Net(), packed.PackedWeights(), torch.randn(3, 24)
    weights.update(net)
    with packed.packed_classes(net), weights.active():
        other = threading.Thread(target=lambda: net(x))
        other.start()
        other.join()
        assert calls == []
        with torch.enable_grad():
            net(x)
        assert calls == []


@torch.no_grad()
def test_packed_layers_stay_frozen_linear_layers_for_adapters(calls):
    net, weights, x = Net(), packed.PackedWeights(), torch.randn(3, 24)
    A, B = torch.randn(4, 24), torch.randn(40, 4)
    layer = net.first
    expected = layer(x) + 0.5 * x @ A.t() @ B.t()
    weights.update(net)
    with packed.packed_classes(net), weights.active():
        assert is_frozen_linear(layer)
        assert owns_output(layer)
        one = linear_with_low_rank(x, layer, A, B, 0.5)
        # as a matrix, which MoLA multiplies
        two = low_rank_linear(x, (layer.weight, layer.bias), A, B, 0.5)
    assert torch.allclose(one, expected, atol=1e-4)
    assert torch.allclose(two, expected, atol=1e-4)
    assert calls == [3, 3]


@torch.no_grad()
def test_every_linear_layer_of_an_adapted_model_is_packed(calls):
    for name in ("lora", "mola"):
        model = testing.stir(petl.wrap(testing.tiny_llama(), name, task_type="CAUSAL_LM")).eval()
        ids = torch.arange(3, 9)[None]
        plain = model(ids).logits
        weights = packed.packed_weights(model)
        assert packed.packed_weights(model) is weights
        weights.update(model)
        calls.clear()
        with packed.packed_classes(model), weights.active():
            found = model(ids).logits
        # 7 of each of 3 blocks, and the head
        assert len(calls) >= 22
        assert torch.allclose(found, plain, atol=1e-4)


@torch.no_grad()
def test_fused_lora_stays_fused_where_packed_copies_are_looked_for(monkeypatch):
    model = petl.wrap(testing.tiny_llama(), "lora", task_type="CAUSAL_LM").eval()
    petl.fuse_lora(model)
    calls, forward = [], LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda *args: calls.append(1) or forward(*args))
    with packed.packed_classes(model):
        model(input_ids=torch.arange(3, 9)[None])
    assert not calls  # PEFT's own, which takes four more passes over a layer's output


def test_layers_that_cannot_be_packed_are_left_out():
    class Own(nn.Linear):
        pass

    half, odd = nn.Linear(4, 4).half(), nn.Linear(4, 4)
    odd.weight = nn.Parameter(torch.randn(4, 4).t())
    model = nn.ModuleList([nn.Linear(4, 4), half, odd, Own(4, 4)])
    assert packed.packable(model) == [model[0]]
