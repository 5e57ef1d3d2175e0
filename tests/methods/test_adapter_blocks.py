"""Adapters beside whole blocks: outputs against explicit hooks, gradients, counts, refusals."""

import json

import pytest
import torch
from adapter_fixtures import adapters
from tiny_families import FAMILIES, K
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import petl
from petl import testing

BESIDE = {"locations": ["block"], "placement": "parallel"}


def blocks(family) -> list[str]:
    return [f"{stack}.{i}" for stack in family.stacks for i in range(2)]


def by_hand(model: nn.Module, paths: list[str], weights: dict, placement: str) -> None:
    """An unwrapped model with a hook on each block that adds the network's output."""

    def hook(w: dict[str, Tensor]):
        def add(module, args, kwargs, output):
            y = output[0] if isinstance(output, tuple) else output
            x = args[0] if args else kwargs["hidden_states"]
            h = y if placement == "sequential" else x
            f = F.gelu(h @ w["down_weight"].T + w["down_bias"]) @ w["up_weight"].T + w["up_bias"]
            return (y + f, *output[1:]) if isinstance(output, tuple) else y + f

        return add

    for path in paths:
        module = model.get_submodule(path)
        module.register_forward_hook(hook(weights[path]), with_kwargs=True)


@pytest.mark.cells(10)
@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_explicit_hooks(name):
    family, placement = FAMILIES[name], "sequential" if name == "bert" else "parallel"
    model = petl.wrap(family.build(), "adapter", r=4, locations=["block"], placement=placement)
    base, batch = family.build(), family.batch()
    plain = family.outputs(base, **batch)
    # zero_up: the base model's outputs
    assert torch.equal(family.outputs(model.eval(), **batch), plain)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.normal_(std=0.2)
    weights = {p.rpartition(".")[0]: dict(a.named_parameters()) for p, a in adapters(model).items()}
    assert set(weights) == set(blocks(family))
    by_hand(base, blocks(family), weights, placement)
    expected = family.outputs(base, **batch)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(family.outputs(model, **batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beside", [True, False])
def test_the_first_adapter_gets_a_gradient_past_blocks_that_pass_none(beside):
    """With blocks whose outputs are constants, only adapters beside them are connected."""
    fields = BESIDE if beside else {"placement": "parallel", "locations": ["ffn"]}
    model = petl.wrap(FAMILIES["bert"].build(), "adapter", r=4, init_weights="normal", **fields)
    for layer in model.base_model.model.encoder.layer:
        # the last module of a block, whose output has no gradient then
        layer.output.register_forward_hook(lambda module, args, output: output.detach())
    out = model(**FAMILIES["bert"].batch()).last_hidden_state
    grads = [None]
    if out.requires_grad:
        out.sum().backward()
        first = model.base_model.model.encoder.layer[0]
        grads = [p.grad for p in first.parameters() if p.requires_grad]
    assert all((grad is not None and bool(grad.any())) is beside for grad in grads)


def test_count_of_bert_base():
    """12 (2 K r + r + K) for K = 768 and r = 8."""
    with torch.device("meta"):
        model = BertModel(BertConfig(vocab_size=10))
    wrapped = petl.wrap(model, "adapter", r=8, **BESIDE)
    count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert count == 12 * (2 * 768 * 8 + 8 + 768) == 156_768


@pytest.mark.thorough
def test_blocks_and_sublayers_take_adapters_together_and_apart(tmp_path):
    """In one adapter and in two, in either order; names of tensors do not depend on the other."""
    family, batch = FAMILIES["llama"], FAMILIES["llama"].batch()
    kinds = {"block": ["block"], "ffn": ["ffn"], "both": ["block", "ffn"]}
    for order in (["block", "ffn", "both"], ["both", "ffn", "block"]):
        first, *others = order
        fields = {name: {"r": 4, "locations": kinds[name]} for name in order}
        model = petl.wrap(family.build(), "adapter", adapter_name=first, **fields[first])
        for name in others:
            model.add_adapter(name, petl.build_config("adapter", **fields[name]))
        expected = {}
        for name in order:
            model.set_adapter(name)
            testing.stir(model.eval(), name)
            expected[name] = family.outputs(model, **batch)
        model.save_pretrained(tmp_path)
        for name in order:
            alone = petl.load(family.build(), tmp_path / name).eval()
            torch.testing.assert_close(family.outputs(alone, **batch), expected[name])
        plain = model.unload()
        assert torch.equal(family.outputs(plain, **batch), family.outputs(family.build(), **batch))
        assert type(plain.model.layers[0]) is type(family.build().model.layers[0])


def test_some_blocks_only(tmp_path):
    family, batch = FAMILIES["t5"], FAMILIES["t5"].batch()
    model = petl.wrap(family.build(), "adapter", r=4, layers_to_transform=[1], **BESIDE)
    hosts = {path.rpartition(".")[0] for path in adapters(model)}
    assert hosts == {"encoder.block.1", "decoder.block.1"}
    # a second adapter still finds all blocks, although their classes differ now
    model.add_adapter("all", petl.build_config("adapter", r=4, **BESIDE))
    assert len(model.base_model.placed["all"]) == 4
    testing.stir(model.eval())
    expected = family.outputs(model, **batch)
    model.save_pretrained(tmp_path)
    loaded = petl.load(family.build(), tmp_path).eval()
    torch.testing.assert_close(family.outputs(loaded, **batch), expected)


def test_names_of_many_blocks_stay_complete_in_the_config(tmp_path):
    """PEFT shortens long lists of names, of a block to its index."""
    config = BertConfig(
        hidden_size=8, num_hidden_layers=24, num_attention_heads=2, intermediate_size=8,
        vocab_size=9,
    )  # fmt: skip
    petl.wrap(BertModel(config), "adapter", r=2, **BESIDE).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == {f"encoder.layer.{i}" for i in range(24)}


def test_compacter_and_quantized_weights_work_beside_blocks(tmp_path):
    family, batch = FAMILIES["bert"], FAMILIES["bert"].batch()
    cases = (("compacter", {"r": 8}), ("binary", {"inner": "adapter", "r": 4}))
    for i, (method, fields) in enumerate(cases):
        torch.manual_seed(0)
        model = petl.wrap(family.build(), method, **fields, **BESIDE)
        model.add_adapter("second", model.peft_config["default"].__class__(**fields, **BESIDE))
        testing.stir(model.eval())
        expected = family.outputs(model, **batch)
        assert (expected - family.outputs(family.build(), **batch)).abs().max() > 1e-3
        model.save_pretrained(tmp_path / str(i))
        loaded = petl.load(family.build(), tmp_path / str(i)).eval()
        torch.testing.assert_close(family.outputs(loaded, **batch), expected, atol=2e-5, rtol=0)


def test_a_file_is_checked_against_a_model_that_has_adapters_beside_blocks(tmp_path):
    family, batch = FAMILIES["t5"], FAMILIES["t5"].batch()
    model = testing.stir(petl.wrap(family.build(), "adapter", r=4, **BESIDE)).eval()
    expected = family.outputs(model, **batch)
    model.save_pretrained(tmp_path)
    again = petl.wrap(family.build(), "adapter", r=2, **BESIDE).eval()
    petl.load(again, tmp_path, adapter_name="loaded")
    again.set_adapter("loaded")
    torch.testing.assert_close(family.outputs(again, **batch), expected)


def test_a_block_that_is_named_as_a_target_is_adapted_as_a_whole():
    family = FAMILIES["gpt2"]
    model = petl.wrap(family.build(), "adapter", r=4, target_modules=["h.1", "h.0.mlp.c_proj"])
    placed = set(model.base_model.placed["default"])
    assert placed == {"transformer.h.1", "transformer.h.0.mlp.c_proj"}
    block = model.get_submodule("base_model.model.transformer.h.1")
    assert block.petl_adapter_adapters.in_features == K
