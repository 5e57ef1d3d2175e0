import math

import pytest
import torch
from adapter_fixtures import adapters
from peft import PeftModel, get_peft_model_state_dict
from tiny_families import FAMILIES, Family, K
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN

import petl
from petl import testing
from petl.errors import InputError

CONTRACT = {
    "fields": {"r": 8},
    "lr": 0.1,
    "acts_with": {
        "reduction_factor": {"r": None, "reduction_factor": 4},
        "input_modules": {
            "placement": "parallel",
            "target_modules": ["o_proj"],
            "input_modules": {"o_proj": "o_proj"},
        },
    },
}

VARIANTS = {
    "compacter": {},
    "rank-3": {"phm_rank": 3},
    "phm": {"factorized_phm": False, "shared_phm_rule": False},
    "free-shared": {"factorized_phm": False},
    "own-rules": {"shared_phm_rule": False},
    "factored-rule": {"factorized_phm_rule": True},
    "factored-own-rules": {"factorized_phm_rule": True, "shared_phm_rule": False},
    "lowrank": {"projection": "lowrank", "phm_rank": 2},
    "no-bias": {"use_bias": False},
}
POOL = "petl_compacter_pools"


def wrapped(name: str, **fields) -> PeftModel:
    return petl.wrap(FAMILIES[name].build(), "compacter", **{"r": 8, **fields}).eval()


def shared(model: PeftModel, adapter_name: str = "default") -> nn.Module:
    return model.base_model.shared[adapter_name]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def stir(model: PeftModel, std: float = 0.4) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=std)
    return model


def dense(model: PeftModel, adapter: nn.Module, side: str) -> Tensor:
    """H of one projection as the sum of Kronecker products that the paper writes."""
    config = model.active_peft_config
    if config.projection == "lowrank":
        return getattr(adapter, f"{side}_left") @ getattr(adapter, f"{side}_right")
    owner, prefix = (shared(model), "") if config.shared_phm_rule else (adapter, f"{side}_")
    if config.factorized_phm_rule:
        rules = getattr(owner, f"{prefix}rule_left") @ getattr(owner, f"{prefix}rule_right")
    else:
        rules = getattr(owner, f"{prefix}rule")
    total = torch.zeros(())
    for n in range(config.phm_dim):
        if config.factorized_phm:
            B = getattr(adapter, f"{side}_left")[n] @ getattr(adapter, f"{side}_right")[n]
        else:
            B = getattr(adapter, f"{side}_weight")[n]
        total = total + torch.kron(rules[n], B)
    return total


def by_hand(plain: nn.Module, model: PeftModel, family: Family) -> nn.Module:
    """An unwrapped model with hooks that compute the dense formula of the wrapped one."""

    def hook_for(adapter: nn.Module):
        down, up = (dense(model, adapter, side) for side in ("down", "up"))
        biases = [getattr(adapter, f"{side}_bias", 0.0) for side in ("down", "up")]

        def hook(module, args, y):
            return y + F.gelu(y @ down + biases[0], approximate="tanh") @ up + biases[1]

        return hook

    for path, adapter in adapters(model).items():
        plain.get_submodule(path).register_forward_hook(hook_for(adapter))
    return plain


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_every_variant_equals_hooks_with_dense_kronecker_sums(name, variant):
    family = FAMILIES[name]
    model = stir(wrapped(name, **VARIANTS[variant]))
    batch = family.batch()
    with torch.no_grad():
        plain = family.outputs(family.build(), **batch)
        expected = family.outputs(by_hand(family.build(), model, family), **batch)
        found = family.outputs(model, **batch)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "gpt2", "vit", "dinov2", "ast", "wav2vec2", "whisper"])
def test_decoders_encoder_decoders_images_and_audio_are_adapted_at_their_sublayers(name):
    family = FAMILIES[name]
    model = stir(wrapped(name))
    sites = {part[1] for part in family.parts() if part[0] in ("attn", "ffn")}
    assert set(adapters(model)) == sites
    batch = family.batch()
    expected = family.outputs(by_hand(family.build(), model, family), **batch)
    torch.testing.assert_close(family.outputs(model, **batch), expected, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Count the elements of the largest tensor that is created inside the block."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.found = max(self.found, *sizes, 0)
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_kronecker_product_is_materialized_in_forward_or_backward(variant):
    width, bottleneck = 512, 128
    base = nn.ModuleDict({"wide": nn.Linear(4, width)})
    fields = {"r": bottleneck, "target_modules": ["wide"], **VARIANTS[variant]}
    (adapter,) = adapters(petl.wrap(base, "compacter", **fields)).values()
    h = torch.randn(1, width, requires_grad=True)
    with Largest() as largest:
        adapter.network(h).sum().backward()
    # of variants with full B, the weight's own gradient; else a few vectors of the width
    allowed = width * bottleneck // 4 if hasattr(adapter, "down_weight") else 8 * width
    assert width <= largest.found <= allowed


def test_placements_are_those_of_the_bottleneck_adapter():
    """Parallel: the network reads the sub-layer's input and is added to its output."""
    family = FAMILIES["llama"]
    model = stir(wrapped("llama", placement="parallel", locations=["ffn"], scaling=0.5))
    seen = {}

    def listen(module, args):
        seen["h"] = args[0]

    def hook_for(adapter):
        down, up = (dense(model, adapter, side) for side in ("down", "up"))

        def hook(module, args, y):
            z = F.gelu(seen["h"] @ down + adapter.down_bias, approximate="tanh")
            return y + 0.5 * (z @ up + adapter.up_bias)

        return hook

    plain = family.build()
    for path, adapter in adapters(model).items():
        plain.get_submodule(path).register_forward_hook(hook_for(adapter))
        mlp = plain.get_submodule(path.removesuffix(".down_proj"))
        mlp.register_forward_pre_hook(listen)
    expected, found = (family.outputs(m, **family.batch()) for m in (plain, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_non_linearity_names_the_activation():
    (adapter, *_) = adapters(wrapped("bert")).values()
    z = torch.linspace(-9, 9, 1001)
    torch.testing.assert_close(adapter.act(z), ACT2FN["gelu_new"](z), atol=1e-6, rtol=1e-6)


# Counts


PUBLISHED = [
    ("compacter", "compacter", {}, 161_728),
    ("compacter++", "compacter", {"locations": ["ffn"]}, 104_704),
    (
        "phm-adapter",
        "compacter",
        {"factorized_phm": False, "shared_phm_rule": False, "phm_dim": 12},
        398_976,
    ),
    ("low rank", "compacter", {"projection": "lowrank"}, 161_664),
    ("dense bottleneck", "adapter", {"r": 24}, 1_855_104),
    ("dense, attention", "adapter", {"r": 24, "locations": ["attn"]}, 951_360),
]


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("method", "fields", "expected"), [row[1:] for row in PUBLISHED], ids=[r[0] for r in PUBLISHED]
)
def test_parameter_counts_are_the_published_ones(method, fields, expected):
    config = T5Config(d_model=768, d_kv=2, d_ff=4, num_layers=12, num_heads=2, vocab_size=10)
    with torch.device("meta"):
        base = T5ForConditionalGeneration(config)
    assert count(petl.wrap(base, method, train_layer_norms=True, **fields)) == expected


def test_count_of_llama_2_7b():
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=8,
        vocab_size=10, head_dim=128,
    )  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    assert count(petl.wrap(base, "compacter")) == 811_072


def test_default_locations_in_t5_leave_out_cross_attention():
    ends = {
        kinds: sorted(
            ".".join(path.split(".")[-2:])
            for path in adapters(wrapped("t5", locations=list(kinds)))
        )
        for kinds in (("attn", "ffn"), ("ffn",))
    }
    assert ends["attn", "ffn"] == ["DenseReluDense.wo"] * 4 + ["SelfAttention.o"] * 4
    assert ends["ffn",] == ["DenseReluDense.wo"] * 4


# The shared rule


def test_the_shared_rule_is_stored_and_saved_once():
    model = wrapped("t5")
    named = [n for n, _ in model.named_parameters(remove_duplicate=False) if "rule" in n]
    assert named == [f"base_model.{POOL}.default.rule"]
    assert [n for n in model.state_dict() if "rule" in n] == named
    saved = get_peft_model_state_dict(model)
    assert [n for n in saved if "rule" in n] == [f"base_model.{POOL}.rule"]
    assert shared(model).rule.shape == (4, 4, 4)


def test_the_gradient_of_the_rule_is_the_sum_over_locations_and_projections():
    family, batch = FAMILIES["bert"], FAMILIES["bert"].batch()
    one = stir(wrapped("bert"))
    apart = wrapped("bert", shared_phm_rule=False)
    with torch.no_grad():
        for path, adapter in adapters(apart).items():
            for name, parameter in adapter.named_parameters():
                own = "rule" in name
                source = shared(one).rule if own else getattr(adapters(one)[path], name)
                parameter.copy_(source)
    for model in (one, apart):
        family.outputs(model, **batch).square().sum().backward()
    parts = [
        getattr(a, f"{side}_rule").grad for a in adapters(apart).values() for side in ("down", "up")
    ]
    assert len(parts) == 8
    torch.testing.assert_close(shared(one).rule.grad, sum(parts), rtol=1e-4, atol=1e-4)


def test_a_frozen_rule_does_not_train(tmp_path):
    free, frozen = wrapped("bert"), wrapped("bert", learn_phm=False)
    assert count(free) - count(frozen) == 4**3
    assert shared(frozen).rule.any()
    frozen.add_adapter("second", petl.build_config("compacter", r=8, learn_phm=False))
    frozen.set_adapter("second")  # PEFT makes the adapter it switches to trainable
    frozen.set_adapter("default")
    assert not any("rule" in n for n, p in frozen.named_parameters() if p.requires_grad)
    frozen.delete_adapter("second")
    frozen.save_pretrained(tmp_path)
    again = petl.load(FAMILIES["bert"].build(), tmp_path)
    assert torch.equal(shared(again).rule, shared(frozen).rule)


@pytest.mark.parametrize("fields", [{}, {"projection": "lowrank", "phm_rank": 2}])
def test_the_heat_map_shows_the_norm_of_the_projections(fields):
    model = stir(wrapped("bert", r=8, **fields))
    (shown,) = petl.lifecycle(model).heat_maps()
    numbers = sorted(cell for row in shown.cells for cell in row if cell is not None)
    expected = []
    for adapter in adapters(model).values():
        product = dense(model, adapter, "down") @ dense(model, adapter, "up")
        expected.append(float(product.detach().norm()) / K**0.5)
    assert numbers == pytest.approx(sorted(expected), rel=1e-4)


def test_each_adapter_has_its_own_rule():
    family, batch = FAMILIES["bert"], FAMILIES["bert"].batch()
    model = stir(wrapped("bert"))
    first = family.outputs(model, **batch)
    model.add_adapter("second", petl.build_config("compacter", r=8))
    model.set_adapter("second")
    stir(model)
    assert not torch.equal(family.outputs(model, **batch), first)
    assert [n for n, p in model.named_parameters() if "rule" in n and p.requires_grad] == [
        f"base_model.{POOL}.second.rule"
    ]
    model.set_adapter("default")
    model.delete_adapter("second")
    assert set(model.base_model.shared) == {"default"}
    assert torch.equal(family.outputs(model, **batch), first)


# Initialization and precision


def test_initial_values_have_the_expected_distributions():
    def start(**fields) -> PeftModel:
        torch.manual_seed(0)
        fresh = nn.ModuleDict({"wide": nn.Linear(64, 4096)})
        fields = {"r": 1024, "phm_dim": 16, "target_modules": ["wide"], **fields}
        return petl.wrap(fresh, "compacter", **fields)

    model = start()  # K 4096, D 1024, N 16: each term of down is 256 to 64, of up 64 to 256
    adapter = adapters(model)["wide"]
    for name, rows, columns in (
        ("down_left", 256, 1),
        ("down_right", 1, 64),
        ("up_left", 64, 1),
        ("up_right", 1, 256),
    ):
        bound, values = math.sqrt(12 / (rows + columns)), getattr(adapter, name)
        assert 0.98 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    assert shared(model).rule.std().item() == pytest.approx(1e-4, rel=0.05)
    free = adapters(start(factorized_phm=False))["wide"].down_weight
    assert 0.98 * math.sqrt(12 / 320) < free.abs().max() <= math.sqrt(12 / 320)
    own = adapters(start(shared_phm_rule=False))["wide"]
    for rule in (own.down_rule, own.up_rule):
        assert rule.std().item() == pytest.approx(0.01, rel=0.05)
    normal = adapters(start(w_init="glorot-normal", factorized_phm=False))["wide"].up_weight
    assert normal.std().item() == pytest.approx(math.sqrt(2) * math.sqrt(2 / 320), rel=0.02)
    plain = adapters(start(w_init="normal", phm_init_range=0.3, factorized_phm=False))["wide"]
    assert plain.up_weight.std().item() == pytest.approx(0.3, rel=0.02)
    uniform = shared(start(phm_c_init="uniform")).rule
    assert 0.98 < uniform.max() <= 1
    assert -1 <= uniform.min() < -0.98
    low = adapters(start(projection="lowrank", phm_dim=4))["wide"]
    assert low.down_left.shape == (4096, 1)
    assert low.down_left.abs().max() <= math.sqrt(12 / 4097)


@pytest.mark.parametrize("name", ["t5", "bert", "llama", "ast"])
def test_initial_outputs_are_close_to_the_base_but_not_equal(name):
    family, batch = FAMILIES[name], FAMILIES[name].batch()
    found, base = (family.outputs(m, **batch) for m in (wrapped(name), family.build()))
    assert (found - base).abs().max() <= 1e-4
    adapter = next(iter(adapters(wrapped(name)).values()))
    h = torch.randn(1, K)
    assert 0 < adapter.network(h).abs().max() < 1e-6


# Behavior


def test_reentrant_checkpointing_in_several_processes_raises(monkeypatch):
    base = testing.tiny_bert()
    model = petl.wrap(base, "compacter", r=8, task_type="SEQ_CLS").train()
    batch = testing.TINY_MODELS["bert"].batch(2, 0)
    monkeypatch.setattr("petl.methods.compacter.num_processes", lambda: 2)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(InputError):
        model(**batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()


def test_lowrank_projections_need_no_width_that_divides():
    petl.wrap(FAMILIES["bert"].build(), "compacter", projection="lowrank", r=6)


@pytest.mark.parametrize(("factor", "r"), [(2, 16), (3, 8), (32, 4)])
def test_reduction_factor_gives_a_width_divisible_by_the_terms(factor, r):
    config = petl.build_config("compacter", reduction_factor=factor)
    assert config.bottleneck(32) == r
    petl.wrap(FAMILIES["bert"].build(), "compacter", reduction_factor=factor)
