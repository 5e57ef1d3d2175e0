"""The density term with methods and models; experts, files, errors."""

import copy
import json
import pickle

import pytest
import torch
from density_cases import (
    EPS,
    assert_same,
    batch_of,
    dense,
    gradients,
    llama,
    lora,
    lora_on_attention,
    mixtral,
    written_out,
)
from hydra import compose, initialize_config_dir
from mixtures import mixture
from omegaconf import OmegaConf
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError
from petl.methods.losses.density import ActivationDensity, ActivationDensityConfig
from petl.system.settings.command_line import config_dir

# With methods


def added(model, batch):
    """Attach the term after asserting that its loss and gradients equal explicit sums."""
    total, expected, value, _ = written_out(model, batch, weight=3.0)
    term = dense(model, weight=3.0)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    torch.testing.assert_close(term.loss, value)
    loss.backward()
    assert_same(gradients(model), expected)
    return term


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["lora", "mola", "sparse"])
def test_it_composes_with_methods(name, method):
    """The gradient is the method's own, including its auxiliary loss, plus that of the term."""
    batch = testing.TINY_MODELS[name].batch()
    model = testing.Case(method, name, {"total_step": 9} if method == "sparse" else {}).wrap()
    testing.stir(model)
    term = added(model, batch)
    lifecycle = petl.lifecycle(model)
    own = model.base_model.aux_loss() if method == "mola" else 0.0
    torch.testing.assert_close(lifecycle.aux_loss(), 3.0 * term.loss + own)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("adapter", {"placement": "parallel"}),
        ("adapter", {"placement": "parallel_residual"}),
        ("binary", {"bneck_dropout": 0.0}),  # AdaptFormer, which reads the residual stream
    ],
)
def test_it_composes_with_adapters_that_read_another_module(name, method, fields):
    """Their layers cannot be called alone to measure what a neuron adds to the output."""
    batch = testing.TINY_MODELS[name].batch()
    model = testing.Case(method, name, fields).wrap_stirred()
    term = added(model, batch)
    found = term.ppl_sparsity([batch], p=10.0)
    assert found["ppl_sparse"] <= 1.1 * found["ppl_dense"] * (1 + 1e-6)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_it_composes_with_prompts(config):
    """The base model then has more tokens, or a longer mask, than the batch."""
    batch = batch_of("llama-relu")
    torch.manual_seed(1)
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    total, expected, _, _ = written_out(model, batch)
    dense(model)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    loss.backward()
    assert_same(gradients(model), expected)
    model.activation_density.remove()
    term, seen = dense(model, mask_padding=True), []
    for layer in model.get_base_model().model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda m, a, out: seen.extend(out))
    metrics = term.report([batch])
    fractions = []
    for a, mask in zip(
        seen, 2 * list(batch["attention_mask"]), strict=False
    ):  # of the first forward
        in_front = torch.ones(len(a) - len(mask), dtype=mask.dtype)
        fractions.append(float((a[torch.cat([in_front, mask]).bool()] != 0).float().mean()))
    assert metrics["density"] == pytest.approx(sum(fractions) / len(fractions))
    assert 0 <= metrics["ppl_1_sparsity"] <= 1


def test_it_follows_the_adapter_that_is_active():
    model, batch = lora(llama()), batch_of("llama-relu")
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("other")
    testing.stir(model, "other", seed=5)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = written_out(model, batch)[1:3]
    assert abs(expected["default"][1] - expected["other"][1]) > 1e-3
    term = dense(model)
    for name, (along, value) in expected.items():
        model.set_adapter(name)
        model.train()(**batch).loss.backward()
        torch.testing.assert_close(term.loss, value)
        assert_same(gradients(model), along)


def test_generation_is_unchanged():
    model = lora(llama(), "CAUSAL_LM")
    prompt = {"input_ids": batch_of("llama-relu")["input_ids"][:, :5], "max_new_tokens": 4}
    expected = model.generate(**prompt, do_sample=False)
    term = dense(model)
    assert torch.equal(model.generate(**prompt, do_sample=False), expected)
    assert term.loss is None


def test_an_unloaded_model_has_no_term():
    model, batch = lora(llama()), batch_of("llama-relu")
    dense(model)
    merged = model.merge_and_unload().requires_grad_(True)
    expected = merged.eval()(**batch).loss
    torch.testing.assert_close(merged.train()(**batch).loss, expected)


def test_wrap_puts_the_term_on_the_method_named():
    batch = batch_of("llama-relu")
    torch.manual_seed(1)
    model = petl.wrap(
        llama(), "density", method="mola", method_config={"r": 2}, weight=2.0, eps=EPS
    )
    assert isinstance(model, PeftModel)
    assert model.active_peft_config.r == 2
    assert isinstance(model.activation_density, ActivationDensity)
    loss, task = model.train()(**batch).loss, model.eval()(**batch).loss
    lifecycle = petl.lifecycle(model)
    model.train()(**batch)
    balance = model.base_model.aux_loss()
    torch.testing.assert_close(loss, task + 2.0 * model.activation_density.loss + balance)
    torch.testing.assert_close(lifecycle.aux_loss(), 2.0 * model.activation_density.loss + balance)


def test_trainable_parameters_are_those_of_the_method():
    fields = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    plain = petl.wrap(llama(), "lora", **fields)
    model = petl.wrap(llama(), "density", method="lora", method_config=fields)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_it_is_registered_as_density_only():
    assert petl.list_losses() == ["density", "distill", "nested"]
    assert petl.get("density") is ActivationDensityConfig
    assert "deft" not in petl.list_methods()
    with pytest.raises(InputError):
        petl.wrap(llama(), "deft")
    model = petl.wrap(llama(), "density")
    assert model.active_peft_config.peft_type == "LORA"


@pytest.mark.parametrize(
    ("overrides", "method", "weight"),
    [
        (["+method=mola", "+loss=density", "loss.weight=2"], "mola", 2),
        (["+method=deft"], "lora", 1.0),
    ],
)
def test_the_command_line_composes_method_and_term(overrides, method, weight):
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        cfg = compose("train", overrides=overrides)
    assert cfg.method.name == method
    config = petl.losses.read(OmegaConf.to_container(cfg.loss))
    assert config == ActivationDensityConfig(weight=weight)
    fields = OmegaConf.to_container(cfg.method)
    fields.pop("target_modules")
    model = petl.wrap(llama(), fields.pop("name"), target_modules=["q_proj", "v_proj"], **fields)
    term = petl.losses.attach(model, config)
    assert term is model.activation_density
    assert petl.losses.attach(model, petl.losses.read(None)) is None
    metrics = petl.lifecycle(model).report([batch_of("llama-relu")])
    assert set(metrics) == {"density", "ppl_1_sparsity"}


# Experts, files, errors


def test_experts_count_by_their_tokens():
    """Each expert is called with the tokens routed to it; a layer's mean is over all of them."""
    model, seen, batch = lora_on_attention(mixtral()), {}, batch_of("llama-relu")
    for i, layer in enumerate(model.base_model.model.model.layers):
        layer.mlp.experts.act_fn.register_forward_hook(
            lambda m, a, out, i=i: seen.setdefault(i, []).append(out)
        )
    term = dense(model)
    model.train()(**batch)
    assert len({len(a) for a in seen[0]}) > 1
    layers = []
    for calls in seen.values():
        a = torch.cat(calls)
        layers.append((a**2 / (a**2 + EPS)).mean())
    torch.testing.assert_close(term.loss, sum(layers).detach() / 2)


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("gpt_oss", "activation"),
        ("jetmoe", "activation"),
        ("deepseek_v3", "down_input"),  # dense layers and shared experts have it
        ("aria", "down_input"),
    ],
)
def test_experts_that_cannot_be_counted_are_refused_and_never_left_out(name, signal):
    model = petl.wrap(mixture(name), "lora", target_modules="block-linear")
    with pytest.raises(InputError):
        dense(model, signal=signal)
    named = dense(model, signal=signal, activation_modules=["model.layers.1.input_layernorm"])
    assert len(named.sites.layers) == 1


@pytest.mark.parametrize("method", ["lora", "mola"])
@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron_h", "longcat_flash", "llama4"])
def test_experts_count_beside_dense_layers_under_each_method(name, method):
    model = petl.wrap(mixture(name), method, target_modules="experts")
    counted = set(dense(model).sites.layers)
    inside = model.get_base_model().named_modules()
    experts = {n for n, _ in inside if n.endswith(".act_fn") and ".experts." in n}
    assert experts
    assert experts <= counted


def test_the_adapter_file_is_unchanged_and_the_metrics_are_in_density_json(tmp_path):
    model, batch = lora(llama()), batch_of("llama-relu")
    term = dense(model, weight=2.0)
    term.report([batch])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "density.json").read_text())
    assert saved["weight"] == 2.0
    assert saved["eps"] == EPS
    assert saved["activation_modules"] == [f"model.layers.{i}.mlp.act_fn" for i in range(2)]
    assert set(saved["measured"]) == {"density", "ppl_1_sparsity"}
    assert not {"method", "method_config"} & set(saved)  # adapter_config.json has them
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(testing.logits(loaded, batch), testing.logits(model, batch))
    assert not hasattr(loaded, "activation_density")
    model.train()(**batch)  # training discards earlier measurements
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "density.json").read_text())["measured"] == {}


def test_remove_restores_the_model():
    model = lora(llama())
    hooks = testing.switching.hooks_of(model)
    term = dense(model)
    with pytest.raises(InputError):
        dense(model)
    term.remove()
    assert testing.switching.hooks_of(model) == hooks
    assert not petl.lifecycle(model).parts
    assert model.save_pretrained.__self__ is model
    batch = batch_of("llama-relu")
    torch.testing.assert_close(model.train()(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_their_own_term(way):
    model, batch = lora(llama()), batch_of("llama-relu")
    dense(model)
    loss = model.train()(**batch).loss.detach()
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert twin.activation_density is not model.activation_density
    assert twin.activation_density.model is twin
    model.activation_density.loss = None
    torch.testing.assert_close(twin.train()(**batch).loss.detach(), loss)
    assert model.activation_density.loss is None
    twin.activation_density.remove()
    torch.testing.assert_close(model(**batch).loss.detach(), loss)


def test_a_model_without_nonlinearities_in_blocks_raises_with_candidates():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.nonlinearity, self.last = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.nonlinearity(self.first(x)))

    model = get_peft_model(Plain(), LoraConfig(target_modules=["first"]))
    with pytest.raises(InputError, match="available: nonlinearity"):
        dense(model)
    assert list(dense(model, activation_modules=["nonlinearity"]).sites.layers) == ["nonlinearity"]


def test_pooler_and_heads_are_no_mlp():
    term = dense(lora(testing.tiny_bert()))
    assert list(term.sites.layers) == [
        f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(2)
    ]


def test_a_fused_kernel_that_bypasses_the_modules_raises():
    model, batch = lora(llama()), batch_of("llama-relu")
    dense(model)
    for layer in model.base_model.model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x))
    with pytest.raises(UnsupportedError):
        model.train()(**batch)
    model.eval()(**batch)
