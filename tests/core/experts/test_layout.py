"""What is read about modules of experts, and that nothing is adapted that computes otherwise."""

import pytest
import torch
from mixtures import MODELS, SIZES, lone_modules, mixture
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import petl
from petl.core.experts.layout import ExpertsLayout, Routing, experts_of
from petl.core.experts.proof import check_experts
from petl.errors import ModuleKindError, UnsupportedError

EXPECTED = {
    "qwen3_moe": ExpertsLayout(),
    "deepseek_v3": ExpertsLayout(),
    "gpt_oss": ExpertsLayout(transposed=True, bias=True, interleaved=True),
    "aria": ExpertsLayout(transposed=True),
    "nemotron_h": ExpertsLayout(up="up_proj", gated=False),
    "llama4": ExpertsLayout(transposed=True, routing=Routing.ALL),
    "longcat_flash": ExpertsLayout(identity=True),
    "jetmoe": ExpertsLayout(up="weight", down=None, gated=False, routing=Routing.SIZES),
    "muse_spark": ExpertsLayout(norm=True),
    "step3p7": ExpertsLayout(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layout_is_read_and_proven(name):
    model = mixture(name) if name in MODELS else lone_modules()[name]
    modules = [m for m in model.modules() if experts_of(m) is not None]
    assert modules
    for module in modules:
        layout = check_experts(module, "experts")
        assert layout == EXPECTED[name]
        for stack in layout.stacks:
            shape = layout.shape(module, stack)
            assert set(getattr(module, stack).shape) == set(shape)
    up = layout.shape(modules[0], layout.up)
    assert up.in_features == 32


def _mixtral_experts(cls: type[nn.Module] = MixtralExperts) -> nn.Module:
    config = MixtralConfig(**SIZES, num_local_experts=4, experts_implementation="eager")
    model = MixtralForCausalLM(config)
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = cls
    return experts


class ScaledExperts(MixtralExperts):
    """Looks alike, and computes something else."""

    def forward(self, x, index, weights):
        return 1.01 * super().forward(x, index, weights)


class OtherInputs(MixtralExperts):
    """Takes other inputs."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("cls", [ScaledExperts, OtherInputs])
def test_a_class_that_computes_something_else_is_refused(cls):
    experts = _mixtral_experts(cls)
    with pytest.raises(ModuleKindError):
        check_experts(experts, "model.layers.0.mlp.experts")
    # on shapes the flags decide
    check_experts(experts.to("meta"), "model.layers.0.mlp.experts")


def test_kernels_without_updates_and_quantized_weights_are_refused():
    experts = _mixtral_experts()
    experts.config._experts_implementation = "sonicmoe"
    with pytest.raises(UnsupportedError):
        check_experts(experts, "experts")
    experts.config._experts_implementation = "grouped_mm"
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    experts.gate_up_proj = nn.Parameter(
        experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(ModuleKindError):
        check_experts(experts, "experts")


def test_experts_that_are_divided_among_processes_are_refused():
    """As transformers loads a model with expert parallelism: a process has some experts only."""
    model = mixture("qwen3_moe")
    for module in model.modules():
        if experts_of(module) is not None:
            module._is_expert_parallel = True
    before = {name for name, _ in model.named_parameters()}
    for method in ("lora", "mola"):
        with pytest.raises(UnsupportedError):
            petl.wrap(model, method, target_modules="block-linear", task_type="CAUSAL_LM")
    assert {name for name, _ in model.named_parameters()} == before


def test_other_modules_have_no_layout():
    assert experts_of(nn.Linear(2, 2)) is None
    assert experts_of(nn.Bilinear(2, 2, 2)) is None  # a 3-D weight
