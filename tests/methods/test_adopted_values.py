"""Values that PEFT accepts but fails on later, replaces, or trains nothing with, raise."""

import pytest
import torch
from torch import nn
from transformers import XLMConfig, XLMModel

import petl
from petl.methods.adopted import values
from petl.testing.bases import tiny_llava


def test_butterflies_of_boft_need_the_compiled_kernel(monkeypatch):
    monkeypatch.setattr(values, "has_boft_kernel", lambda: False)
    with pytest.raises(petl.InputError, match="boft_n_butterfly_factor=2"):
        petl.build_config("boft", boft_n_butterfly_factor=2)


class Two(nn.Module):
    """Two layers, 48 to 64 and 64 to 80: 16 and its divisors divide all widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 80)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("oft", {"oft_block_size": 16}),
        ("oft", {"oft_block_size": 16, "num_cayley_neumann_terms": 2}),
        ("oft", {"oft_block_size": 0, "r": 4}),
        ("boft", {"boft_block_size": 8}),
        ("miss", {"r": 7}),
        ("miss", {"r": 16, "init_weights": "bat"}),
        ("miss", {"r": 7, "init_weights": "mini", "mini_r": 16}),
        ("vblora", {"vector_length": 16, "init_logits_std": 0}),
        ("hra", {"r": 7, "init_weights": False}),
        ("hra", {"r": 8, "init_weights": False, "apply_GS": True}),
        ("lokr", {"decompose_factor": 7}),
        ("vera", {"d_initial": -0.1}),
        ("delora", {"r": 1000}),
        ("c3a", {"block_size": 16}),
        ("miss", {"r": 48}),
        ("shira", {"r": 27}),
        ("fourierft", {"n_frequency": 3072}),
        ("randlora", {"r": 1000}),
    ],
)
def test_valid_values_next_to_invalid_ones_train(name, fields):
    model = petl.wrap(Two(), name, target_modules=["first", "second"], **fields)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    before = [p.detach().clone() for p in trained]
    x, wanted = torch.randn(5, 48), torch.randn(5, 80)
    for _ in range(2):
        loss = (model(x) - wanted).square().mean()
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = [not torch.equal(p, old) for p, old in zip(trained, before, strict=True)]
    assert any(changed)
    assert all(p.isfinite().all() for p in trained)


class Inside(nn.Module):
    """`Two` as a part: PEFT's patterns of these methods want a name before that of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.two = Two()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(x)


@pytest.mark.parametrize(
    ("name", "field", "default", "fits", "too_large"),
    [("c3a", "block_size", 32, 16, 24), ("fourierft", "n_frequency", 4000, 3000, 3073)],
)
def test_a_size_of_one_target_is_compared_with_that_target(name, field, default, fits, too_large):
    fields = {field: default, "target_modules": ["first"]}
    pattern = f"{field}_pattern"
    with pytest.raises(petl.InputError):
        petl.wrap(Inside(), name, **fields, **{pattern: {"first": too_large}})
    model = petl.wrap(Inside(), name, **fields, **{pattern: {"first": fits}})
    assert model(torch.ones(2, 48)).shape == (2, 80)


def test_norms_are_those_of_the_language_model_and_never_a_list_of_them():
    base = tiny_llava()
    model = petl.wrap(base, "ln_tuning")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("language_model" in name for name in trained)
    # its blocks keep their norms in two lists, which are called entry by entry
    fields = {"n_layers": 2, "n_heads": 2, "emb_dim": 8, "vocab_size": 11, "pad_index": 0}
    model = petl.wrap(XLMModel(XLMConfig(**fields)), "ln_tuning").train()
    model(torch.tensor([[3, 4, 5]])).last_hidden_state.square().sum().backward()
    norms = {n.rsplit(".ln_tuning")[0] for n, p in model.named_parameters() if p.grad is not None}
    ends = {name.removeprefix("base_model.model.") for name in norms}
    blocks = {f"layer_norm{k}.{block}" for k in (1, 2) for block in (0, 1)}
    assert ends == blocks | {"layer_norm_emb"}
