"""Target modules of a method: presets, patterns, layers, and errors with suggestions."""

import json
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

import petl
from petl import testing
from petl.core.compat import check_target_module_exists
from petl.core.model import targets
from petl.core.model.coverage import coverage_of
from petl.core.model.places import place

BLOCKS = {"llama": 3, "bert": 2, "vit": 2, "gpt2": 2}
ATTENTION = {
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "bert": (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    "vit": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
}
MLP = {
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "bert": ("intermediate.dense", "output.dense"),
    "vit": ("mlp.fc1", "mlp.fc2"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
}
QUERY_VALUE = {
    "llama": ("self_attn.q_proj", "self_attn.v_proj"),
    "bert": ("attention.self.query", "attention.self.value"),
    "vit": ("attention.q_proj", "attention.v_proj"),
    "gpt2": ("attn.c_attn",),
}
STACK = {
    "llama": "model.layers",
    "bert": "bert.encoder.layer",
    "vit": "vit.layers",
    "gpt2": "transformer.h",
}


def adapted(model_name: str, **fields) -> set[str]:
    """Return the names of the modules that MoLA adapts."""
    return names_in(petl.wrap(testing.TINY_MODELS[model_name].base(), "mola", **fields))


def names_in(model) -> set[str]:
    return {key.removeprefix("base_model.model.") for key in testing.tuner_layers(model)}


def in_each_block(model_name: str, names: tuple[str, ...]) -> set[str]:
    blocks = range(BLOCKS[model_name])
    return {f"{STACK[model_name]}.{block}.{name}" for block in blocks for name in names}


@pytest.mark.cells(2)
@pytest.mark.parametrize("model", BLOCKS)
def test_presets_find_their_modules(model):
    attention, mlp = in_each_block(model, ATTENTION[model]), in_each_block(model, MLP[model])
    assert adapted(model) == attention | mlp
    assert adapted(model, target_modules="all-linear") == attention | mlp
    assert adapted(model, target_modules="block-linear") == attention | mlp
    assert adapted(model, target_modules="attention-linear") == attention
    assert adapted(model, target_modules="mlp-linear") == mlp
    wanted = in_each_block(model, QUERY_VALUE[model])
    assert adapted(model, target_modules="query-value") == wanted


def test_presets_reach_both_stacks_of_an_encoder_decoder():
    attention = [f"block.{b}.layer.0.SelfAttention.{n}" for b in (0, 1) for n in "qkvo"]
    cross = [f"decoder.block.{b}.layer.1.EncDecAttention.{n}" for b in (0, 1) for n in "qkvo"]
    expected = {f"{stack}.{name}" for stack in ("encoder", "decoder") for name in attention}
    assert adapted("t5", target_modules="attention-linear") == expected | set(cross)
    assert len(adapted("t5", target_modules="query-value")) == 12
    assert len(adapted("t5")) == 32


@pytest.mark.parametrize("preset", ["block-linear", "attention-linear", "query-value"])
def test_adopted_methods_accept_the_same_presets(preset):
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=preset)
    assert names_in(model) == adapted("llama", target_modules=preset)


def test_all_linear_has_pefts_meaning_for_pefts_methods():
    model = petl.wrap(testing.tiny_bert(), "lora", target_modules="all-linear")
    assert names_in(model) == adapted("bert") | {"bert.pooler.dense", "classifier"}


def test_heads_are_not_targets():
    assert not any("lm_head" in name for name in adapted("llama"))
    assert not any("classifier" in name for name in adapted("bert"))


def test_a_second_adapter_may_use_a_preset_too():
    model = petl.wrap(testing.tiny_llama(), "mola", target_modules=["q_proj"])
    config = petl.build_config("mola", target_modules="mlp-linear")
    model.add_adapter("other", config)
    with_other = {k for k, m in testing.tuner_layers(model).items() if "other" in m.adapters}
    mlp = in_each_block("llama", MLP["llama"])
    assert {key.removeprefix("base_model.model.") for key in with_other} == mlp


def test_names_suffixes_and_regular_expressions():
    first = "model.layers.0.self_attn.q_proj"
    assert adapted("llama", target_modules=[first]) == {first}
    suffix = adapted("llama", target_modules=["self_attn.q_proj"])
    assert suffix == in_each_block("llama", ("self_attn.q_proj",))
    pattern = r".*\.layers\.[02]\.mlp\.(up|down)_proj"
    assert adapted("llama", target_modules=pattern) == {
        f"model.layers.{j}.mlp.{n}_proj" for j in (0, 2) for n in ("up", "down")
    }


def test_excluded_modules_are_left_out():
    rest = adapted("llama", exclude_modules=["q_proj", "down_proj"])
    assert len(rest) == 15
    assert not any(name.endswith(("q_proj", "down_proj")) for name in rest)
    pattern = adapted("llama", target_modules=["q_proj"], exclude_modules=r".*layers\.1\..*")
    assert pattern == {f"model.layers.{j}.self_attn.q_proj" for j in (0, 2)}


@pytest.mark.parametrize("method", ["mola", "lora"])
@pytest.mark.parametrize("targets", ["block-linear", ["q_proj", "v_proj"]])
def test_layers_to_transform_picks_blocks(method, targets):
    fields = {"target_modules": targets, "layers_to_transform": [1]}
    names = names_in(petl.wrap(testing.tiny_llama(), method, **fields))
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)


def test_layers_to_transform_may_be_one_index():
    assert len(adapted("llama", layers_to_transform=2)) == 7
    assert len(adapted("bert", layers_to_transform=0)) == 6


@pytest.mark.parametrize("method", ["mola", "lora", "loha"])
@pytest.mark.parametrize(
    ("share", "blocks"),
    [
        ("top:1", [2]),
        ("top:2", [1, 2]),
        ("top:0.34", [2]),
        ("top:0.5", [1, 2]),
        ("top:1.0", [0, 1, 2]),
    ],
)
def test_a_share_names_the_last_blocks(method, share, blocks):
    fields = {"target_modules": ["q_proj"], "layers_to_transform": share}
    model = petl.wrap(testing.tiny_llama(), method, **fields)
    assert names_in(model) == {f"model.layers.{block}.self_attn.q_proj" for block in blocks}
    assert model.active_peft_config.layers_to_transform == blocks  # what is saved: plain indices


def test_a_share_goes_through_a_config_and_add_adapter():
    config = petl.build_config("mola", layers_to_transform="top:1")
    model = petl.wrap(testing.tiny_llama(), config)
    assert config.layers_to_transform == "top:1"  # it serves models of other depths
    model.add_adapter("other", petl.build_config("mola", layers_to_transform="top:2"))
    assert model.peft_config["other"].layers_to_transform == [1, 2]


def test_methods_that_find_their_own_places_take_a_share():
    names = names_in(petl.wrap(testing.tiny_llama(), "adapter", layers_to_transform="top:0.33"))
    assert names
    assert all(name.startswith("model.layers.2.") for name in names)


def test_a_share_of_an_encoder_decoder_counts_in_both_lists():
    names = adapted("t5", target_modules=["q"], layers_to_transform="top:1")
    assert {name.split(".layer.")[0] for name in names} == {"encoder.block.1", "decoder.block.1"}


def test_a_share_of_lists_of_several_lengths_is_an_error():
    base = testing.tiny_t5()
    base.decoder.block.append(base.decoder.block[-1])
    with pytest.raises(petl.InputError, match=r"encoder.block 2, decoder.block 3"):
        petl.wrap(base, "mola", layers_to_transform="top:1")


def test_layers_pattern_names_the_stack():
    fields = {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "block"}
    names = adapted("t5", **fields)
    assert names == {
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
    }


# Errors


def test_a_projection_that_attention_never_calls_is_refused():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])

    with pytest.raises(TypeError, match="out_proj"):
        petl.wrap(Model(), "mola", target_modules=["out_proj"])


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["linear1", "linear2"]},
        {"target_modules": ["out_proj"]},
        {"target_modules": ["self_attn"]},
        {"target_modules": "all-linear"},
        {"target_modules": "block-linear"},
        {"target_modules": [], "target_parameters": ["linear1.weight"]},
    ],
)
def test_pefts_lora_on_layers_that_are_never_called_is_refused(fields):
    model = encoder()
    with pytest.raises(petl.errors.ModuleKindError):
        petl.wrap(model, "lora", **fields)
    assert not testing.tuner_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_for_layers_that_are_never_called_is_not_loaded(tmp_path):
    fields = {"r": 2, "target_modules": ["linear1"]}
    get_peft_model(encoder(), LoraConfig(**fields)).save_pretrained(tmp_path)
    with pytest.raises(petl.errors.ModuleKindError):
        petl.load(encoder(), tmp_path)
    # nor next to another adapter
    model = petl.wrap(nn.Sequential(encoder(), nn.Linear(8, 8)), "lora", target_modules=["1"])
    get_peft_model(nn.Sequential(encoder()), LoraConfig(**fields)).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"0\.layers\.0\.linear1"):
        petl.load(model, tmp_path, adapter_name="other")


def test_blocks_of_an_nn_sequential_are_layers_as_in_timm():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    model = nn.ModuleDict(
        {
            "blocks": nn.Sequential(Block(), Block()),
            "named": nn.Sequential(OrderedDict(first=Block(), second=Block())),
            "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        }
    )
    assert place(model, "blocks.1.qkv") == ("blocks", 1, 2, "qkv")
    assert place(model, "named.second.qkv") == ("named", 1, 2, "qkv")
    assert place(model, "head.0") is None
    model = petl.wrap(model, "lora", target_modules="block-linear")
    names = {"blocks.0.qkv", "blocks.1.qkv", "named.first.qkv", "named.second.qkv"}
    assert model.active_peft_config.target_modules == names


def test_the_place_of_a_module_is_its_outermost_block():
    model = testing.tiny_t5()
    where = place(model, "decoder.block.1.layer.2.DenseReluDense.wo")
    assert where == ("decoder.block", 1, 2, "layer.2.DenseReluDense.wo")
    assert place(model, "lm_head") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.1\..*_proj"},
    ],
)
def test_matched_names_equal_pefts_although_it_is_called_for_few(fields, monkeypatch):
    model, config = testing.tiny_llama(), petl.build_config("mola", **fields)
    asked = []

    def check(config, name):
        asked.append(name)
        return check_target_module_exists(config, name)

    monkeypatch.setattr(targets, "check_target_module_exists", check)
    names = [name for name, _ in model.named_modules() if name]
    expected = [name for name in names if check_target_module_exists(config, name)]
    assert targets.matched_names(config, model) == expected != []
    if not isinstance(fields["target_modules"], str):
        assert len(asked) < len(names) / 2


def test_a_wrong_pattern_for_layers_that_are_never_called_is_an_input_error(tmp_path):
    get_peft_model(encoder(), LoraConfig(target_modules=["linear1"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": "("}))
    with pytest.raises(petl.InputError, match=r"target_modules='\('"):
        petl.load(encoder(), tmp_path)


@pytest.mark.parametrize("method", ["lora", "increlora"])
def test_a_preset_reaches_no_module_whose_name_ends_as_one_of_its_own(method, tmp_path):
    def nested():
        return nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8))

    model = petl.wrap(nested(), method, target_modules="block-linear")
    assert names_in(model) == {"0.0", "1"}
    model.save_pretrained(tmp_path)
    assert names_in(petl.load(nested(), tmp_path, other_base=True)) == {"0.0", "1"}


def test_query_value_reads_pefts_regular_expressions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="gemma4")
            self.language_model = testing.tiny_llama()
            self.vision_tower = testing.tiny_llama()

    found = targets.expand_preset("query-value", Model())
    assert {name.split(".")[0] for name in found} == {"language_model"}
    assert {name.split(".")[-1] for name in found} == {"q_proj", "v_proj"}


def convolutional():
    """Return a small MobileNet, which pads as TensorFlow does by the stride of its convolutions."""
    config = MobileNetV1Config(image_size=32, depth_multiplier=0.25, initializer_range=0.2)
    torch.manual_seed(0)
    return MobileNetV1ForImageClassification(config).eval()


@pytest.mark.cells(2)
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "loha", "lokr", "oft"])
@pytest.mark.parametrize("given", [{}, {"target_modules": "block-linear"}])
def test_a_model_without_linear_layers_has_adapters_on_its_convolutions(method, given):
    base = convolutional()
    names = {n for n, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    inside = {name for name in names if ".layer." in name}
    assert len(inside) == 13
    sizes = {"r": 4} if method not in ("oft", "adalora") else {}
    sizes |= {"oft": {"oft_block_size": 4}, "adalora": {"total_step": 100}}.get(method, {})
    model = petl.wrap(base, method, **given, **sizes)
    assert names_in(model) == inside
    assert coverage_of(model).share == 1
    testing.stir(model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        adapted = model(images).logits
        plain = convolutional()(images).logits
        merged = model.merge_and_unload()(images).logits
    assert not torch.allclose(adapted, plain, rtol=1e-3)
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-3 * float(adapted.abs().max()))


def test_convolutions_are_left_alone_beside_linear_layers():
    model = petl.wrap(testing.tiny_vit(), "lora")
    assert not any("patch" in name for name in names_in(model))
