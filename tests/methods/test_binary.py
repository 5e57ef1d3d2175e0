"""Quantized adapters against explicit networks of `sigma * code + mu`; the authors' file sizes."""

import pytest
import torch
from binary_fixtures import LORA, MOS, effective, logits, stir, train, trained, wrapped
from peft import convert_to_lora
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import petl
from petl.core.adapter_file import WEIGHTS
from petl.errors import InputError
from petl.methods.binary import quantized_weights, quantizer_of
from petl.testing.models import TINY_MODELS, tiny_bert, tiny_llama, tiny_vit

CONTRACT = {
    "fields": {"r": 4, "bneck_dropout": 0.0, "save_format": "latent"},
    "lr": 3e-2,
    "acts_with": {
        "inner": {"inner": "compacter"},
        "bits_pattern": {
            "bits_pattern": {
                "model.model.layers.0.mlp.down_proj.petl_adapter_adapters.down_weight": 4
            }
        },
        "exclude_params": {"exclude_params": [".*down_weight"]},
        "head_bits": {"head_module": "lm_head"},
        "head_module": {"head_bits": 4, "head_module": "lm_head"},
        "pv_fraction": {"steps": "pv"},
        "pv_trust": {"steps": "pv", "pv_trust": 0.0001},
        "pv_decay": {"steps": "pv"},
        "pv_lr_ratio": {"steps": "pv"},
        "pv_betas": {"steps": "pv", "pv_betas": [0.5, 0.9]},
    },
}

CODES = {  # from the paper's table
    1: [0.674490],
    2: [0.377754, 1.265720],
    4: [0.105550, 0.319036, 0.540072, 0.775192, 1.034006, 1.333107, 1.707738, 2.265491],
}


def rounded(W, bits):
    """`sigma Q + mu`, by the distance to each code of the table."""
    codes = torch.tensor(sorted([*CODES[bits], *(-c for c in CODES[bits])]))
    Z = (W - W.mean()) / (W.std() + 1e-5)
    Q = codes[(Z.unsqueeze(-1) - codes).abs().argmin(-1)]
    return W.std() * Q + W.mean()


@pytest.fixture
def batch():
    return TINY_MODELS["llama"].batch()


# The mathematics in a model


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("bits", [1, 2])
def test_default_is_adaptformer_with_quantized_weights(scale, bits):
    torch.manual_seed(0)
    model = petl.wrap(tiny_vit(), "binary", bits=bits, r=8, scaling=scale).eval()
    stir(model)
    plain, pixels = tiny_vit(), TINY_MODELS["vit"].batch()

    def add_adapter(i, round_to):
        layer = plain.vit.layers[i]
        adapter = model.base_model.model.vit.layers[i].mlp.fc2.petl_adapter_adapters["default"]
        D, U = (round_to(w.detach()) for w in (adapter.down_weight, adapter.up_weight))
        seen = []
        return [
            layer.layernorm_after.register_forward_pre_hook(lambda _, x: seen.append(x[0])),
            layer.mlp.register_forward_hook(
                lambda _, x, y: y + scale * torch.relu(seen.pop() @ D.T) @ U.T
            ),
        ]

    hooks = [hook for i in range(2) for hook in add_adapter(i, lambda w: rounded(w, bits))]
    torch.testing.assert_close(logits(model, pixels), logits(plain, pixels), atol=2e-5, rtol=0)
    for hook in hooks:
        hook.remove()
    for i in range(2):
        add_adapter(i, lambda w: w)
    assert (logits(model, pixels) - logits(plain, pixels)).abs().max() > 1e-4


def test_defaults_are_those_of_bi_adaptformer():
    config = petl.build_config("binary")
    assert (config.inner, config.bits, config.save_format) == ("adapter", 1, "packed")
    assert (config.r, config.locations, config.placement) == (32, ["ffn"], "parallel_residual")
    assert (config.non_linearity, config.use_bias, config.init_weights) == ("relu", False, "binary")
    assert (config.bneck_dropout, config.scaling) == (0.1, 1.0)
    assert config.peft_type == "PETL_BINARY"


def dense_lora(model, bits):
    weights = {}
    for i in range(3):
        for name in ("q_proj", "v_proj"):
            layer = model.base_model.model.model.layers[i].self_attn.get_submodule(name)
            A, B = (rounded(m["default"].weight, bits) for m in (layer.lora_A, layer.lora_B))
            key = f"model.layers.{i}.self_attn.{name}.weight"
            weights[key] = layer.base_layer.weight + 8 / 4 * B @ A
    return weights


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_over_lora_the_update_is_the_product_of_quantized_factors(batch, bits):
    model = stir(wrapped(**LORA, bits=bits))
    out = model.train()(**batch)  # all weights quantized together
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    expected = functional_call(tiny_llama(), dense_lora(model, bits), kwargs=batch)
    torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits(model.eval(), batch), out.logits, atol=1e-6, rtol=0)

    # gradients of the quantized weights: straight-through and through the statistics
    straight = model.eval()(**batch)  # quantized on each read
    straight.loss.backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4)


def test_over_mos_the_pool_is_quantized_before_routing(batch):
    model = stir(wrapped(**MOS))
    plain = petl.wrap(tiny_llama(), "mos", r=3, equivalent_rank=2).eval()
    pools = plain.base_model.shared["default"]
    with torch.no_grad():
        for name, pool in model.base_model.shared["default"].named_parameters():
            getattr(pools, name).copy_(rounded(pool, 1))
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=2e-5, rtol=0)
    A = model.base_model.model.model.layers[1].mlp.up_proj.adapters["default"].factors().A
    assert len(A.unique()) == 2
    torch.testing.assert_close(
        logits(model.merge_and_unload(), batch), logits(plain, batch), atol=2e-5, rtol=0
    )


def test_names_shapes_and_count_are_those_of_the_inner_method():
    ours, plain = wrapped(**MOS), petl.wrap(tiny_llama(), "mos", r=3, equivalent_rank=2)
    shapes = {name: p.shape for name, p in trained(ours).items()}
    assert shapes == {name: p.shape for name, p in trained(plain).items()}
    assert set(ours.state_dict()) == set(plain.state_dict())


def test_training_changes_latent_weights_and_keeps_two_effective_values(batch):
    for bits in (1, 2):
        model = train(wrapped(**LORA, bits=bits), batch)
        for latent, value in zip(trained(model).values(), effective(model), strict=True):
            assert len(latent.unique()) > 0.9 * latent.numel()
            assert len(value.unique()) <= 2**bits


def test_constant_weights_are_initialized_randomly_and_learn(batch):
    base = logits(tiny_llama(), batch)
    for fields in (LORA, MOS, {"init_weights": "zero_up", "r": 4}):
        model = wrapped(**fields)
        assert (logits(model, batch) - base).abs().max() < 0.05
        model(**batch).loss.backward()
        for name, p in trained(model).items():
            assert len(p.unique()) > 0.9 * p.numel(), name
            assert p.abs().max() <= 2e-3 or "A" in name or "down" in name
            assert p.grad.std() > 0, name


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ia3_l", {"inner": "ia3", "feedforward_modules": ["down_proj"]}),
        ("boft_s", {"inner": "boft", "boft_block_size": 8}),
    ],
)
def test_scales_are_initialized_randomly_around_one(batch, name, fields):
    model = wrapped(**fields, target_modules=["q_proj", "down_proj"])
    scales = [p for key, p in trained(model).items() if name in key]
    assert len(scales) == 6
    for p in scales:
        assert len(p.unique()) > 0.5 * p.numel()
        assert (p - 1).abs().max() <= 2e-3 + 1e-6
    assert (logits(model, batch) - logits(tiny_llama(), batch)).abs().max() < 0.05


def test_excluded_tensors_are_not_quantized(batch, tmp_path):
    model = stir(wrapped(inner="mola", exclude_params=["router"], num_experts=2, top_k=1))
    names = {quantized.name for quantized in quantizer_of(model).quantized_weights["default"]}
    assert names == {"lora_A", "lora_B"}
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {key.rpartition(".")[2] for key in tensors} == {
        *("lora_A_codes", "lora_A_stats", "lora_B_codes", "lora_B_stats", "router")
    }
    assert torch.equal(logits(petl.load(tiny_llama(), tmp_path), batch), logits(model, batch))


def test_weights_that_the_inner_method_freezes_are_not_quantized(batch):
    model = wrapped(**LORA, init_lora_weights="mica")  # trains one of the two factors
    quantized_weights = quantizer_of(model).quantized_weights["default"]
    assert {id(quantized.weight) for quantized in quantized_weights} == {
        id(p) for p in trained(model).values()
    }
    assert len(quantized_weights) == 6


def test_each_weight_is_quantized_once_in_a_training_forward(batch, monkeypatch):
    rows = []
    original = quantized_weights.quantize_each
    monkeypatch.setattr(
        quantized_weights, "quantize_each", lambda W, bits: rows.append(len(W)) or original(W, bits)
    )
    monkeypatch.setattr(
        quantized_weights, "quantize", lambda W, bits: pytest.fail("quantized where read")
    )
    model = wrapped(**MOS).train()
    model(**batch).loss.backward()
    shapes = {p.shape for p in trained(model).values()}
    assert len(rows) == len(shapes)  # once per pool, whatever the number of layers that share it
    assert sum(rows) == len(trained(model))


@pytest.mark.parametrize("fields", [LORA, MOS], ids=["lora", "mos"])
def test_reentrant_checkpoints_have_the_same_gradients(batch, fields):
    model, found = stir(wrapped(**fields)).train(), []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch).loss.backward()
        found.append([p.grad for p in trained(model).values()])
    torch.testing.assert_close(*found)


def test_evaluation_uses_the_current_weights_after_each_change(batch):
    model = stir(wrapped(**LORA))
    first = logits(model, batch)
    assert torch.equal(logits(model, batch), first)
    A = [p for name, p in trained(model).items() if "lora_A" in name]
    with torch.no_grad():
        for p in A:
            p.neg_()
    second = logits(model, batch)
    assert not torch.equal(second, first)
    for p in A:
        p.data = -p.data  # changes the data pointer but not the version
    assert torch.equal(logits(model, batch), first)


# Several adapters, precision, copies


def test_adapters_of_one_model_may_have_different_bits(batch, tmp_path):
    model = stir(wrapped(**LORA))
    one = logits(model, batch)
    model.add_adapter("second", petl.build_config("binary", **LORA, bits=4))
    model.set_adapter("second")
    stir(model)
    assert {
        len(v.unique()) for v in (s.read() for s in quantizer_of(model).quantized_weights["second"])
    } <= set(range(5, 17))
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), one)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
    model.delete_adapter("second")
    assert list(quantizer_of(model).quantized_weights) == ["default"]
    assert torch.equal(logits(model, batch), one)


def test_adapters_of_one_model_share_one_inner_method():
    model = wrapped(**LORA)
    with pytest.raises(InputError):
        model.add_adapter("second", petl.build_config("binary", **MOS))
    assert list(model.peft_config) == ["default"]


def test_latent_weights_in_half_precision_warn(batch):
    model = wrapped(**LORA).train()
    model.bfloat16()
    with pytest.warns(UserWarning, match="half precision"):
        model(**batch)


# The head


def test_head_is_quantized_without_bias_and_the_base_is_unchanged(tmp_path):
    batch = TINY_MODELS["bert"].batch()
    torch.manual_seed(0)
    model = petl.wrap(tiny_bert(), "binary", task_type="SEQ_CLS", r=4, head_bits=2).eval()
    stir(model)
    base = tiny_bert()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base, batch))
    wrapper = model.base_model.model.classifier
    latent = wrapper.modules_to_save["default"].weight
    assert wrapper.modules_to_save["default"].bias is None
    seen = []
    wrapper.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    scores = logits(model, batch)
    torch.testing.assert_close(scores, seen[0] @ rounded(latent, 2).T, atol=1e-6, rtol=0)
    model.train()(**batch).loss.backward()
    assert latent.grad.abs().sum() > 0

    model.eval().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    head = {k: t.shape for k, t in tensors.items() if "classifier" in k}
    assert head == {
        "base_model.model.classifier.weight_codes": (-(-64 * 5 * 2 // 8),),
        "base_model.model.classifier.weight_stats": (2,),
    }
    loaded = petl.load(tiny_bert(), tmp_path)
    assert torch.equal(logits(loaded, batch), scores)
    with petl.lifecycle(model).resumable():
        model.save_pretrained(tmp_path / "latent")
    resumed = petl.load(tiny_bert(), tmp_path / "latent", is_trainable=True)
    assert torch.equal(resumed.base_model.model.classifier.weight, latent)


def test_an_adapter_with_the_name_of_a_deleted_one_saves_its_own_head(tmp_path):
    fields = {"inner": "lora", "r": 4, "task_type": "SEQ_CLS"}
    model = petl.wrap(tiny_bert(), "binary", head_bits=1, **fields)
    plain = petl.build_config("binary", **fields)
    model.add_adapter("other", plain)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", plain)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    head = {key for key in load_file(tmp_path / WEIGHTS) if "classifier" in key}
    assert head == {f"base_model.model.classifier.{name}" for name in ("weight", "bias")}


def test_merging_turns_the_head_into_a_plain_layer():
    batch, base = TINY_MODELS["bert"].batch(), tiny_bert()
    nn.init.constant_(base.classifier.bias, 0.5)  # which a quantized head has not
    model = petl.wrap(
        base,
        "binary",
        inner="lora",
        task_type="SEQ_CLS",
        target_modules="block-linear",
        head_bits=1,
    ).eval()
    scores = logits(stir(model), batch)
    plain = model.merge_and_unload()
    assert type(plain.classifier) is nn.Linear
    torch.testing.assert_close(logits(plain, batch), scores, atol=2e-5, rtol=0)
    assert set(plain.state_dict()) == set(tiny_bert().state_dict())


# Errors


def test_unknown_fields_of_a_later_version_are_ignored_with_a_warning(tmp_path):
    model = wrapped(**LORA)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"unheard_of": 1,', 1))
    with pytest.warns(UserWarning, match="unheard_of"):
        loaded = petl.load(tiny_llama(), tmp_path)
    assert loaded.active_peft_config.r == model.active_peft_config.r
    with pytest.raises(InputError):
        petl.get("binary")(inner="lora", unheard_of=1)


def test_a_quantized_head_cannot_become_a_lora():
    model = petl.wrap(tiny_bert(), "binary", inner="lora", head_bits=1, r=2)
    assert not model.base_model.supports_lora_conversion()
    with pytest.raises(TypeError):
        convert_to_lora(model, rank=2)
    model.add_adapter("plain", petl.build_config("binary", inner="lora", r=2))
    assert convert_to_lora(model, rank=2, adapter_name="plain")


def test_a_training_state_has_the_weights_before_they_are_quantized(batch):
    fields = LORA | {"save_format": "packed"}
    model = train(wrapped(**fields), batch)
    state = {name: tensor.clone() for name, tensor in petl.lifecycle(model).state_dict().items()}
    other = wrapped(**fields)
    petl.lifecycle(other).load_state_dict(state)
    for one, two in zip(trained(model).values(), trained(other).values(), strict=True):
        assert torch.equal(one, two)
