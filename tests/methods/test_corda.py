"""CorDA's initialization, against its equations and against PEFT's, and its errors."""

import copy
import logging
import math
from typing import Any

import pytest
import torch
from corda_fixtures import TARGETS, R, batches, layers, moments, update, wrap
from peft import LoraConfig, convert_to_lora, get_peft_model
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import petl
from petl.errors import InputError
from petl.testing import tiny_gpt2, tiny_llama
from petl.testing.models import causal_batch

CONTRACT = {
    "fields": {"r": 4, "lora_alpha": 4},
    "refuses": (
        "switching_changes_outputs_and_what_trains",
        "adapters_do_not_disturb_each_other",
        "deleted_adapters_leave_no_tensor",
    ),
    "excused": {
        "config_survives_its_file": "what is saved is the LoRA that a CorDA adapter becomes",
        "resumed_training_equals_a_straight_run": "likewise",
        "disabled_adapters_give_the_base_model": "without it, the base is the residual weights",
        "merging_and_unmerging_change_nothing": "likewise",
        "unloading_gives_the_plain_model": "the pretrained weights come back, but for rounding",
    },
}

# Initialization


@pytest.mark.parametrize("norm", ["signed_max", "abs_max", "none"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [R, 2 * R])
def test_initialization_follows_the_equations(mode, alpha, norm):
    base = tiny_llama(2)
    model = wrap(corda_method=mode, lora_alpha=alpha, activation_norm=norm)
    scale = alpha / R
    for key, C in moments(base, batches(), norm).items():
        layer = layers(model)[key]
        W = base.get_submodule(key).weight.detach().double()
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        part = slice(0, R) if mode == "ipm" else slice(-R, None)
        expected = U[:, part] @ S[part].diag() @ (Vh[part] @ C.inverse())
        gap = (update(layer).double() - expected).abs().max()
        assert gap <= 2e-3 * expected.abs().max()
        B = layer.lora_B["default"].weight.double()
        # float32 rounds each singular value by a share of the largest one
        rounding = torch.finfo(torch.float32).eps * float(S[0])
        torch.testing.assert_close(scale * B.norm(dim=0) ** 2, S[part], rtol=1e-5, atol=rounding)
        values = torch.linalg.svdvals(update(layer).double() @ C)[:R]
        torch.testing.assert_close(values, S[part], rtol=2e-3, atol=1e-5 * float(S[0]))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_split_weights_add_up_and_the_model_is_unchanged(mode):
    base, batch = tiny_llama(2), causal_batch(3, 50)
    model = wrap(corda_method=mode)
    for key, layer in layers(model).items():
        W = base.get_submodule(key).weight
        torch.testing.assert_close(layer.base_layer.weight + update(layer), W, rtol=0, atol=1e-5)
        assert not torch.equal(layer.base_layer.weight, W)
    found, expected = model.eval()(**batch).logits, base.eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_initialization_equals_pefts_without_padding(mode):
    """PEFT supports one sample at a time and no padding; it divides by the number of samples."""
    reference = pytest.importorskip("peft.tuners.lora.corda", exc_type=ImportError)  # needs attrs
    data = [{"input_ids": torch.randint(3, 96, (1, 12))} for _ in range(6)]
    base: Any = tiny_llama(2)
    config = LoraConfig(
        r=R,
        lora_alpha=2 * R,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=PeftCordaConfig(corda_method=mode),
    )

    def run() -> None:
        for batch in data:
            base(**batch)

    reference.preprocess_corda(base, config, run_model=run)
    theirs: Any = get_peft_model(base, config)
    ours = layers(wrap(calibration=data, corda_method=mode, lora_alpha=2 * R))
    for key, layer in ours.items():
        other = theirs.get_base_model().get_submodule(key)
        torch.testing.assert_close(update(layer), update(other), rtol=0, atol=2e-5)
        torch.testing.assert_close(
            layer.base_layer.weight, other.base_layer.weight, rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear"}], ids=["none", "all"])
def test_every_linear_layer_of_the_blocks_is_adapted_by_default_and_by_all_linear(fields):
    found = layers(petl.wrap(tiny_llama(2), "corda", r=R, calibration=batches(), **fields))
    assert {key.rpartition(".")[2] for key in found} == set(TARGETS)
    assert len(found) == 14


def test_conv1d_layers_are_decomposed_in_their_orientation():
    base, batch = tiny_gpt2(), causal_batch(3, 50)
    targets = ["c_attn", "c_fc", "c_proj"]
    model = wrap(tiny_gpt2(), target_modules=targets, r=3)
    found, expected = model.eval()(**batch).logits, base.eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    layer = layers(model)["transformer.h.0.mlp.c_fc"]
    assert layer.lora_A["default"].weight.shape == (3, 64)
    assert layer.lora_B["default"].weight.shape == (96, 3)


def test_half_precision_base_is_decomposed_in_float32(caplog):
    caplog.set_level(logging.INFO)
    base = tiny_llama(2).bfloat16()
    model = wrap(copy.deepcopy(base))
    for key, layer in layers(model).items():
        W = base.get_submodule(key).weight.float()
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.base_layer.weight.dtype == torch.bfloat16
        gap = (layer.base_layer.weight.float() + update(layer) - W).abs().max()
        assert gap <= 5e-3 * W.abs().max()  # the rounding of the residual
    assert "W_res + s B A equals W up to" in caplog.text


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1)
        )
        bert = BertModel(BertConfig())
    for base, r, expected in ((llama, 128, 319_815_680 // 32), (bert, 8, 1_327_104)):
        model = petl.wrap(base, "corda", r=r, target_modules="block-linear")
        assert model.get_nb_trainable_parameters()[0] == expected


def test_each_layer_may_have_its_own_rank_and_alpha():
    base = tiny_llama(2)
    patterns = {"rank_pattern": {"down_proj": 9}, "alpha_pattern": {"up_proj": 20}}
    model = wrap(use_rslora=True, **patterns)
    for key, layer in layers(model).items():
        rank = 9 if "down_proj" in key else R
        alpha = 20 if "up_proj" in key else R
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / math.sqrt(rank))
        W = base.get_submodule(key).weight
        torch.testing.assert_close(layer.base_layer.weight + update(layer), W, rtol=0, atol=1e-5)


# CorDA++


def test_the_best_of_several_covariances_is_used():
    base, data = tiny_llama(2), batches(6)
    keys = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    singles = [moments(base, data[n::3], "signed_max") for n in range(3)]
    found = layers(wrap(calibration=data, num_covariance_rounds=3, covariance_dtype="float64"))
    for key in keys:
        W = base.get_submodule(key).weight.detach().double()
        merits, updates = [], []
        for C in (single[key] for single in singles):
            C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
            values = torch.linalg.eigvalsh(C)
            pi = math.sqrt(len(W) * values[-1]) / values[0]
            U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
            merits.append(math.log(pi) * float(S.sum() / S[0]))
            updates.append(U[:, :R] @ S[:R].diag() @ Vh[:R] @ C.inverse())
        best = updates[merits.index(min(merits))]
        torch.testing.assert_close(update(found[key]).double(), best, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 2 * R**0.5)])
def test_a_rank_budget_is_distributed_greedily_at_one_scale(rslora, scale):
    base, data = tiny_llama(2), batches(12)
    budget, alpha = 6000, 2 * R
    fields = {"corda_method": "kpm", "rank_budget": budget, "use_rslora": rslora}
    model = wrap(calibration=data, lora_alpha=alpha, **fields)
    spectra, logs, cost = {}, {}, {}
    for key, C in moments(base, data, "signed_max").items():
        W = base.get_submodule(key).weight.detach().double()
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        values = torch.linalg.eigvalsh(C)
        logs[key] = math.log(math.sqrt(len(W) * values[-1]) / values[0])
        spectra[key] = torch.linalg.svdvals(W @ C).tolist()
        cost[key] = sum(W.shape)
    ranks = dict.fromkeys(spectra, 1)
    while sum(ranks[k] * cost[k] for k in ranks) <= budget:

        def next_one(key):
            S, r = spectra[key], ranks[key]
            return logs[key] * S[-r] / sum(S[: len(S) - r])

        ranks[min(ranks, key=next_one)] += 1
    found = {key: len(layer.lora_A["default"].weight) for key, layer in layers(model).items()}
    assert found == ranks
    assert len(set(ranks.values())) > 1
    scales = [layer.scaling["default"] for layer in layers(model).values()]
    assert scales == pytest.approx([scale] * len(scales))
    for key, layer in layers(model).items():
        W = base.get_submodule(key).weight
        torch.testing.assert_close(layer.base_layer.weight + update(layer), W, rtol=0, atol=1e-5)


# Errors


class Quantized(nn.Linear):
    """A linear layer with a quantized weight."""

    def __init__(self) -> None:
        super().__init__(64, 64, bias=False)
        codes = torch.zeros(64, 64, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)


def quantized() -> nn.Module:
    model: Any = tiny_llama(2)
    model.model.layers[0].self_attn.q_proj = Quantized()
    return model


class Idle(nn.Module):
    """A network with a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def wrap_infinite():
    base: Any = tiny_llama(2)
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    wrap(base)


def wrap_tied():
    base: Any = tiny_llama(2)
    base.lm_head.weight = base.model.embed_tokens.weight
    wrap(base, target_modules=["lm_head"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        # layers that the data never reach, or with zeros only
        (
            lambda: wrap(Idle(), [{"x": torch.randn(4, 8)}], target_modules=["used", "idle"], r=2),
            "idle",
        ),
        (lambda: wrap(Idle(), [{"x": torch.zeros(4, 8)}], target_modules=["used"], r=2), "used"),
        (wrap_infinite, "up_proj"),
        (wrap_tied, "lm_head .*embed_tokens"),
        (lambda: wrap(quantized()), r"model\.quantization"),
    ],
)
def test_layers_that_have_no_start_raise(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_corda_adapter_is_not_converted_relative_to_the_residual_weights():
    model = wrap()
    assert not model.base_model.supports_lora_conversion()
    with pytest.raises(TypeError):
        convert_to_lora(model, rank=R)


def test_a_reference_adapter_as_dpo_adds_it_is_refused_with_the_remedy(caplog):
    with caplog.at_level(logging.INFO):
        model = wrap()
    assert "ref_model= in TRL" in caplog.text
    with pytest.raises(InputError):
        model.add_adapter("ref", model.peft_config["default"])
