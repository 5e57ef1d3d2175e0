"""Batch norms of a frozen base keep the statistics that no adapter file has."""

import copy

import torch
from torch import nn

import petl


class Normed(nn.Module):
    """A linear layer behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


def test_an_adapter_trained_over_batch_norms_loads_with_equal_outputs(tmp_path):
    base = Normed().eval()
    model = petl.wrap(copy.deepcopy(base), "lora", target_modules=["linear"], r=2).train()
    x = torch.randn(4, 6) + 3
    before = copy.deepcopy(model.state_dict())
    model(x).sum().backward()
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert not changed
    model.save_pretrained(tmp_path)
    loaded = petl.load(base, tmp_path, is_trainable=True).train()
    loaded(x)
    assert torch.equal(loaded.eval()(x), copy.deepcopy(model).eval()(x))


def test_a_norm_that_is_trained_has_its_statistics():
    fields = {"target_modules": ["linear"], "modules_to_save": ["norm"], "r": 2}
    model = petl.wrap(Normed(), "lora", **fields).train()
    model(torch.randn(4, 6) + 3)
    norm = model.get_base_model().norm
    assert int(norm.modules_to_save["default"].num_batches_tracked) == 1
    assert int(norm.original_module.num_batches_tracked) == 0


def test_a_base_that_is_unfrozen_trains_its_norms_again():
    base = petl.wrap(Normed(), "lora", target_modules=["linear"], r=2).unload()
    assert not base.train().norm.training
    assert base.requires_grad_(True).train().norm.training
