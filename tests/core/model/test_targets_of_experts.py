"""Names of stacked experts: presets, paths, names of transformers 4, and refusals in words."""

import copy

import peft
import pytest
import torch
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
)

import petl
from petl import testing
from petl.core.model.coverage import coverage_of
from petl.core.model.names import block_linear_names, router_names, stack_names
from petl.errors import InputError, UnknownNameError, UnsupportedError
from petl.testing.models import OTHER_MODELS

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
ROUTER, EXPERTS = "mlp.gate", "mlp.experts"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARED = {f"mlp.shared_experts.{name}" for name in SEVEN[4:]}
FIELDS = {"mola": {"num_experts": 2, "top_k": 1}}


def qwen3_moe():
    return OTHER_MODELS["qwen3_moe"].base()


def deepseek():
    """Two blocks, of which the second has experts and shared ones."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    config = DeepseekV3Config(
        **sizes, **experts, **ranks, vocab_size=64, v_head_dim=8, moe_intermediate_size=16
    )
    return DeepseekV3ForCausalLM(config)


def missed(base, method: str, targets) -> set[str]:
    """Return the kinds of weights of the blocks without an adapter."""
    model = petl.wrap(base, method, r=2, target_modules=targets, **FIELDS.get(method, {}))
    return set(coverage_of(model).missed)


@pytest.mark.parametrize("method", ["lora", "mola"])
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("block-linear", {ROUTER}),
        ("mlp-linear", {ROUTER, *ATTENTION}),
        ("attention-linear", {ROUTER, EXPERTS}),
        ("experts", {ROUTER, *ATTENTION}),
        (["experts"], {ROUTER, *ATTENTION}),
        (["mlp.experts", "q_proj"], {ROUTER, *ATTENTION} - {"self_attn.q_proj"}),
        (r".*\.mlp\.experts", {ROUTER, *ATTENTION}),
        (["gate_up_proj", "experts.down_proj"], {ROUTER, *ATTENTION}),
        (SEVEN, {ROUTER}),
        (["w1", "w2", "w3"], {ROUTER, *ATTENTION}),
        (["attention-linear", "experts"], {ROUTER}),
        (["mlp-linear", "q_proj"], {ROUTER, *ATTENTION} - {"self_attn.q_proj"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_names_mean_in_a_model_with_experts(method, targets, expected):
    assert missed(qwen3_moe(), method, targets) == expected


@pytest.mark.parametrize("method", ["lora", "mola"])
@pytest.mark.parametrize("targets", ["down_proj", "model.layers.1.mlp.experts.down_proj"])
def test_one_stack_is_adapted_alone(method, targets):
    base = qwen3_moe()
    whole = sum(p.numel() for n, p in base.named_parameters() if "layers" in n and p.dim() > 1)
    model = petl.wrap(base, method, r=2, target_modules=[targets], **FIELDS.get(method, {}))
    blocks = 1 if "layers" in targets else 2
    assert coverage_of(model).share == pytest.approx(blocks * 4 * 24 * 32 / whole)


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_parameters_are_named_as_in_peft(method):
    fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    model = petl.wrap(qwen3_moe(), method, r=2, **fields, **FIELDS.get(method, {}))
    named = petl.wrap(qwen3_moe(), "lora", r=2, target_modules=["q_proj", "down_proj"])
    assert coverage_of(model) == coverage_of(named)


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_shared_experts_are_linear_layers(method):
    rest = missed(deepseek(), method, "shared-experts")
    assert EXPERTS in rest
    assert not rest & SHARED
    rest = missed(deepseek(), method, "experts")
    assert rest >= SHARED
    assert EXPERTS not in rest
    # PEFT would take their complete names for those of routed experts
    assert missed(deepseek(), method, "block-linear") == {ROUTER}


def test_a_router_gets_a_lora():
    assert router_names(qwen3_moe()) == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    assert missed(qwen3_moe(), "lora", "router") == {EXPERTS, *ATTENTION}


def nested_routers(name: str):
    """A model whose router has its linear layer inside, with the paths of these."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 16}
    if name == "jetmoe":
        base = JetMoeForCausalLM(JetMoeConfig(**sizes, num_local_experts=4, kv_channels=8))
        where = ("mlp.router.layer", "self_attention.experts.router.layer")
        return base, {f"model.layers.{n}.{each}" for n in (0, 1) for each in where}
    config = AfmoeConfig(
        **sizes, num_experts=4, num_attention_heads=4, moe_intermediate_size=16, num_dense_layers=1
    )
    return AfmoeForCausalLM(config), {"model.layers.1.mlp.router.gate"}


@pytest.mark.parametrize("name", ["jetmoe", "afmoe"])
def test_presets_leave_routers_out_that_are_linear_layers(name):
    base, routers = nested_routers(name)
    assert set(router_names(base)) == routers
    assert not routers & set(block_linear_names(base))
    model = petl.wrap(base, "mola", target_modules="router", **FIELDS["mola"])
    assert {n.partition(".petl_mola")[0] for n in trained_names(model)} == routers


def trained_names(model) -> set[str]:
    names = (n for n, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("base_model.model.") for name in names}


EXPRESSIONS = [
    r".*\.(gate_proj|up_proj|down_proj)",
    r".*(q_proj|gate_proj|up_proj)$",
    r".*\.experts\..*_proj",
    ".*_proj",
    r".*\.mlp\.(gate|experts\.down_proj)",
]


@pytest.mark.parametrize(
    "targets", ["all-linear", SEVEN, ["q_proj", "gate", "down_proj"], *EXPRESSIONS]
)
def test_the_targets_of_peft_mean_the_same(targets):
    base = qwen3_moe()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=copy.copy(targets))
    )
    ours = petl.wrap(base, "lora", r=2, target_modules=copy.copy(targets))
    shapes = {n: p.shape for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in ours.named_parameters() if p.requires_grad} == shapes
    state = {n: torch.randn_like(t) for n, t in theirs.named_parameters() if "lora_" in n}
    for model in (ours, theirs):
        model.load_state_dict(state, strict=False)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_an_expression_for_one_block_adapts_that_block_alone(method):
    fields = FIELDS.get(method, {})
    for targets in (r"model\.layers\.1\.self_attn\.q_proj", r".*\.1\..*\.(gate|up)_proj"):
        model = petl.wrap(qwen3_moe(), method, r=2, target_modules=targets, **fields)
        assert {name.split(".")[2] for name in trained_names(model)} == {"1"}


def test_an_expression_for_experts_alone_has_the_rank_that_is_given():
    model = petl.wrap(qwen3_moe(), "lora", r=2, target_modules=".*experts$")
    ranks = {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks == {4 * 2}  # of four experts


def test_the_names_of_tutorials_may_be_more_than_the_model_has(caplog):
    assert missed(deepseek(), "lora", SEVEN) == {
        ROUTER, *(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_b_proj")),
        "self_attn.kv_a_proj_with_mqa",
    }  # fmt: skip
    assert "no adapter on k_proj, q_proj, v_proj: DeepseekV3ForCausalLM has no" in caplog.text
    with pytest.raises(UnknownNameError):
        petl.wrap(deepseek(), "lora", target_modules=[*SEVEN, "q_porj"])


@pytest.mark.parametrize("method", ["loha", "dora", "adapter"])
@pytest.mark.parametrize(
    "targets",
    ["experts", ["experts"], ["gate_up_proj"], r".*\.experts", r".*\.gate_up_proj", r".*\.w[123]"],
)
def test_a_method_without_experts_says_so_before_anything_changes(method, targets):
    base = qwen3_moe()
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(UnsupportedError):
        petl.wrap(base, method, target_modules=targets)
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    "excluded", [["experts"], ["gate_up_proj", "down_proj"], r".*\.experts\..*"]
)
@pytest.mark.parametrize("method", ["lora", "mola"])
def test_experts_are_left_out_by_name(method, excluded):
    model = petl.wrap(
        qwen3_moe(),
        method,
        target_modules=SEVEN,
        exclude_modules=excluded,
        **FIELDS.get(method, {}),
    )
    assert EXPERTS in coverage_of(model).missed


def test_what_experts_add_is_said(caplog):
    with caplog.at_level("INFO"):
        model = petl.wrap(qwen3_moe(), "lora", r=2, target_modules="block-linear")
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    own = sum(count for name, count in trained.items() if "experts" in name)
    assert f"{own:,} of {sum(trained.values()):,} trained parameters are those of" in caplog.text


def test_stacks_are_named_once_however_often_a_model_is_adapted():
    model = petl.wrap(qwen3_moe(), "mola", **FIELDS["mola"])
    model.add_adapter("other", petl.build_config("mola", **FIELDS["mola"]))
    assert stack_names(model.get_base_model()) == stack_names(qwen3_moe())


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.mlp.experts"]}]
)
def test_parameters_in_all_blocks_and_fewer_layers_are_refused(fields):
    short = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], **fields}
    with pytest.raises(InputError):
        petl.wrap(qwen3_moe(), "lora", **short)
    whole = [f"model.layers.{n}.mlp.experts.down_proj" for n in (0, 1)]
    model = petl.wrap(qwen3_moe(), "lora", **{**short, "target_parameters": whole})
    assert sum("experts.lora_A" in name for name, _ in model.named_parameters()) == 2


@pytest.mark.parametrize("targets", ["block-linear", ["q_proj", "experts"]])
def test_copies_of_blocks_are_adapted_and_saved(targets, tmp_path):
    model = petl.wrap(
        qwen3_moe(), "lora", r=2, target_modules=targets, layer_replication=[(0, 2), (0, 2)]
    )
    of_experts = {n.split(".")[2] for n in trained_names(model) if "experts" in n}
    assert of_experts == {"0", "1", "2", "3"}
    testing.stir(model).eval().save_pretrained(tmp_path)
    loaded = petl.load(qwen3_moe(), tmp_path).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", ["lora", "mola"])
@pytest.mark.parametrize("excluded", [["experts"], r".*experts.*", r".*\.mlp\..*"])
def test_excluded_experts_have_no_adapter_where_peft_renames_their_projections(method, excluded):
    fields = {"target_modules": "block-linear", "exclude_modules": excluded}
    model = petl.wrap(qwen3_moe(), method, **fields, **FIELDS.get(method, {}))
    assert set(coverage_of(model).missed) == {ROUTER, EXPERTS}


@pytest.mark.parametrize(
    ("word", "on_experts"), [("block-linear", True), (["attention-linear"], False)]
)
def test_an_adapter_that_is_added_may_name_presets(word, on_experts):
    model = petl.wrap(qwen3_moe(), "lora", target_modules="block-linear")
    model.add_adapter("b", petl.build_config("lora", target_modules=word, r=2))
    names = [name for name, _ in model.named_parameters() if ".b." in name]
    assert any(name.endswith("self_attn.o_proj.lora_A.b.weight") for name in names)
    assert any("mlp.experts" in name for name in names) == on_experts


@pytest.mark.parametrize("method", ["lora", "mola"])
@pytest.mark.parametrize("excluded", [["gate_projj"], r".*\.gate_projj"])
def test_an_exclusion_that_leaves_out_nothing_is_said_once(method, excluded, caplog):
    petl.wrap(testing.tiny_llama(), method, target_modules=["q_proj"], exclude_modules=excluded)
    said = [record.message for record in caplog.records if "exclude_modules" in record.message]
    assert len(said) == 1
    assert "gate_projj" in said[0]
    caplog.clear()
    petl.wrap(testing.tiny_llama(), method, exclude_modules=["gate_proj"])
    assert "exclude_modules" not in caplog.text


def test_a_file_of_peft_that_names_the_experts_otherwise_loads_beside_an_adapter(tmp_path):
    ids = torch.arange(8)[None]
    fields = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(qwen3_moe(), peft.LoraConfig(target_modules=SEVEN, **fields))
    theirs.eval().save_pretrained(tmp_path)
    model = petl.wrap(qwen3_moe(), "lora", target_modules="experts", **fields).eval()
    own = model(input_ids=ids).logits
    model.load_adapter(tmp_path, "theirs")
    model.set_adapter("theirs")
    model.eval()
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, own)
