"""Bottleneck adapters: outputs against explicit hooks, published parameter counts, refusals."""

import copy
import pickle

import pytest
import torch
from adapter_fixtures import adapters, listen, one_layer
from tiny_families import FAMILIES, K
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import petl
from petl import testing
from petl.errors import InputError, ModuleKindError

CONTRACT = {
    "fields": {"r": 8},
    "lr": 4e-2,
    "acts_with": {
        "reduction_factor": {"r": None},
        "gate_rank": {"gate": "large"},
        "identity_gate": {"gate": "large"},
        "input_modules": {
            "placement": "parallel",
            "target_modules": ["o_proj"],
            "input_modules": {"o_proj": "o_proj"},
        },
    },
    "idle": {
        "block": "a conformer reads future tokens, so a decoder refuses it",
        "conv_kernel_size": "it is that of a conformer",
    },
}

PLACEMENTS = ("sequential", "parallel", "parallel_residual")


def locations(family) -> list[str]:
    return sorted({kind for kind, *_ in family.parts()})


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def by_hand(
    model: nn.Module, family, weights: dict[str, dict[str, Tensor]], placement: str
) -> None:
    """An unwrapped model with hooks that compute the paper's formula at listed modules."""
    seen: dict[str, Tensor] = {}

    def adapt(name: str, stream: str):
        def hook(module, args, y):
            h = y if placement == "sequential" else seen[stream]
            w = weights[name]
            f = F.gelu(h @ w["down_weight"].T + w["down_bias"]) @ w["up_weight"].T + w["up_bias"]
            return y + 0.5 * f

        return hook

    for _, closing, source, residual in family.parts():
        stream = source if placement == "parallel" else residual
        module = model.get_submodule(stream)
        module.register_forward_pre_hook(listen(seen, stream), with_kwargs=True)
        model.get_submodule(closing).register_forward_hook(adapt(closing, stream))


@pytest.mark.cells(10)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_explicit_hooks(name, placement):
    family = FAMILIES[name]
    fields = {"r": 4, "placement": placement, "scaling": 0.5, "locations": locations(family)}
    start = petl.wrap(family.build(), "adapter", **fields).eval()
    base, batch = family.build(), family.batch()
    with torch.no_grad():
        plain = family.outputs(base, **batch)
        assert torch.equal(
            family.outputs(start, **batch), plain
        )  # zero_up: the base model's outputs
        for parameter in (p for p in start.parameters() if p.requires_grad):
            parameter.normal_(std=0.5)
        weights = {path: dict(a.named_parameters()) for path, a in adapters(start).items()}
        assert set(weights) == {closing for _, closing, _, _ in family.parts()}
        by_hand(base, family, weights, placement)
        expected = family.outputs(base, **batch)
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(family.outputs(start, **batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_residual_adds_the_input(placement, residual):
    x, y = torch.randn(2, 3, K), torch.randn(2, 3, K)
    layer = one_layer(placement=placement, residual=residual)
    h = y if placement == "sequential" else x
    f = layer.network(h)
    inputs = {"sequential": y * 0 + (y if residual else 0)}.get(
        placement, y + (x if residual else 0)
    )
    torch.testing.assert_close(layer(x, y), inputs + f)


def test_norms_scale_and_bias_follow_the_formula():
    adapter = one_layer(ln_before=True, ln_after=True, scaling="learned", non_linearity="relu")
    x, y = torch.randn(2, 3, K), torch.randn(2, 3, K)
    p = dict(adapter.named_parameters())

    def norm(h, name):
        mean, var = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, correction=0)
        return (h - mean) / (var + 1e-5).sqrt() * p[f"{name}_weight"] + p[f"{name}_bias"]

    z = (norm(y, "norm_before") @ p["down_weight"].T + p["down_bias"]).clamp(min=0)
    f = norm(z @ p["up_weight"].T + p["up_bias"], "norm_after")
    torch.testing.assert_close(adapter(x, y), y + p["scale"] * f)
    assert set(dict(one_layer(use_bias=False).named_parameters())) == {"down_weight", "up_weight"}


# Counts and widths


def on_meta(build, config) -> nn.Module:
    with torch.device("meta"):
        return build(config)


def test_counts_of_bert_base():
    for kinds, expected in ((["attn", "ffn"], 1_789_056), (["ffn"], 894_528)):
        model = on_meta(BertModel, BertConfig(vocab_size=10))
        assert count(petl.wrap(model, "adapter", r=48, locations=kinds)) == expected


@pytest.mark.thorough
def test_counts_of_t5_base_with_and_without_norms():
    config = T5Config(d_model=768, d_kv=2, d_ff=4, num_layers=12, num_heads=2, vocab_size=10)
    for norms, expected in ((False, 1_807_488), (True, 1_855_104)):
        model = on_meta(T5ForConditionalGeneration, config)
        wrapped = petl.wrap(model, "adapter", r=24, train_layer_norms=norms)
        assert count(wrapped) == expected


def test_count_of_llama_2_7b():
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=8,
        vocab_size=10, head_dim=128,
    )  # fmt: skip
    model = on_meta(LlamaForCausalLM, config)
    assert count(petl.wrap(model, "adapter", r=64)) == 33_820_672


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": 12, "locations": ["ffn"]}, 230_544),
        ({"r": 12}, 461_088),
        ({"reduction_factor": 96, "locations": ["ffn"], "block": "conformer"}, 233_856),
        (
            {"reduction_factor": 96, "locations": ["ffn"], "block": "conformer", "ln_before": True},
            252_288,
        ),
    ],
)
def test_counts_of_the_audio_spectrogram_transformer(fields, expected):
    model = on_meta(ASTForAudioClassification, ASTConfig(num_labels=2))
    assert count(petl.wrap(model, "adapter", placement="parallel", **fields)) == expected


def test_width_follows_reduction_factor_or_r():
    for fields, width in (
        ({"reduction_factor": 5}, 6),
        ({"reduction_factor": 1000}, 1),
        ({"r": 3}, 3),
    ):
        model = petl.wrap(FAMILIES["vit"].build(), "adapter", **fields)
        assert {a.down_weight.shape for a in adapters(model).values()} == {(width, K)}


@pytest.mark.thorough
def test_adapterdrop_leaves_the_lower_blocks_without_adapters(tmp_path):
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=9,
    )
    model = petl.wrap(BertModel(config), "adapter", r=2, layers_to_transform=range(1, 12))
    expected = {
        f"encoder.layer.{i}.{end}"
        for i in range(1, 12)
        for end in ("attention.output.dense", "output.dense")
    }
    assert set(adapters(model)) == expected  # 22 names: PEFT would shorten the list
    model.save_pretrained(tmp_path)
    fresh = BertModel(config)  # other random values: only names matter here
    assert set(adapters(petl.load(fresh, tmp_path, other_base=True))) == expected


def test_explicit_targets_and_input_modules_equal_the_automatic_ones():
    family, results = FAMILIES["llama"], []
    explicit = {
        "target_modules": ["self_attn.o_proj", "mlp.down_proj"],
        "input_modules": {"self_attn.o_proj": "self_attn.q_proj", "mlp.down_proj": "mlp"},
    }
    for fields in ({}, explicit):
        torch.manual_seed(3)
        model = petl.wrap(
            family.build(), "adapter", r=4, placement="parallel", init_weights="normal", **fields
        )
        results.append(family.outputs(model.eval(), **family.batch()))
    assert torch.equal(*results)


# Initialization


def test_initial_values_have_the_expected_distributions():
    def weights(start: str) -> nn.Module:
        torch.manual_seed(0)
        model = petl.wrap(on_big(), "adapter", r=128, init_weights=start, target_modules=["wide"])
        return adapters(model)["wide"]

    def on_big() -> nn.Module:
        return nn.ModuleDict({"wide": nn.Linear(3, 1024)})

    zero, normal, binary = (weights(s) for s in ("zero_up", "normal", "binary"))
    bound = 1024**-0.5
    assert 0.99 * bound < zero.down_weight.abs().max() <= bound
    assert not zero.up_weight.any()
    for tensor in (normal.down_weight, normal.up_weight):
        assert tensor.std().item() == pytest.approx(0.01, rel=0.02)
    assert binary.up_weight.abs().max() <= 2e-3
    assert 0.8e-3 < binary.up_weight.std() < 1e-3
    for adapter in (zero, normal, binary):
        assert not adapter.down_bias.any()
        assert not adapter.up_bias.any()


# Training


# Inputs of other modules


@pytest.mark.parametrize("placement", PLACEMENTS[1:])
def test_copies_and_pickles_with_input_captures_are_independent(placement):
    family = FAMILIES["gpt2"]
    model = testing.stir(petl.wrap(family.build(), "adapter", placement=placement)).eval()
    expected = family.outputs(model, **family.batch())
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, thawed):
        assert torch.equal(family.outputs(other, **family.batch()), expected)
        contexts = {id(f.context) for f in captures(other)} | {id(other.base_model.context)}
        assert len(contexts) == 1
        assert not contexts & {id(f.context) for f in captures(model)}


def captures(model: nn.Module) -> list:
    layers = [m for m in model.modules() if isinstance(m, petl.AdapterLayer)]
    return [capture for layer in layers for capture in layer.captures.values()]


def test_hooks_are_removed_with_their_adapter():
    family = FAMILIES["llama"]
    plain = testing.switching.hooks_of(family.build())
    model = petl.wrap(family.build(), "adapter", placement="parallel")
    model.add_adapter("second", petl.build_config("adapter", placement="parallel_residual"))
    model.add_adapter("third", petl.build_config("adapter"))
    assert len(captures(model)) == 8  # four sub-layers, two adapters that read other inputs
    model.delete_adapter("second")
    assert len(captures(model)) == 4
    assert testing.switching.hooks_of(model.unload()) == plain


@pytest.mark.parametrize("first", [False, True])
def test_trained_norms_work_with_inputs_captured_at_norms(first, tmp_path):
    """PEFT copies the norms that it trains, and the residual stream is captured at a norm."""
    family = FAMILIES["llama"]
    fields = {"placement": "parallel_residual", "r": 4}
    model = petl.wrap(family.build(), "adapter", train_layer_norms=first, **fields)
    model.add_adapter("second", petl.build_config("adapter", train_layer_norms=not first, **fields))
    for name in ("second", "default"):
        model.set_adapter(name)
        testing.stir(model.eval(), name)
    batch = family.batch()
    expected = family.outputs(model, **batch)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.delete_adapter("second")
    alone = petl.load(family.build(), tmp_path).eval()
    for other in (model, alone):
        torch.testing.assert_close(family.outputs(other, **batch), expected)


def test_captured_inputs_are_released_after_a_forward():
    family = FAMILIES["vit"]
    model = petl.wrap(family.build(), "adapter", placement="parallel").train()
    family.outputs(model, **family.batch())
    assert not model.base_model.context.state


def test_a_layer_called_alone_names_the_missing_input():
    model = petl.wrap(FAMILIES["vit"].build(), "adapter", placement="parallel")
    layer = model.base_model.model.layers[0].mlp.fc2
    with pytest.raises(InputError, match="fc1"):
        layer(torch.randn(1, 3, layer.in_features))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_mixture_of_experts_is_adapted_as_one_module(placement):
    family = FAMILIES["mixtral"]
    model = petl.wrap(family.build(), "adapter", placement=placement, r=4, task_type="CAUSAL_LM")
    testing.stir(model).train()
    batch = family.batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".mlp.petl_adapter_adapters.default.down_weight" in name for name in grads)
    with model.disable_adapter():
        out = family.outputs(model.eval(), **batch)
    assert torch.equal(out, family.outputs(family.build(), **batch))


# Norms


def test_trained_norms_of_t5_are_saved_and_switched_off(tmp_path):
    family = FAMILIES["t5"]
    model = petl.wrap(family.build(), "adapter", train_layer_norms=True)
    norms = {n for n, p in model.named_parameters() if p.requires_grad and "norm" in n}
    assert len(norms) == 12
    testing.stir(model).eval()
    batch = family.batch()
    expected = family.outputs(model, **batch)
    with model.disable_adapter():
        base = family.outputs(family.build(), **batch)
        torch.testing.assert_close(family.outputs(model, **batch), base)
    model.save_pretrained(tmp_path)
    again = petl.load(family.build(), tmp_path).eval()
    assert torch.equal(family.outputs(again, **batch), expected)


# Errors


def test_models_of_unknown_structure_take_targets():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = petl.wrap(base, "adapter", r=2, target_modules=["1"])
    assert adapters(model)["1"].up_weight.shape == (4, 2)


def test_linears_that_are_never_called_raise():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    for base, target in (
        (nn.ModuleList([Block()]), "attention.out_proj"),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1), "linear2"),
    ):
        with pytest.raises(ModuleKindError, match=target):
            petl.wrap(base, "adapter", r=2, target_modules=[target])
