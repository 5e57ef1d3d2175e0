"""Values that PEFT accepts but fails on later, replaces, or trains nothing with, raise."""

import re

import pytest
import torch
from torch import nn
from transformers import XLMConfig, XLMModel

import petl
from petl import testing
from petl.methods.adopted import values
from petl.testing.bases import tiny_llava

ODD = (
    "r=7 is odd: only pairs of reflections cancel, which init_weights=true needs to start at the "
    "base model's outputs; use an even r, or init_weights=false"
)
EQUAL = (
    "apply_GS=true gives nan for the pairs of equal reflections that init_weights=true starts "
    "with; use apply_GS=false or init_weights=false"
)
KERNEL = (
    "boft_n_butterfly_factor=2 needs a GPU, nvcc and ninja to build PEFT's kernel; without it PEFT "
    "computes with 1: use boft_n_butterfly_factor=1"
)
BOUND = "it bounds the norm of the update"
NO_ROTATION = "oft_block_size=1 trains nothing: 1x1 blocks cannot rotate"
FACTOR = "is not -1 (no limit) or an integer from 1"


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("adalora", "target_r", 0, "target_r=0 is not an integer of at least 1"),
        ("adalora", "target_r", 20, "target_r=20 is not in 1..init_r=12: ranks only shrink"),
        ("adalora", "beta1", 1.0, "beta1=1.0 is not between 0 and 1"),
        ("boft", "boft_block_size", -8, "boft_block_size=-8 is not an integer of at least 0"),
        ("boft", "boft_n_butterfly_factor", 0, "boft_n_butterfly_factor=0 is not an integer of"),
        ("boft", "boft_n_butterfly_factor", 2, KERNEL),
        ("delora", "delora_lambda", -1, f"delora_lambda=-1 is not above 0: {BOUND}"),
        ("delora", "delora_lambda", 0, f"delora_lambda=0 is not above 0: {BOUND}"),
        ("delora", "lambda_pattern", {"q": 0}, f"lambda_pattern: q=0 is not above 0: {BOUND}"),
        ("fourierft", "scaling", 0, "scaling=0 trains nothing: it scales the update"),
        ("hra", "apply_GS", True, EQUAL),
        ("hra", "r", 7, ODD),
        ("lokr", "decompose_factor", 0, f"decompose_factor=0 {FACTOR}"),
        ("lokr", "decompose_factor", -2, f"decompose_factor=-2 {FACTOR}"),
        ("miss", "init_weights", "foo", "init_weights=foo is not one of true, false, bat, mini"),
        ("miss", "mini_r", 0, "mini_r=0 is not an integer of at least 1"),
        ("oft", "num_cayley_neumann_terms", 1, "num_cayley_neumann_terms=1 is not an integer"),
        (
            "oft",
            "module_dropout",
            0.1,
            "module_dropout=0.1 would do nothing: PEFT's OFT",
        ),
        ("oft", "oft_block_size", -4, "oft_block_size=-4 is not an integer of at least 0"),
        ("oft", "oft_block_size", 1, NO_ROTATION),
        ("shira", "mask_type", "x", "mask_type=x is not random, the only mask that has a name"),
        ("vblora", "init_logits_std", -1.0, "init_logits_std=-1.0 is below 0"),
        ("vblora", "init_vector_bank_bound", 0, "init_vector_bank_bound=0 is not above 0: a bank"),
        ("vblora", "topk", 999, "topk=999 is not in 1..num_vectors=256"),
        ("vblora", "vector_length", 0, "vector_length=0 is not an integer of at least 1"),
        ("vera", "d_initial", 0, "d_initial=0 trains nothing: it blocks the gradients"),
    ],
)
def test_a_value_raises_before_there_is_a_model(name, field, value, message, monkeypatch):
    monkeypatch.setattr(values, "has_boft_kernel", lambda: False)
    needed = {"total_step": 1000} if name == "adalora" else {}
    with pytest.raises(petl.InputError, match=f"^{re.escape(message)}"):
        petl.build_config(name, **needed, **{field: value})


class Two(nn.Module):
    """Two layers, 48 to 64 and 64 to 80: 16 and its divisors divide all widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 80)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("oft", {}, "oft_block_size=32 does not divide 48, the input width of first; use 16, "),
        ("oft", {"oft_block_size": 24}, "oft_block_size=24 does not divide 64, the input width of"),
        ("oft", {"oft_block_size": 3}, "oft_block_size=3 does not divide 64, .*; use 2, "),
        ("oft", {"oft_block_size": 0, "r": 5}, "r=5 does not divide 48, .* of first; use 4, "),
        ("oft", {"oft_block_size": 0, "r": 48}, "r=48 does not divide 64, .*second; use 16, "),
        ("boft", {"boft_block_size": 5}, "boft_block_size=5 does not divide 48, .*; use 4, "),
        ("boft", {"boft_block_size": 0, "boft_block_num": 6}, "boft_block_num=6 .* 64, "),
        ("miss", {"r": 7, "init_weights": "bat"}, "r=7 does not divide 48, .* first; use 8, "),
        ("miss", {"r": 32, "init_weights": "bat"}, "r=32 .* 48, .* first; use 16, "),
        ("miss", {"init_weights": "mini", "mini_r": 5}, "mini_r=5 .* 64, the output .* use 4, "),
        ("vblora", {"vector_length": 48}, "vector_length=48 .* 64, the input .*; use 16, "),
        ("c3a", {"block_size": 24}, "block_size=24 does not divide 64, .* of .*; use 16, "),
        ("c3a", {"block_size": 32}, "block_size=32 does not divide 48, .* first; use 16, "),
        ("miss", {"r": 49}, "r=49 is above 48, the input width of first; use at most 48 "),
        ("shira", {"r": 28}, "r=28 is above 27, the largest r.* of first; use at most 27 "),
        ("shira", {"r": 36}, "r=36 is above 27, .* of first; use at most 27 "),
        ("fourierft", {"n_frequency": 4000}, "n_frequency=4000 is above 3072, .* at most 3072 "),
    ],
)
@pytest.mark.parametrize("targets", [["first", "second"], "all-linear", "first|second"])
def test_a_size_that_does_not_divide_a_width_raises_with_the_nearest_valid_one(
    name, fields, message, targets
):
    with pytest.raises(petl.InputError, match=f"^{message}"):
        petl.wrap(Two(), name, target_modules=targets, **fields)


def test_blocks_of_size_1_and_widths_that_no_block_divides_raise():
    alone = nn.Sequential(nn.Linear(48, 8))
    with pytest.raises(petl.InputError, match=r"^r=48 is the input width of 0: .* a smaller r$"):
        petl.wrap(alone, "oft", target_modules=["0"], oft_block_size=0, r=48)
    coprime = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 9))
    with pytest.raises(petl.InputError, match="; no number from 2 divides those of all targets"):
        petl.wrap(coprime, "oft", target_modules=["0", "1"], oft_block_size=3)


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
    with pytest.raises(petl.InputError, match=pattern):
        petl.wrap(Inside(), name, **fields, **{pattern: {"first": too_large}})
    model = petl.wrap(Inside(), name, **fields, **{pattern: {"first": fits}})
    assert model(torch.ones(2, 48)).shape == (2, 80)


def test_what_a_tuner_of_pefts_does_not_take_is_refused_with_what_to_do():
    with pytest.raises(petl.InputError, match=r"Conv1D.*; lora and petl's own"):
        petl.wrap(testing.TINY_MODELS["gpt2"].base(), "c3a", block_size=4)
    # a norm without weights, as OLMo's
    bare = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    with pytest.raises(petl.InputError, match="has no weights; choose others"):
        petl.wrap(bare, "ln_tuning", target_modules=["1"])


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
