"""PELA: factors of the SVD, perturbation term, exported model; against numpy and loops."""

import copy
import json
import os
import subprocess
from math import floor

import numpy as np
import pytest
import torch
import warm_python
from kept_processes import in_processes
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

import petl
from petl import testing
from petl.adapters.export.small import CARD
from petl.errors import InputError, UnsupportedError
from petl.methods import pela
from petl.methods.pela.config import PelaConfig
from petl.methods.pela.export import RANKS

CONTRACT = {
    "starts_at_base": False,
    "fields": {"compression": 1.2},
    "lr": 1e-2,
    "refuses": ("both_adapters_can_be_active",),  # each replaces the layer,
    "acts_with": {
        "min_out_features": {"min_out_features": 80},
        "perturb_eps": {"perturb_weight": 0.5},
        "r": {"compression": 2.0},
    },
}


def mlp(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.ReLU(), nn.Linear(40, 16, bias=bias))


def wrapped(name="llama", **fields):
    return testing.Case("pela", name, fields).wrap()


def adapters(model, name="default"):
    return {key: layer.adapters[name] for key, layer in testing.tuner_layers(model).items()}


def matrix(linear):
    """The weight as [O, I]."""
    weight = linear.weight.detach().double()
    return (weight.t() if hasattr(linear, "nf") else weight).numpy()


# Ranks and factors


PUBLISHED = {  # widths: rank for c = 2, for c = 3
    (768, 768): (192, 128),
    (768, 3072): (307, 204),
    (1024, 1024): (256, 170),
    (4096, 4096): (1024, 682),
    (4096, 11008): (1492, 995),
}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_ranks_are_those_of_the_formula(shape):
    for c, rank in zip((2.0, 3.0), PUBLISHED[shape], strict=True):
        assert PelaConfig(compression=c).rank("layer", shape) == rank
        assert floor(shape[0] * shape[1] / (c * sum(shape))) == rank


class Block(nn.Module):
    """The linear layers of a block of timm's DeiT-B, with one matrix for q, k and v."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(768, 2304), nn.Linear(768, 768)
        self.fc1, self.fc2 = nn.Linear(768, 3072), nn.Linear(3072, 768)


def test_the_blocks_of_deit_b_have_the_published_size():
    """On the meta device, where nothing is decomposed."""
    with torch.device("meta"):
        base = nn.Sequential(*(Block() for _ in range(12)))
        assert sum(p.numel() for p in base.parameters()) == 85_017_600
        model = petl.wrap(base, "pela", target_modules=["qkv", "proj", "fc1", "fc2"])
    assert all(adapter.low_A.is_meta for adapter in adapters(model).values())
    assert model.get_nb_trainable_parameters()[0] == 42_531_840


@pytest.mark.parametrize("c", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_truncated_svd(c, bias):
    base = mlp(bias)
    weights = {"0": matrix(base[0]), "2": matrix(base[2])}
    x = torch.randn(5, 24)
    expected = x.double().numpy()
    for key in ("0", "2"):
        W = weights[key]
        R = floor(W.shape[0] * W.shape[1] / (c * sum(W.shape)))
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        low = (U[:, :R] * S[:R]) @ Vt[:R]
        weights[key] = (low, R, np.sqrt((S[R:] ** 2).sum()), np.linalg.norm(W), S)
        expected = expected @ low.T + (base[int(key)].bias.detach().numpy() if bias else 0.0)
        expected = np.maximum(expected, 0) if key == "0" else expected
    model = petl.wrap(base, "pela", target_modules=["0", "2"], compression=c)
    for key, adapter in adapters(model).items():
        low, R, dropped, norm, S = weights[key.rpartition(".")[2]]
        assert adapter.low_A.shape[0] == adapter.low_B.shape[1] == R
        product = (adapter.low_B @ adapter.low_A).detach().numpy()
        np.testing.assert_allclose(product, low, atol=1e-5)
        # both factors carry the root of the singular values
        for norms in (adapter.low_B.norm(dim=0), adapter.low_A.norm(dim=1)):
            np.testing.assert_allclose(norms.detach().numpy(), np.sqrt(S[:R]), rtol=1e-4)
        error = model.base_model.placed["default"][key.rpartition(".")[2]].error
        assert error == pytest.approx(dropped / norm, rel=1e-4)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-5)


def test_full_rank_is_the_base_model():
    base, batch = testing.TINY_MODELS["gpt2"].base(), testing.TINY_MODELS["gpt2"].batch()
    expected = testing.logits(base, batch)
    ranks = {"c_attn": 64, "c_proj": 64, "c_fc": 64}
    model = petl.wrap(base, "pela", rank_pattern=ranks)
    assert testing.difference(testing.logits(model, batch), expected) < 1e-4
    assert max(a.error for a in model.base_model.placed["default"].values()) < 1e-5


def test_the_randomized_svd_is_near_the_full_one_and_draws_nothing():
    W = torch.randn(64, 8) @ torch.randn(8, 48) + 0.01 * torch.randn(64, 48)
    products = []
    for svd in ("full", "randomized"):
        base = nn.Sequential(nn.Linear(48, 64))
        base[0].weight.data = W.clone()
        torch.manual_seed(5)
        before = torch.get_rng_state()
        model = petl.wrap(base, "pela", target_modules=["0"], r=8, svd=svd)
        assert torch.equal(torch.get_rng_state(), before)
        (adapter,) = adapters(model).values()
        products.append(adapter.low_B @ adapter.low_A)
    assert testing.difference(*products) < 1e-3


def test_layers_with_few_outputs_stay():
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    model = petl.wrap(base, "pela", target_modules=["0", "2"])
    assert [key.rpartition(".")[2] for key in adapters(model)] == ["0"]
    for least, kept in {16: ["0", "2"], 17: ["0"]}.items():  # the last has 16
        model = petl.wrap(mlp(), "pela", target_modules=["0", "2"], min_out_features=least)
        assert [key.rpartition(".")[2] for key in adapters(model)] == kept


# Computation


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_base_layer_is_not_called_and_the_base_is_untouched(name):
    model, batch = wrapped(name), testing.TINY_MODELS[name].batch()
    calls = []
    for layer in testing.tuner_layers(model).values():
        layer.get_base_layer().register_forward_hook(lambda *a: calls.append(1))
    found = testing.logits(model, batch)
    assert not calls
    base = testing.TINY_MODELS[name].base()
    with model.disable_adapter():
        # a classifier's head is trained, so compare with the head that was there
        assert torch.equal(testing.logits(model, batch), testing.logits(base, batch))
    assert testing.difference(found, testing.logits(base, batch)) > 1e-3


def by_hand(model, weight, eps):
    """The perturbation term and its gradients, by loops over all entries."""
    total, gradients, found = 0.0, {}, adapters(model)
    for key, adapter in found.items():
        layer = testing.tuner_layers(model)[key]
        W = torch.tensor(matrix(layer.get_base_layer()))
        A, B = adapter.low_A.detach().double(), adapter.low_B.detach().double()
        best, place = -1.0, None
        for o in range(W.shape[0]):
            for i in range(W.shape[1]):
                value = float(B[o] @ A[:, i] - W[o, i])
                if abs(value) > best:
                    best, place, sign = abs(value), (o, i), 1.0 if value > 0 else -1.0
        total += weight * (best - eps) ** 2 / len(found)
        slope = 2 * weight * (best - eps) * sign / len(found)
        to_A, to_B = torch.zeros_like(A), torch.zeros_like(B)
        to_A[:, place[1]], to_B[place[0]] = slope * B[place[0]], slope * A[:, place[1]]
        gradients[f"{key}.low_A"], gradients[f"{key}.low_B"] = to_A, to_B
    return total, gradients


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(("name", "eps"), [("llama", 1e-3), ("gpt2", 0.0)])
def test_the_perturbation_term_and_its_gradient(name, eps, pieces):
    batch = testing.TINY_MODELS[name].batch()
    plain = wrapped(name, target_modules="attention-linear")
    model = wrapped(name, target_modules="attention-linear", perturb_weight=3.0, perturb_eps=eps)
    expected, of_term = by_hand(model, 3.0, eps)
    petl.lifecycle(model).aux_weight = 1 / pieces
    task = testing.gradients(plain.train(), batch)
    found = testing.gradients(model.train(), batch)
    assert float(petl.lifecycle(model).aux_loss()) == pytest.approx(expected, rel=1e-4)
    names = {id(p): n for n, p in model.named_parameters()}
    for key, adapter in adapters(model).items():
        for tensor in ("low_A", "low_B"):
            name_of = names[id(getattr(adapter, tensor))]
            difference = (found[name_of] - task[name_of]).double()
            expected_slope = of_term[f"{key}.{tensor}"] / pieces
            torch.testing.assert_close(difference, expected_slope, rtol=1e-3, atol=1e-6)
    for each in (model, plain):  # no term in evaluation
        each.eval()(**batch).loss.backward()
    slopes = [[p.grad for p in testing.trainable(m).values()] for m in (model, plain)]
    torch.testing.assert_close(*slopes)


def test_a_bfloat16_base_has_float32_factors_and_products_in_its_dtype():
    base = testing.TINY_MODELS["llama"].base().to(torch.bfloat16)
    model = petl.wrap(base, "pela", perturb_weight=1.0)
    assert {p.dtype for a in adapters(model).values() for p in a.parameters()} == {torch.float32}
    batch, seen = testing.TINY_MODELS["llama"].batch(), []
    layer = testing.tuner_layers(model)
    next(iter(layer.values())).register_forward_hook(lambda m, args, y: seen.append(y.dtype))
    model.train()(**batch).loss.backward()
    assert seen == [torch.bfloat16]


def test_only_one_adapter_is_active():
    model = wrapped()
    model.add_adapter("other", petl.build_config("pela", task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("other")


# Files


def test_loading_decomposes_nothing(tmp_path, monkeypatch):
    model, batch = wrapped(), testing.TINY_MODELS["llama"].batch()
    testing.stir(model).save_pretrained(tmp_path)
    expected = testing.logits(model, batch)

    def refuse(*args, **kwargs):
        raise AssertionError("an SVD was computed")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    loaded = petl.load(testing.TINY_MODELS["llama"].base(), tmp_path)
    assert torch.equal(testing.logits(loaded, batch), expected)
    with pytest.raises(AssertionError, match="SVD"):
        petl.wrap(testing.TINY_MODELS["llama"].base(), loaded.peft_config["default"])


def test_factors_without_values_raise():
    config = petl.build_config("pela", task_type="CAUSAL_LM")
    config.is_saved = True  # as of a file that never came
    model = get_peft_model(testing.TINY_MODELS["llama"].base(), config)
    with pytest.raises(InputError, match="no values"):
        model(**testing.TINY_MODELS["llama"].batch())


def started_by_one_process():
    torch.manual_seed(torch.distributed.get_rank())
    model = petl.wrap(mlp(), "pela", target_modules=["0", "2"])
    return {key: a.low_A.detach() for key, a in adapters(model).items()}


@pytest.mark.thorough
def test_all_processes_have_the_same_factors(monkeypatch):
    one, other = in_processes(2, started_by_one_process)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key])


# Export


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_the_exported_model_is_plain_and_computes_the_same(name, tmp_path):
    model, batch = testing.stir(wrapped(name)), testing.TINY_MODELS[name].batch()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    hooks, classes = testing.switching.hooks_of(model), [type(m) for m in model.modules()]
    small = pela.export(model)
    expected = testing.logits(model, batch)
    torch.testing.assert_close(testing.logits(small, batch), expected, atol=1e-6, rtol=1e-6)
    for module in small.modules():
        assert type(module).__module__.startswith(("torch.", "transformers."))
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for key, layer in testing.tuner_layers(model).items():
        first, second = small.get_submodule(key.removeprefix("base_model.model."))
        rank = layer.adapters["default"].low_A.shape[0]
        assert (first.out_features, first.bias, second.in_features) == (rank, None, rank)
    # the wrapped model is as it was, and shares no memory with the copy
    assert [type(m) for m in model.modules()] == classes
    assert testing.switching.hooks_of(model) == hooks
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    small = pela.export(model)
    pela.save(small, tmp_path)
    ranks = json.loads((tmp_path / RANKS).read_text())["ranks"]
    assert len(ranks) == len(adapters(model))
    loaded = pela.load(AutoConfig.from_pretrained(tmp_path), tmp_path)
    assert type(loaded) is type(testing.TINY_MODELS[name].base())
    assert torch.equal(testing.logits(loaded, batch), testing.logits(small, batch))


def test_the_copy_has_no_base_weights_and_no_hooks_of_losses():
    base = testing.TINY_MODELS["llama"].base()
    model = petl.wrap(base, "distill", method="pela", method_config={"task_type": "CAUSAL_LM"})
    small, batch = pela.export(model), testing.TINY_MODELS["llama"].batch()
    assert sum(p.numel() for p in small.parameters()) == sum(
        p.numel() for n, p in model.named_parameters() if "base_layer" not in n
    )
    calls = []
    small.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    small.train()(**batch).loss.backward()
    assert len(calls) == 1  # no teacher


def test_loaded_and_copied_small_models_save_their_ranks(tmp_path):
    small = pela.export(wrapped())
    small.save_pretrained(tmp_path / "first")
    config = AutoConfig.from_pretrained(tmp_path / "first")
    loaded = pela.load(config, tmp_path / "first")
    expected = testing.logits(small, testing.TINY_MODELS["llama"].batch())
    for number, model in enumerate((loaded, copy.deepcopy(small))):
        model.save_pretrained(tmp_path / str(number))
        again = pela.load(config, tmp_path / str(number))
        assert torch.equal(testing.logits(again, testing.TINY_MODELS["llama"].batch()), expected)


def test_any_method_adapts_the_exported_model(tmp_path):
    small, batch = pela.export(wrapped()), testing.TINY_MODELS["llama"].batch()
    expected = testing.logits(small, batch)
    model = petl.wrap(small, "lora", target_modules="block-linear", task_type="CAUSAL_LM")
    targets = {key.rpartition(".")[2] for key in testing.tuner_layers(model)}
    assert targets == {"0", "1"}
    assert torch.equal(testing.logits(model, batch), expected)


STOCK = """
import json, sys
from peft import get_peft_model
from safetensors.torch import load_file, save_file
{code}
batch = load_file(sys.argv[1])
save_file({{"logits": model(**batch).logits.detach()}}, sys.argv[2])
assert "petl" not in sys.modules
"""


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stock_code_loads_the_small_model(name, tmp_path):
    """The lines of the card, in a Python that never imports petl."""
    small = pela.export(testing.stir(wrapped(name))).eval()
    batch = {k: v for k, v in testing.TINY_MODELS[name].batch().items() if k != "labels"}
    pela.save(small, tmp_path)
    code = CARD.format(name=type(small).__name__, base="", count=0).split("```python\n")[2]
    save_file(batch, tmp_path / "batch.safetensors")
    (tmp_path / "stock.py").write_text(STOCK.format(code=code.partition("```")[0]))
    arguments = ["stock.py", "batch.safetensors", "logits.safetensors"]
    line, environment = [warm_python.python(), *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(line, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.equal(found, small(**batch).logits)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "no ranks"),
        ({"model.layers.0.mlp.gate_proj": 0}, "rank 0"),
        ({"model.layers.0.mlp.gate_proj": 99}, "rank 99"),
        ({"model.layers.0.mlp.gate": 4}, "gate, which"),
        ({"model.norm": 4}, "LlamaRMSNorm"),
        ({"model.layers.0.mlp.gate_proj": 7}, "does not fit"),
        ({"model.layers.0.mlp.gate_proj": "7"}, "cannot be used"),
    ],
)
def test_a_folder_with_wrong_ranks_is_refused(ranks, message, tmp_path):
    pela.save(pela.export(wrapped()), tmp_path)
    (tmp_path / RANKS).write_text(json.dumps({"ranks": ranks}))
    with pytest.raises(InputError, match=message):
        pela.load(AutoConfig.from_pretrained(tmp_path), tmp_path)


# Refusals


def test_what_is_not_possible_says_so():
    model = wrapped()
    with pytest.raises(UnsupportedError):
        model.merge_and_unload()
    base = testing.TINY_MODELS["llama"].base()
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="up_proj"):
        petl.wrap(base, "pela")
