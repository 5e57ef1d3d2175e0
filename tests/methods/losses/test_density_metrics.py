"""Density and PPL-p% sparsity, against explicit counts, and in reports of runs."""

import json
import math
from contextlib import nullcontext
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from density_cases import MODELS, batch_of, dense, llama, lora, lora_on_attention, mixtral
from peft.tuners.lora import LoraLayer
from torch import nn
from training_fixtures import bert_config, train
from transformers import BertForSequenceClassification

import petl
from petl import testing
from petl.adapters.export import saved_adapter
from petl.data.tasks.base import Pad, batch_of_texts
from petl.data.tasks.causal_lm import CausalLM
from petl.errors import InputError
from petl.methods.losses.density.ppl import PplLayer
from petl.training.evaluate import Evaluator

pytest_plugins = ["training_fixtures"]


# Density


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("name", ["llama-relu", "t5"])
def test_measure_counts_each_sample_and_module(name, threshold):
    model = lora(MODELS[name][0]())
    data = [batch_of(name, 4), batch_of(name, 2, seed=3)]
    term, seen = dense(model), {}
    modules = dict(model.get_base_model().named_modules())
    for layer in term.sites.layers:
        modules[layer].register_forward_hook(
            lambda m, a, out, key=layer: seen.setdefault(key, []).extend(out)
        )
    model.train()
    found = term.measure(data, threshold=threshold)
    assert model.training
    fractions = {
        key: sum(float((a.abs() > threshold).float().mean()) for a in samples) / len(samples)
        for key, samples in seen.items()
    }
    assert all(len(samples) == 6 for samples in seen.values())
    assert found["per_layer"] == pytest.approx(fractions)
    assert found["density"] == pytest.approx(sum(fractions.values()) / len(fractions))
    stacks = {"encoder", "decoder"} & set(found)
    assert stacks == ({"encoder", "decoder"} if name == "t5" else set())
    for stack in stacks:
        ours = [s for key, s in fractions.items() if stack in key]
        assert found[stack] == pytest.approx(sum(ours) / len(ours))


def test_measure_warns_that_silu_is_never_exactly_zero():
    term = dense(lora(llama("silu")))
    with pytest.warns(UserWarning, match="silu"):
        found = term.measure([batch_of("llama-silu")])
    assert found["density"] == 1.0


def test_a_report_logs_missing_metrics_once(petl_log):
    term = dense(lora(llama("silu")))
    for _ in range(2):
        assert set(term.report([batch_of("llama-silu")])) == {"density", "ppl_1_sparsity"}
    assert petl_log.messages == [
        "density counts exact nonzeros, but exact zeros never occur with silu: set loss.threshold"
    ]
    petl_log.clear()
    dense(lora(llama("silu")), threshold=0.05).report([batch_of("llama-silu")])
    assert not petl_log.messages


def test_a_report_is_without_the_search_if_the_config_says_so(petl_log):
    term = dense(lora(llama("relu")), ppl_sparsity=False)
    found = term.report([batch_of("llama-relu")])
    assert found == {"density": term.measure([batch_of("llama-relu")])["density"]}
    assert petl_log.messages == ["the metrics have no ppl_1_sparsity: ppl_sparsity=False"]


def test_a_model_that_predicts_no_tokens_has_no_perplexity_to_report(petl_log):
    """With an untrained head every neuron could be left out: before and after would not compare."""
    model, batch = lora(MODELS["bert-gelu"][0]()), batch_of("bert-gelu")
    assert dense(model).report([batch]) == {"density": 1.0}
    assert petl_log.messages == [
        "the metrics have no ppl_1_sparsity: BertForSequenceClassification predicts no tokens, so "
        "it has no perplexity"
    ]
    found = model.activation_density.ppl_sparsity([batch], p=5.0)  # over its classes, if requested
    assert found["ppl_sparse"] <= 1.05 * found["ppl_dense"]
    with pytest.raises(InputError):
        model.activation_density.ppl_sparsity([{**batch, "labels": batch["labels"].float()}])


def test_batches_without_a_label_count_for_nothing():
    model, batch = lora(MODELS["llama-relu"][0]()), batch_of("llama-relu")
    dense(model)
    silent = {**batch_of("llama-relu", seed=4), "labels": torch.full_like(batch["labels"], -100)}
    found = model.activation_density.ppl_sparsity([batch])
    both = model.activation_density.ppl_sparsity([batch, silent])
    assert both["ppl_dense"] == found["ppl_dense"]
    for none in ([silent], []):
        with pytest.raises(InputError):
            model.activation_density.ppl_sparsity(none)


def effective(layer):
    """The weight [O, F] of a layer, including a LoRA update."""
    adapted = isinstance(layer, LoraLayer)
    weight = layer.base_layer.weight
    return (weight + layer.get_delta_weight("default") if adapted else weight).detach()


def masked_run(model, names, thresholds, batches):
    """Perplexity and fraction of kept neurons with weak neurons set to 0, written explicitly."""
    modules, fractions, nll, count = dict(model.get_base_model().named_modules()), {}, 0.0, 0

    def hook(module, args, name):
        strength = args[0].abs() * effective(module).norm(dim=0)
        keep = strength >= thresholds[name]
        fractions.setdefault(name, []).append(keep.float().mean(-1).flatten())
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
    kept = {n: float(torch.cat(s).mean()) for n, s in fractions.items()}
    return math.exp(nll / count), kept


def cett(weight, a, threshold):
    """Mean over tokens of the norm of the weak neurons' output over the norm of the output."""
    parts = [a[t][:, None] * weight.t() for t in range(len(a))]  # [F, O]: each neuron's output
    left = [p[p.norm(dim=1) < threshold].sum(0).norm() / p.sum(0).norm() for p in parts]
    return float(torch.stack(left).mean())


@torch.no_grad()
def test_the_bias_of_a_layer_is_no_part_of_what_is_left_out():
    layer = nn.Linear(6, 3)
    a = torch.randn(5, 6)
    found = PplLayer("down", layer)
    found.held = [a]
    found.begin()
    left = a * (a.abs() * layer.weight.norm(dim=0) < 0.4)
    expected = (left @ layer.weight.t()).norm(dim=1) / layer(a).norm(dim=1)
    assert found.cett(0.4) == pytest.approx(float(expected.mean()), rel=1e-5)


def trained(model, batch):
    testing.training.train(model.train(), batch, steps=40, lr=1e-2)
    return model.eval()


@pytest.mark.thorough
def test_ppl_sparsity_follows_from_its_thresholds():
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
            weight = effective(model.get_base_model().get_submodule(name))
            # a neuron of just this strength is kept, and its norm here may be rounded below it
            cost = cett(weight, acts[name], threshold * (1 - 1e-6))
            assert cost <= found["cett"] + 1e-5
            assert cost >= 0.97 * found["cett"]  # as close as single neurons allow
        assert found["sparsity"] >= last
        last = found["sparsity"]


@pytest.mark.thorough
def test_thresholds_agree_with_a_search_over_a_grid():
    """The published search tries quantiles; the largest valid value of a fine grid must agree."""
    data = [batch_of("llama-relu", 4)]
    model = trained(lora(llama()), data[0])
    found = dense(model).ppl_sparsity(data, p=5.0)
    name = "model.layers.1.mlp.down_proj"
    layer, seen = model.get_base_model().get_submodule(name), []
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**data[0])
    weight = effective(layer)
    top = float((seen[0].abs() * weight.norm(dim=0)).max())
    grid = [top * i / 200 for i in range(1, 201)]
    fits = [e for e in grid if cett(weight, seen[0], e) <= found["cett"]]
    assert abs(max(fits, default=0.0) - found["thresholds"][name]) <= top / 200 * 1.5


@pytest.mark.thorough
def test_activations_beyond_the_memory_bound_are_recomputed(monkeypatch):
    data = [batch_of("llama-relu", 4)]
    model = trained(lora(llama()), data[0])
    term = dense(model)
    expected = term.ppl_sparsity(data, p=5.0)
    monkeypatch.setattr("petl.methods.losses.density.ppl.HELD_BYTES", 1)
    assert term.ppl_sparsity(data, p=5.0) == expected


@pytest.mark.parametrize(
    ("method", "fields"),
    [("mola", {}), ("adapter", {"placement": "parallel"}), ("adapter", {"residual": True})],
)
def test_adapters_that_are_no_matrix_are_measured_by_the_base_layer(method, fields):
    """A router, a network that reads another module's input, a network after the projection."""
    data = [testing.TINY_MODELS["llama"].batch()]
    model = testing.Case(method, "llama", fields).wrap_stirred()
    found = dense(model).ppl_sparsity(data, p=10.0)
    ppl, kept = masked_run(model, list(found["thresholds"]), found["thresholds"], data)
    assert found["ppl_sparse"] == pytest.approx(ppl, rel=1e-5)
    assert found["per_layer"] == pytest.approx({n: 1 - k for n, k in kept.items()}, abs=1e-6)


def test_a_convolution_over_tokens_after_the_projection_is_supported():
    """Its layer cannot be called on single vectors, so its columns cannot be computed."""
    model = testing.Case("adapter", "bert", {"block": "conformer"}).wrap_stirred()
    found = dense(model).ppl_sparsity([batch_of("bert-gelu")], p=10.0)
    assert found["ppl_sparse"] <= found["ppl_dense"] * 1.1 + 1e-6


def test_ppl_sparsity_needs_labels_and_down_projections():
    term = dense(lora(llama()))
    with pytest.raises(InputError):
        term.ppl_sparsity([{"input_ids": batch_of("llama-relu")["input_ids"]}])
    with pytest.raises(InputError):
        term.ppl_sparsity([batch_of("llama-relu")], p=-1)
    experts = dense(lora_on_attention(mixtral()))
    with pytest.raises(InputError):
        experts.ppl_sparsity([batch_of("llama-relu")])
    assert "ppl_1_sparsity" not in experts.report([batch_of("llama-relu")])


# In runs


def test_a_run_reports_metrics_before_and_after(tiny, tmp_path):
    choice = [
        "+method=mola",
        "+loss=density",
        "loss.eps=1e-2",
        "loss.weight=3",
        "train.log_steps=2",
    ]
    run = train([*tiny.steady, *choice], tmp_path / "run")
    for moment in ("before", "after"):
        assert run.scores[moment]["density"] > 0
    saved = json.loads((run.path / "adapter" / "density.json").read_text())
    assert (saved["weight"], saved["eps"]) == (3, 1e-2)
    assert saved["measured"] == {"density": run.scores["after"]["density"]}
    for line in run.metrics:
        assert line["aux_loss"] > 3 * line["density_loss"] > 0  # it includes MoLA's balance loss
    config = bert_config()
    config.num_labels = 3
    assert petl.load(BertForSequenceClassification(config), run.path / "adapter")


@pytest.mark.thorough
def test_a_language_model_has_both_metrics_in_the_file_the_table_and_petl_eval(
    tiny, tmp_path, capsys
):
    far = ["train.lr=0.1", "method.r=4", "loss.threshold=0.01"]  # so that both metrics change
    run = train([*tiny.complete, "+method=deft", *far], tmp_path / "run")
    before, after = run.scores["before"], run.scores["after"]
    out = capsys.readouterr().out
    for metric in ("density", "ppl_1_sparsity"):
        assert before[metric] != after[metric]
        assert metric in out
    for label, scores in (("before training", before), ("adapted", after)):
        (line,) = (line for line in out.splitlines() if label in line)
        assert f"{100 * scores['density']:.1f} %" in line
        assert f"{100 * scores['ppl_1_sparsity']:.1f} %" in line
    saved = json.loads((run.path / "adapter" / "density.json").read_text())
    again = saved_adapter.score(saved_adapter.find(run.path))
    for metric, value in saved["measured"].items():
        assert value == after[metric] == pytest.approx(again[metric])


@pytest.mark.parametrize("processes", [2, 5])
def test_metrics_use_the_same_padding_on_any_number_of_processes(processes, monkeypatch):
    lengths = [3, 1, 9, 4, 7, 2, 8, 5, 6]
    rows = Dataset.from_list(
        [{"input_ids": [n] * n, "attention_mask": [1] * n, "labels": 0} for n in lengths]
    )
    task = CausalLM(max_length=9)
    splits = SimpleNamespace(task=task, test=rows, collate=partial(batch_of_texts, Pad(0)))
    monkeypatch.setattr(Evaluator, "rows", lambda *arguments, **more: {})

    def batches_of(rank, processes):
        seen = []

        def report(batches):
            seen.extend(batch["input_ids"].tolist() for batch in batches)
            return {}

        monkeypatch.setattr(
            "petl.training.evaluate.lifecycle",
            lambda model: SimpleNamespace(report=report, losses=["density"]),
        )
        here = {"process_index": rank, "num_processes": processes, "autocast": nullcontext}
        accelerator = SimpleNamespace(**here, device=torch.device("cpu"))
        Evaluator(nn.Identity(), splits, accelerator, 4).test()
        return seen

    fractions = [batches_of(rank, processes) for rank in range(processes)]
    assert sorted(chain.from_iterable(fractions)) == sorted(batches_of(0, 1))


@pytest.mark.thorough
def test_metrics_are_computed_in_the_precision_of_the_run(tiny, tmp_path):
    """A bf16 model has a float32 head, which needs autocast."""
    short = ["train.steps=1", "model.dtype=bfloat16"]
    run = train([*tiny.steady, "+method=lora", "+loss=density", *short], tmp_path / "run")
    assert 0.9 < run.scores["after"]["density"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("+loss=densty", "densty"),
        ("+loss.method=mola", "loss.method"),
        ("loss.gradient_accumulation_steps=2", "gradient_accumulation_steps"),
        ("train.gradient_checkpointing=reentrant", "reentrant"),
        ("loss.weigth=1", "weigth"),
        ("loss.eps=0", "eps=0"),
        ("loss.activation_modules=[act_fun]", "act_fun"),
    ],
)
def test_a_bad_loss_stops_the_run_before_it_begins(tiny, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        train([*tiny.steady, "+method=lora", "+loss=density", change], tmp_path / "run")
    assert not (tmp_path / "run").exists()
