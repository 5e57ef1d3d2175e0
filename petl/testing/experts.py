"""Check of adapters on stacked experts: they equal those on a linear layer for each expert."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.experts.layout import ExpertsLayout, experts_of
from petl.core.experts.linears import LINEARS
from petl.core.model.names import stack_names
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.testing.case import Case, assert_close, gradients, logits, stir, trainable, tuner_layers
from petl.testing.catalog import check, own
from petl.testing.training import assert_close_gradients, train

EXACT = 2e-6  # difference of outputs, relative to the largest


class SeparateExperts(nn.Module):
    """A module of experts with a linear layer for each projection of each expert.

    Shapes: T tokens, K experts of each, H width.
    """

    def __init__(self, module: nn.Module, layout: ExpertsLayout) -> None:
        super().__init__()
        self.module = (module,)  # for its activation; no child of this one
        self.layout = layout
        linears = nn.Module()
        for name in layout.stacks:
            linears.add_module(name, _layers(module, layout, name))
        self.add_module(LINEARS, linears)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts, [T, H]."""
        up, down = (self.get_submodule(f"{LINEARS}.{name}") for name in self.layout.stacks)
        y = torch.zeros_like(x)
        for expert in range(self.layout.count(self.module[0])):
            token, place = (index == expert).nonzero(as_tuple=True)
            h = self.layout.activated(self.module[0], up.get_submodule(str(expert))(x[token]))
            out = down.get_submodule(str(expert))(h) * weights[token, place, None]
            y = y.index_add(0, token, out)
        return y


def _layers(module: nn.Module, layout: ExpertsLayout, name: str) -> nn.Module:
    layers = nn.Module()
    for expert in range(layout.count(module)):
        weight = getattr(module, name)[expert].detach()
        weight = weight.t() if layout.transposed else weight
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=layout.bias)
        layer.weight.data = weight.contiguous().clone()
        if layout.bias:
            layer.bias.data = getattr(module, f"{name}_bias")[expert].detach().clone()
        layers.add_module(str(expert), layer)
    return layers


def separated(model: nn.Module) -> Any:
    """Replace, in place, modules of stacked experts by linear layers; return the model."""
    for path, module in list(model.named_modules()):
        layout = experts_of(module)
        if layout is not None:
            model.set_submodule(path, SeparateExperts(module, layout))
    return model


def on_experts(case: Case) -> bool:
    """Checks for methods registered with `petl.register` that adapt experts, on a model of them."""
    has_experts = bool(stack_names(case.tiny.original()))
    return has_experts and own(case) and not refusal(case.config(), Capability.EXPERTS)


@check(on_experts)
def experts_equal_separate_layers(case: Case) -> None:
    """Adapters on stacked experts compute, train and merge as those on separate layers."""
    model, twin = case.wrap(), case.wrap(separated(case.base()))
    own, apart = trainable(model), trainable(twin)
    assert own.keys() == apart.keys(), sorted(own.keys() ^ apart.keys())[:4]
    adapted = [name for name in tuner_layers(model) if f".{LINEARS}." in name]
    assert adapted, "no adapter is on an expert"
    different = [name for name, tensor in own.items() if not torch.equal(tensor, apart[name])]
    assert not different, f"other initial values: {different[:4]}"
    stir(model)
    stir(twin)
    # without padding, which the separate layers cannot tell from tokens
    batch = {name: tensor for name, tensor in case.batch().items() if name != "attention_mask"}
    expected = logits(twin, batch)
    bound = EXACT * float(expected.abs().max())
    assert_close(logits(model, batch), expected, bound, "logits on experts and separate layers")
    found, wanted = gradients(model, batch), gradients(twin, batch)
    # experts without rows: zero here
    wanted = {n: wanted.get(n, torch.zeros_like(g)) for n, g in found.items()}
    assert_close_gradients(found, wanted, "on experts and separate layers", tolerance=1e-5)
    if case.promises.merges:
        _compare_merged(model, twin)
    losses = [train(each.train(), batch, steps=3, lr=case.lr).losses for each in (model, twin)]
    for a, b in zip(*losses, strict=True):
        assert abs(a - b) <= 1e-4 * abs(b), f"losses of a training: {losses}"


def _compare_merged(model: PeftModel, twin: PeftModel) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    twin.merge_adapter()
    merged = dict(twin.get_base_model().named_modules())
    base = model.get_base_model()
    for path, module in base.named_modules():
        layout = experts_of(module)
        if layout is None:
            continue
        for name in layout.stacks:
            for expert, weight in enumerate(module.get_parameter(name)):
                layer = merged[f"{path}.{LINEARS}.{name}.{expert}"].get_base_layer()
                own = weight.t() if layout.transposed else weight
                assert_close(own, layer.weight, 1e-6, f"merged {path}.{name}[{expert}]")
    model.unmerge_adapter()
    twin.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert_close(parameter, before[name], 1e-6, f"unmerged {name}")
