"""What a training pass calls, and that no adapter is put where it would not compute."""

import logging

import pytest
import torch
from decoder_fixtures import bart
from torch import nn
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import petl
from petl import testing
from petl.core.model.calls import IDLE, READ, Calls, calls_of, uncalled
from petl.core.model.linear import is_linear, linear_names

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama4():
    sizes = {**SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, num_experts_per_tok=1))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def phimoe():
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=4))


def deepseek_v4():
    few = {"num_key_value_heads": 1, "head_dim": 16, "n_routed_experts": 4, "o_groups": 2}
    sizes = {**SIZES, **few, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    ranks = {"q_lora_rank": 16, "o_lora_rank": 8, "qk_rope_head_dim": 8}
    return DeepseekV4ForCausalLM(DeepseekV4Config(**sizes, **ranks))


def qwen3_moe():
    sizes = {**SIZES, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=2))


def mamba():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(**sizes, state_size=4))


def jamba():
    where = {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1}
    sizes = {**SIZES, **where, "expert_layer_period": 2, "num_experts": 4, "mamba_d_state": 4}
    return JambaForCausalLM(JambaConfig(**sizes))


def after_a_step(model) -> list[str]:
    """Return the trained tensors without a gradient after a training pass."""
    tokens = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def adapted(model) -> set[str]:
    return {n.removeprefix("base_model.model.") for n in testing.tuner_layers(model)}


@pytest.mark.cells(1)
@pytest.mark.parametrize("method", ["lora", "mola"])
@pytest.mark.parametrize("build", [llama4, phimoe, deepseek_v4])
def test_a_preset_takes_no_layer_that_computes_something_else(build, method):
    base = build()
    others = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and not is_linear(m)]
    assert others
    model = petl.wrap(base, method, target_modules="block-linear")
    assert not adapted(model) & set(others)
    # the compressor of DeepSeek-V4 reads windows that are longer than these texts
    assert [name for name in after_a_step(model) if "compressor" not in name] == []


@pytest.mark.parametrize("method", ["mola", "loha"])
def test_a_layer_that_computes_something_else_is_refused_by_name(method):
    with pytest.raises(petl.errors.ModuleKindError, match="PhimoeTopKRouter"):
        petl.wrap(phimoe(), method, target_modules=["router"])


@pytest.mark.parametrize("build", [phimoe, llama4])
def test_a_lora_adapts_the_weight_of_a_router_that_computes_something_else(build):
    assert after_a_step(petl.wrap(build(), "lora", r=2, target_modules="router")) == []


def test_pefts_all_linear_takes_no_layer_that_computes_something_else():
    assert after_a_step(petl.wrap(llama4(), "lora", target_modules="all-linear")) == []


def test_a_subclass_that_computes_as_a_linear_layer_is_one():
    base = FalconForCausalLM(
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    assert len(linear_names(base)) == 4  # FalconLinear has a forward of its own
    with torch.device("meta"):
        assert is_linear(base.transformer.h[0].mlp.dense_h_to_4h)


@pytest.mark.parametrize("method", ["lora", "mola", "pst"])
@pytest.mark.parametrize("build", [mamba, jamba, bart])
def test_every_tensor_of_the_default_targets_gets_a_gradient(build, method):
    base = build()
    left_out = uncalled(base, linear_names(base))
    model = petl.wrap(base, method)
    assert left_out
    assert not adapted(model) & left_out.keys()
    assert after_a_step(model) == []


def test_a_pass_tells_read_from_not_called():
    assert set(uncalled(mamba(), linear_names(mamba())).values()) == {READ}
    whys = uncalled(bart(), linear_names(bart()))
    assert set(whys.values()) == {IDLE}
    assert all("encoder_attn" in name for name in whys)
    assert len(whys) == 8


def test_a_named_target_that_is_read_without_a_call_is_refused():
    for base, method, targets in (
        (mamba(), "pst", ["in_proj", "dt_proj"]),
        (jamba(), "lora", r".*dt_proj"),
    ):
        with pytest.raises(petl.errors.ModuleKindError, match="dt_proj"):
            petl.wrap(base, method, target_modules=targets)


def test_a_name_that_also_means_layers_without_a_call_adapts_the_others(caplog):
    model = petl.wrap(bart(), "lora", target_modules=["q_proj", "v_proj"])
    assert len(adapted(model)) == 4
    assert "no adapter on model.decoder.layers.*.encoder_attn." in caplog.text
    # a pass with the states of an encoder calls them: named alone, they are adapted
    model = petl.wrap(bart(), "lora", target_modules=["encoder_attn.q_proj"])
    assert len(adapted(model)) == 2
    assert "encoder_attn.q_proj may not train" in caplog.text


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear"}])
def test_mamba_has_default_targets_although_peft_refuses_some(fields):
    assert adapted(petl.wrap(mamba(), "lora", **fields)) == {
        f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("in_proj", "x_proj")
    }


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "oft", "vera", "ia3"])
@pytest.mark.parametrize("build", [qwen3_moe, jamba, phimoe, mixtral])
def test_default_targets_exist_for_types_that_peft_does_not_know(build, method):
    assert after_a_step(petl.wrap(build(), method)) == []


def test_the_names_of_tutorials_reach_experts_where_peft_does(tmp_path):
    model = petl.wrap(qwen3_moe(), "lora", target_modules=SEVEN)
    stacks = {f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")}
    assert set(model.active_peft_config.target_parameters) == stacks
    assert after_a_step(model) == []
    # two branches stand in gate_up_proj, so PEFT gives it twice the rank
    model.save_pretrained(tmp_path)
    loaded = petl.load(qwen3_moe(), tmp_path, other_base=True)
    assert loaded.active_peft_config.rank_pattern == {r".*\.gate_up_proj": 16}


def test_the_names_of_tutorials_adapt_the_rest_elsewhere_with_a_warning(caplog):
    model = petl.wrap(qwen3_moe(), "loha", target_modules=SEVEN)
    assert len(adapted(model)) == 8
    assert (
        "target down_proj, gate_proj, up_proj names projections of stacked experts" in caplog.text
    )
    with pytest.raises(petl.errors.UnsupportedError):
        petl.wrap(qwen3_moe(), "loha", target_modules=["down_proj"])
    with pytest.raises(petl.errors.UnknownNameError):
        petl.wrap(qwen3_moe(), "mola", target_modules=["q_porj", "down_proj"])


def test_experts_count_as_called_whatever_the_tokens():
    calls = Calls(called=frozenset({"layers.*.mlp"}), entered=frozenset({"layers.*"}))
    assert calls.why_not("layers.1.experts.3.up") == calls.why_not("tower.layers.0.up") == ""
    assert calls.why_not("layers.1.cross.up") == IDLE


def test_an_adapter_cannot_read_what_comes_later_or_has_another_shape():
    calls = calls_of(jamba())
    first, norm = "model.layers.0.input_layernorm", "model.layers.0.pre_ff_layernorm"
    closing = "model.layers.0.mamba.out_proj"
    assert calls.why_no_input(first, closing) == ""
    assert norm in calls.why_no_input(norm, closing)
    assert calls.why_no_input("model.layers.0.absent", closing) == ""
    shape = (1, 16, 8)
    known = Calls(inputs={"q": (16, 1, 8), "o": shape}, outputs={"o": shape})
    assert (known.width_of("o"), known.width_of("q")) == (8, None)
    assert "[16, 1] tokens" in known.why_no_input("q", "o")


def test_gpt_has_its_norms_behind_the_sublayers():
    """The names of its norms are those that GPT-2 has before them."""
    base = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_layer=2, n_embd=32, n_head=4, vocab_size=64))
    with pytest.raises(petl.InputError, match="ln_1"):
        petl.wrap(base, "adapter", placement="parallel_residual", task_type="CAUSAL_LM")


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_a_mixture_may_return_the_scores_of_its_router(method, tmp_path):
    """The feed-forward of gpt-oss returns a pair; a bottleneck changes the first of it."""
    case = testing.Case(method, "gpt_oss", {"r": 8, "locations": ["ffn"]})
    model = case.wrap_stirred().eval()
    layer, *_ = [
        module
        for name, module in model.named_modules()
        if name.endswith("layers.0.mlp") and hasattr(module, "adapters")
    ]
    x = torch.randn(1, 5, layer.in_features)
    with torch.no_grad():
        y, scores = layer(x)
        base_y, base_scores = layer.base_layer(x)
        (adapter,) = layer.adapters.values()
        torch.testing.assert_close(y, adapter(x, base_y))
    assert (y - base_y).abs().max() > 1e-3
    assert torch.equal(scores, base_scores)
    batch = case.tiny.batch(2)
    model.save_pretrained(tmp_path)
    loaded = petl.load(case.tiny.base(), tmp_path, other_base=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_a_pass_changes_neither_the_model_nor_random_numbers():
    base = jamba().eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    calls_of(base)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert not base.training
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_where_no_pass_can_be_run_nothing_is_said(caplog):
    class Odd(LlamaForCausalLM):
        def forward(self, tokens, more):
            raise NotImplementedError("only with two inputs")

    base = Odd(LlamaConfig(**SIZES))
    assert calls_of(base).reason
    with caplog.at_level(logging.INFO):
        assert len(adapted(petl.wrap(base, "lora", target_modules="block-linear"))) == 14
    assert "no adapter on" not in caplog.text


def test_blocks_that_are_built_alike_are_run_once():
    ran = []

    class Counting(LlamaForCausalLM):
        pass

    base = Counting(LlamaConfig(**{**SIZES, "num_hidden_layers": 24}))
    kind = type(base.model.layers[0].mlp)

    class Mlp(kind):
        def forward(self, x):
            ran.append(1)
            return super().forward(x)

    for block in base.model.layers:
        block.mlp.__class__ = Mlp
    assert not calls_of(base).reason
    assert len(ran) == 1
    calls_of(base)  # known
    assert len(ran) == 1


def test_an_adapted_model_is_known_as_its_base():
    base = bart()
    known = calls_of(base)
    assert calls_of(petl.wrap(base, "lora").get_base_model()) is known
