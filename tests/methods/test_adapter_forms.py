"""The conformer block against explicit sums; contract tests of less common settings."""

import pytest
import torch
from adapter_fixtures import one_layer, vit_classifier
from tiny_families import FAMILIES, K
from torch import Tensor, nn

import petl
from petl import testing


def convolve_by_hand(adapter: nn.Module, h: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The block's output for h [N, T, K], token by token, with the given statistics."""
    p, (N, T, _) = dict(adapter.named_parameters()), h.shape
    a, g = (h @ p["down_weight"].T + p["down_bias"]).chunk(2, dim=-1)
    v = a / (1 + (-g).exp())
    D, _, W = p["conv_weight"].shape
    out = torch.zeros(N, T, D)
    for t in range(T):
        for w in range(W):
            s = t + w - W // 2
            if 0 <= s < T:
                out[:, t] += v[:, s] * p["conv_weight"][:, 0, w]
    out = out + p["conv_bias"]
    if mean is None:
        mean, var = out.mean((0, 1)), out.var((0, 1), correction=0)
    out = (out - mean) / (var + 1e-5).sqrt() * p["bn_weight"] + p["bn_bias"]
    return (out / (1 + (-out).exp())) @ p["up_weight"].T + p["up_bias"]


def test_the_conformer_block_equals_explicit_sums_in_training_and_evaluation():
    adapter = one_layer(block="conformer", conv_kernel_size=3, placement="parallel")
    x, y = torch.randn(2, 5, K), torch.randn(2, 5, K)
    adapter.train()
    adapter.info.context.recording = True  # as inside the model's forward
    torch.testing.assert_close(adapter(x, y), y + convolve_by_hand(adapter, x, None, None))
    mean, var = adapter.bn_running_mean, adapter.bn_running_var
    assert mean.abs().min() > 0
    assert int(adapter.bn_num_batches_tracked) == 1
    adapter.eval()
    torch.testing.assert_close(adapter(x, y), y + convolve_by_hand(adapter, x, mean, var))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_running_statistics_update_once_per_step_under_checkpointing(reentrant):
    bases, states = [], []
    for checkpoint in (None, reentrant):
        model = petl.wrap(vit_classifier(), "adapter", r=6, block="conformer", conv_kernel_size=3)
        torch.manual_seed(5)
        for p in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(p, std=0.3)
        model.train()
        if checkpoint is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
            model.enable_input_require_grads()
        batch = FAMILIES["vit"].batch(rows=4)
        model(**batch, labels=torch.arange(4)).loss.backward()
        bases.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        states.append({n: b for n, b in model.named_buffers() if "bn_" in n})
    for plain, recomputed in (bases, states):
        assert plain.keys() == recomputed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-6)


def test_running_statistics_are_saved(tmp_path):
    model = petl.wrap(FAMILIES["ast"].build(), "adapter", block="conformer", r=4)
    model.train()(**FAMILIES["ast"].batch(rows=3))
    model.save_pretrained(tmp_path)
    again = petl.load(FAMILIES["ast"].build(), tmp_path, adapter_name="other")
    batch = FAMILIES["ast"].batch(seed=1)
    family = FAMILIES["ast"]
    mine, theirs = (family.outputs(m.eval(), **batch) for m in (model, again))
    assert torch.equal(mine, theirs)
    assert again.state_dict()[
        "base_model.model.layers.0.mlp.fc2.petl_adapter_adapters.other.bn_running_mean"
    ].any()


# Contract tests with settings other than the defaults


BATCH_STATISTICS = "the batch norm has the statistics of the rows of one forward"
FORMS = [
    testing.Case(
        "adapter",
        "t5",
        {"r": 8, "placement": "parallel", "locations": ["attn", "cross_attn", "ffn"]},
        lr=4e-2,
        excused=dict.fromkeys(
            ("both_adapters_can_be_active", "layer_compiles_whole"),
            "calls a layer alone, whose source has not run",
        ),
        name="parallel",
    ),
    testing.Case(
        "adapter",
        "vit",
        {"r": 8, "block": "conformer", "conv_kernel_size": 3, "ln_before": True, "ln_after": True},
        lr=4e-2,
        excused={
            "accumulated_gradients_add_up": BATCH_STATISTICS,
            "copies_are_the_same_and_apart": BATCH_STATISTICS,
            "training_forward_leaves_nothing_behind": BATCH_STATISTICS,
            "two_processes_equal_one": BATCH_STATISTICS,
            "sharded_processes_equal_one": BATCH_STATISTICS,
            "damaged_files_do_not_load": "doubles a tensor, and the count of batches has no length",
        },
        name="conformer",
    ),
]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "check"),
    [
        pytest.param(case, check, marks=[pytest.mark.slow] if slow else [], id=f"{case}-{check}")
        for case in FORMS
        for slow in (False, True)
        for check in testing.checks(case, slow=slow)
    ],
)
def test_other_settings_pass_the_contract_tests(case, check):
    testing.run(check, case)
