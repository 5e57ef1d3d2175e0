"""CorDA on stacked experts: against its equations for each expert, routed by a loop."""

from collections.abc import Iterator

import peft
import pytest
import torch
from mixtures import IDS, mixture
from torch import Tensor, nn

import petl
from petl.errors import InputError, UnsupportedError
from petl.testing.experts import separated

R = 3
PATH = "model.layers.0.mlp.experts"
MODELS = ["qwen3_moe", "gpt_oss", "llama4", "nemotron_h", "longcat_flash", "jetmoe"]


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    """Two rows each, the second with padding."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    ids = (torch.randint(1, 64, (2, 9), generator=generator) for _ in range(count))
    return [{"input_ids": each, "attention_mask": mask} for each in ids]


def wrap(name: str, calibration=None, **fields):
    fields = {"r": R, "lora_alpha": 2 * R, "target_modules": "experts"} | fields
    data = batches() if calibration is None else calibration
    return petl.wrap(mixture(name), "corda", calibration=data, **fields)


def stacks(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, stored weights and update as stored, of each stack with an adapter."""
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.layer.ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
            stored = [torch.stack(both) for both in zip(*layer._deltas("default"), strict=True)]
            yield name, *stored


def moments(name: str, data, norm: str) -> dict[str, dict[int, Tensor]]:
    """Second moments of the inputs of each expert of the stacks in PATH, row by row, in float64."""
    model = separated(mixture(name))
    experts, found, now = model.get_submodule(PATH), {}, {}
    counts: dict[tuple[str, int], int] = {}

    def note_tokens(module: nn.Module, args) -> None:
        now["index"] = args[1]

    def note(stack: str, expert: int, x: Tensor) -> None:
        tokens = (now["index"] == expert).nonzero()[:, 0]
        for row, mask in enumerate(now["mask"]):
            own = [x[i] for i, t in enumerate(tokens.tolist()) if t // 9 == row and mask[t % 9]]
            if not own:
                continue
            X = torch.stack(own).double()
            if norm != "none":
                X = X / (X.max().abs() if norm == "signed_max" else X.abs().max())
            n = counts[stack, expert] = counts.get((stack, expert), 0) + 1
            old = found.setdefault(stack, {}).get(expert, 0)
            found[stack][expert] = old + (X.t() @ X - old) / n

    experts.register_forward_pre_hook(note_tokens)
    for stack, layers in experts.linears.named_children():
        for expert, layer in layers.named_children():
            layer.register_forward_pre_hook(
                lambda m, args, stack=stack, e=int(expert): note(stack, e, args[0])
            )
    for batch in data:
        now["mask"] = batch["attention_mask"]
        with torch.no_grad():
            model(**batch)
    return found


@pytest.mark.parametrize("norm", ["signed_max", "abs_max", "none"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_each_expert_is_split_by_the_tokens_that_are_routed_to_it(name, mode, norm):
    base = mixture(name)
    found = {
        n: update for n, _, update in stacks(wrap(name, corda_method=mode, activation_norm=norm))
    }
    for stack, of_experts in moments(name, batches(), norm).items():
        weights = base.get_submodule(PATH).get_parameter(stack).detach()
        assert len(of_experts) == len(weights)
        for expert, C in of_experts.items():
            transposed = name == "gpt_oss"
            W = (weights[expert].t() if transposed else weights[expert]).double()
            update = found[f"{PATH}.{stack}"][expert].double()
            C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
            U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
            part = slice(0, R) if mode == "ipm" else slice(-R, None)
            expected = U[:, part] @ S[part].diag() @ (Vh[part] @ C.inverse())
            gap = ((update.t() if transposed else update) - expected).abs().max()
            assert gap <= 5e-3 * expected.abs().max(), (stack, expert)


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", MODELS)
def test_split_experts_add_up_and_the_model_is_unchanged(name):
    base, model = mixture(name), wrap(name).eval()
    parts = list(stacks(model))
    assert parts
    for stack, rest, update in parts:
        W = base.get_parameter(stack)
        torch.testing.assert_close(rest + update, W, rtol=0, atol=2e-5)
        assert not torch.equal(rest, W)
    expected = base(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-4)
    restored = model.unload()
    torch.testing.assert_close(restored(IDS).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_is_a_lora_of_the_original_experts(name, tmp_path):
    model = wrap(name, target_modules="block-linear").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    for load in (petl.load, peft.PeftModel.from_pretrained):
        loaded = load(mixture(name), tmp_path).eval()
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=2e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=2e-4)
    # the trainer's way to go on
    again = wrap(name, target_modules="block-linear").eval()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=2e-4)


def test_factors_from_another_start_are_refused_on_loading(tmp_path):
    wrap("qwen3_moe").save_pretrained(tmp_path)
    for other in ({"calibration": batches(2)}, {"r": R + 1, "lora_alpha": 2 * R + 2}):
        with pytest.raises((InputError, RuntimeError), match=r"initial factors|size mismatch"):
            wrap("qwen3_moe", **other).load_adapter(tmp_path, "default")


def test_an_expert_that_no_token_meets_takes_the_mean_of_its_stack(caplog):
    data = [{"input_ids": IDS[:1, :2], "attention_mask": torch.ones(1, 2, dtype=torch.long)}]
    seen = moments_of_few(data)
    model = wrap("qwen3_moe", calibration=data, activation_norm="none")
    stack = f"{PATH}.gate_up_proj"
    assert f"the calibration data meet {len(seen)} of 6 experts of {stack}" in caplog.text
    mean = sum(seen.values()) / len(seen)
    C = mean + 0.01 * mean.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
    expert = min({*range(6)} - seen.keys())
    W = mixture("qwen3_moe").get_parameter(stack)[expert].detach().double()
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    expected = U[:, :R] @ S[:R].diag() @ (Vh[:R] @ C.inverse())
    update = next(update for name, _, update in stacks(model) if name == stack)[expert].double()
    assert (update - expected).abs().max() <= 1e-2 * expected.abs().max()


def moments_of_few(data) -> dict[int, Tensor]:
    """Second moments of the first stack for a row without padding."""
    model, found = separated(mixture("qwen3_moe")), {}
    for expert, layer in model.get_submodule(PATH).linears.gate_up_proj.named_children():

        def note(module, args, e=int(expert)) -> None:
            if len(args[0]):
                found[e] = args[0].double().t() @ args[0].double()

        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model(**data[0])
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("bound", [10_000, 40_000])
def test_less_memory_for_covariances_changes_nothing(bound, tmp_path):
    one = wrap("gpt_oss")
    for fields in (
        {"max_covariance_bytes": bound + 6 * 4 * 64 * 64},
        {"covariance_cache": str(tmp_path / "c")},
        {"covariance_cache": str(tmp_path / "c")},
        {"factors_cache": str(tmp_path / "f")},
    ):
        other = wrap("gpt_oss", **fields)
        for (_, _, a), (_, _, b) in zip(stacks(one), stacks(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_budget_of_ranks_is_for_linear_layers():
    budget = {"corda_method": "kpm", "rank_budget": 1000}
    with pytest.raises(UnsupportedError):
        wrap("qwen3_moe", **budget)
    assert not list(stacks(wrap("qwen3_moe", target_modules="block-linear", **budget)))


def test_adapters_of_experts_train():
    model = wrap("qwen3_moe", target_modules="block-linear").train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert any("experts" in name for name, _ in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in trained)
