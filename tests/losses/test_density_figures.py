"""Density and PPL-p% sparsity, against counts that are written out, and in reports of runs."""

import json
import math

import pytest
import torch
from density_cases import MODELS, batch_of, dense, llama, lora, lora_on_attention, mixtral
from training_fixtures import bert_config, train
from transformers import BertForSequenceClassification

import petl
from petl import testing
from petl.errors import InputError

pytest_plugins = ["training_fixtures"]


# Density


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("name", ["llama-relu", "t5"])
def test_measure_counts_each_sample_and_module(name, threshold):
    model = lora(MODELS[name][0]())
    data = [batch_of(name, 4), batch_of(name, 2, seed=3)]
    term, seen = dense(model), {}
    modules = dict(model.get_base_model().named_modules())
    for layer in term.places.layers:
        modules[layer].register_forward_hook(
            lambda m, a, out, key=layer: seen.setdefault(key, []).extend(out)
        )
    model.train()
    found = term.measure(data, threshold=threshold)
    assert model.training
    shares = {
        key: sum(float((a.abs() > threshold).float().mean()) for a in samples) / len(samples)
        for key, samples in seen.items()
    }
    assert all(len(samples) == 6 for samples in seen.values())
    assert found["per_layer"] == pytest.approx(shares)
    assert found["density"] == pytest.approx(sum(shares.values()) / len(shares))
    stacks = {"encoder", "decoder"} & set(found)
    assert stacks == ({"encoder", "decoder"} if name == "t5" else set())
    for stack in stacks:
        ours = [s for key, s in shares.items() if stack in key]
        assert found[stack] == pytest.approx(sum(ours) / len(ours))


def test_measure_warns_that_silu_is_never_silent():
    term = dense(lora(llama("silu")))
    with pytest.warns(UserWarning, match="exact zeros never occur with silu"):
        found = term.measure([batch_of("llama-silu")])
    assert found["density"] == 1.0
    assert set(term.report([batch_of("llama-silu")])) == {"ppl_1_sparsity"}


def effective(layer):
    """The adapted weight [O, F] of a LoRA layer, and its bias."""
    weight = layer.weight + layer.get_delta_weight("default")
    return weight.detach(), layer.base_layer.bias


def masked_run(model, names, thresholds, batches):
    """Perplexity and kept share of a run with weak neurons set to 0, written out."""
    modules, shares, nll, count = dict(model.get_base_model().named_modules()), {}, 0.0, 0

    def hook(module, args, name):
        strength = args[0].abs() * effective(module)[0].norm(dim=0)
        keep = strength >= thresholds[name]
        shares.setdefault(name, []).append(keep.float().mean(-1).flatten())
        return (args[0] * keep,)

    handles = [
        modules[n].register_forward_pre_hook(lambda m, args, n=n: hook(m, args, n)) for n in names
    ]
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"][:, 1:]
            logits = model.eval()(**batch).logits[:, :-1].log_softmax(-1)
            keep = labels != -100
            nll -= float(logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][keep].sum())
            count += int(keep.sum())
    for handle in handles:
        handle.remove()
    kept = {n: float(torch.cat(s).mean()) for n, s in shares.items()}
    return math.exp(nll / count), kept


def cett(weight, a, threshold):
    """Mean over tokens of the norm of what the weak neurons add over that of the whole output."""
    parts = [a[t][:, None] * weight.t() for t in range(len(a))]  # [F, O]: each neuron's output
    left = [p[p.norm(dim=1) < threshold].sum(0).norm() / p.sum(0).norm() for p in parts]
    return float(torch.stack(left).mean())


def trained(model, batch):
    testing.training.train(model.train(), batch, steps=40, lr=1e-2)
    return model.eval()


def test_ppl_sparsity_is_what_its_thresholds_give():
    data = [batch_of("llama-relu", 4), batch_of("llama-relu", 3, seed=2)]
    model = trained(lora(llama(layers=3)), data[0])
    term = dense(model)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    dense_ppl, _ = masked_run(model, names, dict.fromkeys(names, 0.0), data)
    inputs = {}
    for name in names:
        model.get_base_model().get_submodule(name).register_forward_pre_hook(
            lambda m, args, n=name: inputs.setdefault(n, []).append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    acts = {n: torch.cat(parts) for n, parts in inputs.items()}

    last = -1.0
    for p in (1.0, 10.0, 50.0):
        found = term.ppl_sparsity(data, p=p)
        ppl, kept = masked_run(model, names, found["thresholds"], data)
        assert found["ppl_dense"] == pytest.approx(dense_ppl, rel=1e-5)
        assert found["ppl_sparse"] == pytest.approx(ppl, rel=1e-5)
        assert ppl / dense_ppl <= 1 + p / 100 + 1e-6
        assert found["per_layer"] == pytest.approx({n: 1 - k for n, k in kept.items()}, abs=1e-6)
        assert found["sparsity"] == pytest.approx(1 - sum(kept.values()) / 3, abs=1e-6)
        assert found["activation_ratio"] == pytest.approx(1 - found["sparsity"])
        for name, threshold in found["thresholds"].items():
            weight, _ = effective(model.get_base_model().get_submodule(name))
            cost = cett(weight, acts[name], threshold)
            assert cost <= found["cett"] + 1e-5
            assert cost >= 0.97 * found["cett"]  # as close as single neurons allow
        assert found["sparsity"] >= last
        last = found["sparsity"]


def test_thresholds_agree_with_a_search_over_a_grid():
    """The published search tries quantiles; the largest of a fine grid that fits must agree."""
    data = [batch_of("llama-relu", 4)]
    model = trained(lora(llama()), data[0])
    found = dense(model).ppl_sparsity(data, p=5.0)
    name = "model.layers.1.mlp.down_proj"
    layer, seen = model.get_base_model().get_submodule(name), []
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**data[0])
    weight, _ = effective(layer)
    top = float((seen[0].abs() * weight.norm(dim=0)).max())
    grid = [top * i / 200 for i in range(1, 201)]
    fits = [e for e in grid if cett(weight, seen[0], e) <= found["cett"]]
    assert abs(max(fits, default=0.0) - found["thresholds"][name]) <= top / 200 * 1.5


def test_activations_that_do_not_fit_are_computed_again(monkeypatch):
    data = [batch_of("llama-relu", 4)]
    model = trained(lora(llama()), data[0])
    term = dense(model)
    expected = term.ppl_sparsity(data, p=5.0)
    monkeypatch.setattr("petl.losses.density.ppl.HELD_BYTES", 1)
    assert term.ppl_sparsity(data, p=5.0) == expected


def test_a_routed_down_projection_is_measured_by_its_base():
    model = testing.Case("mola", "llama").wrap_stirred()
    found = dense(model).ppl_sparsity([batch_of("llama-relu")], p=10.0)
    assert found["ppl_sparse"] <= found["ppl_dense"] * 1.1 + 1e-6


def test_ppl_sparsity_needs_labels_and_down_projections():
    term = dense(lora(llama()))
    with pytest.raises(InputError, match="needs labels"):
        term.ppl_sparsity([{"input_ids": batch_of("llama-relu")["input_ids"]}])
    with pytest.raises(InputError, match="p=-1 is negative"):
        term.ppl_sparsity([batch_of("llama-relu")], p=-1)
    experts = dense(lora_on_attention(mixtral()))
    with pytest.raises(InputError, match="no down projection found"):
        experts.ppl_sparsity([batch_of("llama-relu")])
    assert "ppl_1_sparsity" not in experts.report([batch_of("llama-relu")])


# In runs


def test_a_run_reports_figures_before_and_after(tiny, tmp_path):
    choice = [
        "+method=mola",
        "+loss=density",
        "loss.eps=1e-2",
        "loss.weight=3",
        "train.log_steps=2",
    ]
    run = train([*tiny.steady, *choice], tmp_path / "run")
    figures = {"density", "ppl_1_sparsity"}
    for moment in ("before", "after"):
        assert figures < set(run.scores[moment])
    told = json.loads((run.path / "adapter" / "density.json").read_text())
    assert (told["weight"], told["eps"]) == (3, 1e-2)
    assert figures == set(told["measured"])
    for line in run.metrics:
        assert line["aux_loss"] > 3 * line["density_loss"] > 0  # the balance of MoLA is in it too
    config = bert_config()
    config.num_labels = 3
    assert petl.load(BertForSequenceClassification(config), run.path / "adapter")
