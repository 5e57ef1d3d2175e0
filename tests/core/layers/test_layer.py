"""AdapterLayer, with a toy adapter whose update is known."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import petl
from petl import testing
from petl.core.layers.context import ForwardContext
from petl.core.layers.layer import Adapter, AdapterLayer, Factors, LayerInfo, LayerShape, shape_of
from petl.ops.low_rank import frozen_weight_and_bias


class LowRank(Adapter):
    """`2 B A`, with A and B drawn."""

    def __init__(self, shape, config=None, info=None):
        super().__init__(shape, config, info)
        self.lora_A = nn.Parameter(torch.randn(3, shape.in_features))
        self.lora_B = nn.Parameter(torch.randn(shape.out_features, 3))

    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, 2.0)


def host(base: nn.Module, *names: str) -> AdapterLayer:
    layer = AdapterLayer(base, "petl_toy_", nn.ModuleDict())
    for name in names:
        info = LayerInfo("fc", name, ForwardContext())
        layer.add(name, LowRank(shape_of(base), None, info), inference_mode=False)
    layer.set_adapter(list(names[:1]))
    return layer.eval()


@pytest.mark.parametrize("base", [nn.Linear(6, 5), Conv1D(5, 6)], ids=["linear", "conv1d"])
def test_an_adapted_layer_equals_its_dense_weight(base):
    layer = host(base, "a")
    x = torch.randn(2, 4, 6)
    adapter = layer.adapters["a"]
    dense = 2.0 * adapter.lora_B @ adapter.lora_A
    expected = base(x) + x @ dense.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    delta = layer.get_delta_weight("a")
    assert delta.shape == base.weight.shape
    layer.merge()
    assert layer.merged_adapters == ["a"]
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base(x), expected, atol=1e-5, rtol=1e-5)


def test_shapes_of_linear_and_conv1d_layers():
    assert shape_of(nn.Linear(6, 5)) == shape_of(Conv1D(5, 6)) == LayerShape(6, 5)


def test_two_active_adapters_are_added_and_merge_together():
    base = nn.Linear(6, 5)
    layer = host(base, "a", "b")
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, 6)
    updates = [2.0 * m.lora_B @ m.lora_A for m in layer.adapters.values()]
    expected = base(x) + x @ sum(updates).T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_merging_twice_warns_and_adds_once():
    layer = host(nn.Linear(6, 5), "a")
    layer.merge()
    merged = layer.base_layer.weight.clone()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        layer.merge()
    assert torch.equal(layer.base_layer.weight, merged)
    assert layer.merged_adapters == ["a"]


def test_one_adapter_of_several_can_be_merged():
    base = nn.Linear(6, 5)
    layer = host(base, "a", "b")
    before = base.weight.clone()
    layer.merge(adapter_names=["b"])
    expected = before + layer.get_delta_weight("b")
    torch.testing.assert_close(base.weight, expected)


def test_half_precision_weights_are_added_in_float32_and_rounded_once():
    base = nn.Linear(6, 5).bfloat16()
    layer = host(base, "a")
    exact = base.weight.float() + layer.get_delta_weight("a")
    layer.merge()
    assert base.weight.dtype == torch.bfloat16
    assert torch.equal(base.weight, exact.bfloat16())


def test_a_disabled_layer_that_is_merged_unmerges_first():
    base = nn.Linear(6, 5)
    layer = host(base, "a")
    x = torch.randn(4, 6)
    expected = base(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert not layer.merged_adapters


@pytest.mark.parametrize("tokens", [None, 1, 4, 13])
@pytest.mark.parametrize("grads", [True, False])
def test_rows_of_a_mixed_batch_go_through_their_own_adapter(tokens, grads):
    base = nn.Linear(6, 5)
    layer = host(base, "a", "b")
    x = torch.randn(*((3, 6) if tokens is None else (3, tokens, 6)))
    with torch.set_grad_enabled(grads):
        found = layer(x, adapter_names=["b", "__base__", "a"])
    for row, name in enumerate(["b", None, "a"]):
        layer.set_adapter([name] if name else [])
        torch.testing.assert_close(found[row], layer(x[row : row + 1])[0])


def called(layer, x, names, *, grads=False):
    """Return the operators of a mixed batch, in order."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.set_grad_enabled(grads), Calls():
        layer(x, adapter_names=names)
    return calls


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_mixed_batch_needs_two_products_for_any_number_of_adapters(tokens):
    names = [f"a{i}" for i in range(5)]
    layer, x = host(nn.Linear(6, 5), *names), torch.randn(5, tokens, 6)
    calls = called(layer, x, names)
    assert (calls.count("bmm"), calls.count("baddbmm_")) == (1, 1)
    assert not {"clone", "index_select"} & set(calls)  # the output of a linear layer is nobody's
    with_base = called(layer, x, ["a0", "a1", "__base__", "a1", "a0"])
    assert (with_base.count("bmm"), with_base.count("baddbmm_")) == (1, 1)


def test_the_output_of_another_base_module_is_not_overwritten():
    """A module other than nn.Linear may still hold it."""
    base = nn.Sequential(nn.Linear(6, 5))
    base.in_features, base.out_features, base.weight = 6, 5, base[0].weight
    layer, x, seen = host(base, "a", "b"), torch.randn(2, 1, 6), []
    base.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
    with torch.no_grad():
        layer(x, adapter_names=["a", "b"])
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("names", ["abba", "aabb", "-ab-", "aaab"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_rows_go_through_their_adapter_in_any_order(names, tokens):
    layer, x = host(nn.Linear(6, 5), "a", "b"), torch.randn(4, tokens, 6)
    with torch.no_grad():
        found = layer(x, adapter_names=[name.replace("-", "__base__") for name in names])
        for row, name in enumerate(names):
            layer.set_adapter([name] if name != "-" else [])
            torch.testing.assert_close(found[row], layer(x[row : row + 1])[0])


def test_adapters_of_several_ranks_work_in_a_mixed_batch():
    layer, x = host(nn.Linear(6, 5), "a", "b"), torch.randn(2, 3, 6)
    adapter = layer.adapters["b"]
    for name, dim in (("lora_A", 0), ("lora_B", 1)):
        half = getattr(adapter, name).detach().narrow(dim, 0, 1)
        setattr(adapter, name, nn.Parameter(half.contiguous()))
    with torch.no_grad():
        found = layer(x, adapter_names=["a", "b"])
    for row, name in enumerate("ab"):
        layer.set_adapter([name])
        torch.testing.assert_close(found[row], layer(x[row : row + 1])[0])


def test_a_mixed_batch_copies_the_output_once_for_any_number_of_adapters():
    names = [f"a{i}" for i in range(5)]
    layer, x = host(nn.Linear(6, 5), *names), torch.randn(5, 2, 6, requires_grad=True)
    calls = called(layer, x, names, grads=True)
    assert (calls.count("clone"), calls.count("index_copy")) == (1, 0)
    assert calls.count("index_copy_") == len(names)


@pytest.mark.parametrize("training", [True, False])
def test_factors_on_a_frozen_layer_are_fused_with_it(training):
    """Output and gradients equal those on a trainable layer, where nothing is fused."""
    batched = host(nn.Linear(6, 6).requires_grad_(False), "a").train(training)
    apart = copy.deepcopy(batched)
    apart.base_layer.register_forward_hook(lambda *_: None)  # a hook prevents fusing
    frozen = [
        frozen_weight_and_bias(layer.base_layer, torch.empty(1, 6)) for layer in (batched, apart)
    ]
    assert frozen[0] is not None
    assert frozen[1] is None
    x, weight = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    found = []
    for layer in (batched, apart):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * weight).sum().backward()
        found.append((y, leaf.grad, *(p.grad for p in layer.adapter_dict.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_without_gradients_the_update_is_added_to_the_output_in_place():
    layer, seen = host(nn.Linear(6, 5), "a"), []
    x = torch.randn(2, 4, 6)
    expected = layer(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        layer.base_layer.register_forward_hook(lambda m, args, y: seen.append(y))
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(seen[0], nn.functional.linear(x, *layer.base_layer.parameters()))


def test_an_adapter_with_its_own_forward_or_dropout_is_called():
    class Mine(LowRank):
        def forward(self, x, y):
            return y + 1

    class Dropping(LowRank):
        def drop(self, x):
            return 0 * x

    base = nn.Linear(6, 5).requires_grad_(False)
    for kind, added in ((Mine, 1), (Dropping, 0)):
        layer = AdapterLayer(base, "petl_toy_", nn.ModuleDict())
        adapter = kind(shape_of(base), None, LayerInfo("fc", "a", ForwardContext()))
        layer.add("a", adapter, inference_mode=False)
        layer.set_adapter(["a"])
        x = torch.randn(2, 6)
        torch.testing.assert_close(layer(x), base(x) + added)


def test_a_mixed_batch_on_a_merged_layer_is_refused():
    layer = host(nn.Linear(6, 5), "a")
    layer.merge()
    with pytest.raises(petl.InputError):
        layer(torch.randn(1, 6), adapter_names=["a"])
    with pytest.raises(petl.InputError, match="2 entries"):
        layer(torch.randn(1, 6), adapter_names=["a", "a"])


def test_an_adapter_without_factors_or_forward_is_an_error():
    class Empty(Adapter):
        pass

    adapter = Empty(LayerShape(6, 5), None, LayerInfo("fc", "a", ForwardContext()))
    for call in (lambda: adapter(torch.randn(1, 6), torch.randn(1, 5)), adapter.delta):
        with pytest.raises(NotImplementedError, match="Empty"):
            call()


def test_submodules_of_a_layer_are_its_base_and_one_container():
    model = petl.wrap(testing.tiny_llama(), "mola", adapter_name="x")
    layer = next(iter(testing.tuner_layers(model).values()))
    assert dict(layer.named_children()).keys() == {"base_layer", "petl_mola_adapters"}
    assert set(layer.adapters) == {"x"}


class InPlaceBlock(nn.Module):
    """Changes what its layers return, as Falcon's blocks do, in place or not."""

    in_place = True

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = self.up(x)
        h = h.relu_() if self.in_place else h.relu()
        y = self.down(h)
        if not self.in_place:
            return y + x
        y += x
        return y


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {}),
        ("mola", {"num_experts": 2, "top_k": 1}),
        ("mos", {"r": 4, "equivalent_rank": 4}),
        ("increlora", {}),
        ("compacter", {"r": 4}),
        ("dsee", {"r": 2}),
        ("pst", {"r": 2}),
        ("sparse", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_may_change_outputs_of_layers_in_place(method, fields):
    base = nn.Module()
    base.blocks = nn.ModuleList([InPlaceBlock(), InPlaceBlock()])
    base.forward = lambda x: base.blocks[1](base.blocks[0](x))
    model = petl.wrap(base, method, target_modules=["up", "down"], **fields)
    if method == "lora":
        petl.fuse_lora(model)
    for parameter in trainable(model):
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 3, 16)
    found = []
    for in_place in (True, False):
        for block in model.base_model.model.blocks:
            block.in_place = in_place
        model.zero_grad()
        model.base_model.model(x).square().sum().backward()
        found.append([p.grad.clone() for p in trainable(model) if p.grad is not None])
    assert found[0]
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
