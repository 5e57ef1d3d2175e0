"""Adapters of whole blocks, with toy adapters whose effect is computed by hand."""

import pickle
from types import MethodType

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from petl import testing
from petl.core.layers.block import AdaptedBlock, add_to_block, check_block_adapter_name
from petl.core.layers.class_swap import AdapterDict
from petl.core.layers.context import ForwardContext
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.errors import InputError, UnsupportedError

K = 64  # width of the tiny models


class Doubled(Adapter):
    """Doubles the hidden states and the encoder's output before the block, adds 1 behind it."""

    def with_base(self, x, base, *args, **kwargs):
        if kwargs.get("encoder_hidden_states") is not None:
            kwargs["encoder_hidden_states"] = 2 * kwargs["encoder_hidden_states"]
        return base(2 * x, *args, **kwargs) + 1

    def forward(self, x, y):
        return y + x


def adapt(block: nn.Module, *names: str) -> nn.Module:
    for name in names or ("a",):
        adapter = Doubled(LayerShape(K, K), None, LayerInfo("block", name, ForwardContext()))
        add_to_block(
            block, adapter, "petl_toy_", AdapterDict(), LayerShape(K, K), inference_mode=False
        )
    block.petl_toy_adapters.set_adapter([*names] or ["a"])
    return block


class Passed(nn.Module):
    """A block that returns what it gets, in the form that the test asks for."""

    def __init__(self, output=lambda x: x):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.output = output

    def forward(self, hidden_states, mask=None):
        return self.output(hidden_states)


@torch.no_grad()
def test_an_adapter_changes_inputs_and_first_output_of_a_block_that_returns_a_tuple():
    model = testing.tiny_t5()
    block = model.decoder.block[1]
    x, memory = torch.randn(2, 5, K), torch.randn(2, 7, K)
    bias = torch.zeros(1, 4, 5, 5)
    cross = torch.zeros(1, 4, 5, 7)
    inputs = {"position_bias": bias, "encoder_decoder_position_bias": cross}
    expected = block(2 * x, encoder_hidden_states=2 * memory, **inputs)
    found = adapt(block)(x, encoder_hidden_states=memory, **inputs)
    assert len(found) == len(expected) > 1
    assert torch.equal(found[0], expected[0] + 1)
    assert all(a is b or torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


@torch.no_grad()
def test_further_active_adapters_get_the_input_of_the_block():
    x = torch.randn(2, 5, K)
    assert torch.equal(adapt(Passed(), "a", "b")(x), 2 * x + 1 + x)
    # hidden states by keyword
    assert torch.equal(adapt(Passed(), "a", "b")(hidden_states=x, mask=None), 2 * x + 1 + x)


def test_an_adapted_block_keeps_its_place_its_class_and_its_attributes():
    model = testing.tiny_llama()
    block, names = model.model.layers[0], [name for name, _ in model.named_parameters()]
    adapt(block)
    assert model.model.layers[0] is block
    assert isinstance(block, LlamaDecoderLayer)
    assert isinstance(block, AdaptedBlock)
    assert block.hidden_size == K
    assert not hasattr(block, "weight")
    assert adapt(Passed()).weight.shape == (3,)
    assert [name for name, _ in model.named_parameters()] == names
    thawed = pickle.loads(pickle.dumps(block))
    assert thawed.petl_toy_adapters.get_base_layer() is thawed
    block.petl_toy_adapters.detach()
    assert type(block) is LlamaDecoderLayer
    assert [name for name, _ in model.named_modules() if "petl" in name] == []


@torch.no_grad()
def test_disabled_adapters_give_the_output_of_the_block_itself():
    out = (torch.randn(2, 5, K), "other")
    block = adapt(Passed(lambda x: out))
    block.petl_toy_adapters.enable_adapters(False)
    assert block(torch.randn(2, 5, K)) is out


@torch.no_grad()
def test_hidden_states_that_a_model_returns_are_those_behind_the_adapters():
    model, batch = testing.tiny_llama(), testing.TINY_MODELS["llama"].batch()
    plain = model(**batch, output_hidden_states=True).hidden_states
    adapt(model.model.layers[1])
    adapted = model(**batch, output_hidden_states=True).hidden_states
    inside = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: inside.append(args[0]))
    model(**batch)
    assert torch.equal(adapted[1], plain[1])
    assert torch.equal(adapted[2], inside[0])
    assert not torch.equal(adapted[2], plain[2])


@torch.no_grad()
@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_stay_in_effect(hooked_first):
    block, x = Passed(), torch.randn(2, 5, K)
    if hooked_first:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
    adapt(block)
    if not hooked_first:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(block(x), 2 * x + 1)
    block.petl_toy_adapters.detach()
    assert torch.equal(block(x), x)


def test_a_forward_that_would_run_without_the_adapters_raises():
    block = Passed()
    block.forward = MethodType(lambda self, x: x, block)
    with pytest.raises(UnsupportedError):
        adapt(block)
    assert type(block) is Passed


def test_a_list_of_outputs_stays_a_list():
    block, x = adapt(Passed(lambda x: [x, "more"])), torch.randn(2, 5, K)
    y, *others = block(x)
    assert torch.equal(y, 2 * x + 1)
    assert others == ["more"]
    assert isinstance(block(x), list)


def test_a_sequence_would_run_the_adapters_as_a_layer_of_its_own():
    with pytest.raises(UnsupportedError, match="Sequential"):
        adapt(nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: {"hidden": x}, "dict"),
        (lambda x: x[..., :3], r"\[2, 5, 3\]"),
    ],
)
def test_outputs_that_are_no_hidden_states_raise(output, message):
    class Plain(Doubled):
        def with_base(self, x, base, *args, **kwargs):
            return base(x, *args, **kwargs)

    block = Passed(output)
    adapter = Plain(LayerShape(K, K), None, LayerInfo("block", "a", ForwardContext()))
    add_to_block(block, adapter, "petl_toy_", AdapterDict(), LayerShape(K, K), inference_mode=True)
    block.petl_toy_adapters.set_adapter(["a"])
    with pytest.raises(InputError, match=message):
        block(torch.randn(2, 5, K))


def test_inputs_that_are_no_hidden_states_raise():
    block = adapt(Passed())
    with pytest.raises(InputError, match=r"\[2, 3\]"):
        block(torch.randn(2, 3))
    with pytest.raises(InputError):
        block()


def test_merging_a_block_raises():
    with pytest.raises(UnsupportedError, match="T5Block"):
        adapt(T5Block(testing.tiny_t5().config)).petl_toy_adapters.merge()


@pytest.mark.parametrize("name", ["model", "pick", "captures", "merge"])
def test_names_that_the_holder_of_the_adapters_needs_raise(name):
    with pytest.raises(InputError, match=name):
        check_block_adapter_name(name)
    check_block_adapter_name("default")
