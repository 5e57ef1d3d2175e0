"""Nested widths: draws, value and gradients of the term, against two passes written out."""

import copy
import json
import math
from collections import Counter

import pytest
import torch
from density_cases import gradients
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError
from petl.methods.losses.nested import NestedConfig

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
METHODS = {
    "lora": {"r": 8},
    "dora": {"r": 8},
    "mola": {"r": 8, "num_experts": 3, "router_aux_loss_coef": 0.0},
    "adapter": {"r": 8},
    "compacter": {"r": 8, "phm_dim": 2},
}


def wrapped(method="lora", tiny="llama", **more):
    torch.manual_seed(1)
    fields = {**METHODS[method], **more}
    model = petl.wrap(testing.TINY_MODELS[tiny].base(), method, task_type=TASKS[tiny], **fields)
    return testing.stir(model).train(), testing.TINY_MODELS[tiny].batch()


def nest(model, **fields):
    torch.manual_seed(7)
    return petl.losses.attach(model, NestedConfig(**fields))


def counted(tiny, batch):
    """The positions of the logits whose label counts."""
    labels = batch["labels"]
    if TASKS[tiny] == "CAUSAL_LM":
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return labels != -100


def written_out(model, batch, k, tiny="llama", how="kl", paths=(), *, scale="full", **weights):
    """The total and its gradients, with two passes: all rows, and the first of them at width k."""
    share, weight, distill = (weights.get(n, d) for n, d in DEFAULTS)
    n = math.ceil(share * len(batch["labels"]))
    few = {name: tensor[:n] for name, tensor in batch.items()}
    seen = []
    base = model.get_base_model()
    hooks = [
        base.get_submodule(p).register_forward_hook(lambda m, a, out: seen.append(out))
        for p in paths
    ]
    full = model(**batch)
    with petl.at_width(model, k, scale):
        small = model(**few)
    for hook in hooks:
        hook.remove()
    mask = counted(tiny, few)
    if how == "features":
        half, terms = len(seen) // 2, []
        for Y, y in zip(seen[:half], seen[half:], strict=True):
            Y, y = (t[0] if isinstance(t, tuple) else t for t in (Y, y))
            Y = Y[:n].detach()
            terms.append(((y - Y) ** 2).sum(-1)[mask] / (Y**2).sum(-1)[mask])
        distance = torch.stack(terms).mean()
    elif how == "mse":
        distance = ((small.logits - full.logits[:n].detach()) ** 2).mean(-1)[mask].mean()
    else:
        p, q = full.logits[:n].detach().softmax(-1), small.logits.softmax(-1)
        distance = (p * (p.log() - q.log())).sum(-1)[mask].mean()
    total = full.loss + weight * small.loss + distill * distance
    total.backward()
    return total.detach(), gradients(model), small.loss.detach(), distance.detach()


DEFAULTS = (("share", 0.3), ("weight", 1.0), ("distill", 1.0))


def agrees(model, batch, tiny="llama", **fields):
    """Assert that value and gradients are those written out; return the term."""
    term = nest(model, **fields)
    output = model(**batch)
    output.loss.backward()
    found, k = gradients(model), term.width
    values = term.series()
    term.remove()
    more = {n: v for n, v in fields.items() if n not in ("distance", "widths")}
    how = fields.get("distance", "kl")
    paths = [f"model.layers.{i}" for i in range(3)] if how == "features" else ()
    total, expected, loss, distance = written_out(model, batch, k, tiny, how, paths, **more)
    torch.testing.assert_close(output.loss.detach(), total)
    if fields.get("weight", 1.0):
        assert values["nested_loss"] == pytest.approx(float(loss), rel=1e-5)
    if fields.get("distill", 1.0):
        assert values["nested_distill"] == pytest.approx(float(distance), rel=1e-2, abs=1e-6)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    return term


# Value and gradient


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"share": 1.0, "distance": "mse", "distill": 3.0},
        {"share": 0.5, "distill": 0.0, "weight": 0.5},
        {"share": 0.5, "weight": 0.0, "distill": 20.0, "scale": "width"},
        {"distance": "features", "distill": 5.0},
        {"widths": [1, 5, 8], "scale": "width"},
    ],
)
def test_the_step_is_that_of_two_passes(fields):
    model, batch = wrapped()
    agrees(model, batch, **fields)


@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_that_of_two_passes_for_each_method(method):
    model, batch = wrapped(method)
    agrees(model, batch, share=0.5)


@pytest.mark.parametrize("tiny", ["gpt2", "bert", "t5"])
def test_the_step_is_that_of_two_passes_on_each_model(tiny):
    model, batch = wrapped(tiny=tiny)
    agrees(model, batch, tiny)


@pytest.mark.parametrize("method", ["lora", "mola", "compacter"])
def test_checkpointing_repeats_each_width_as_it_was(method):
    model, batch = wrapped(method)
    plain = copy.deepcopy(model)
    nest(model).context.step = 3
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    nest(plain).context.step = 3
    plain(**batch).loss.backward()
    found, expected = gradients(model), gradients(plain)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_gradient_enters_whatever_loss_is_computed_from_the_outputs():
    model, batch = wrapped()
    term = nest(model)
    logits = model(**batch).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    found, k = gradients(model), term.width
    term.remove()
    _, expected, _, _ = written_out(model, batch, k)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_components_above_the_width_get_no_gradient_from_it():
    model, batch = wrapped()
    nest(model, widths=[3, 8], share=1.0)
    # a loss without any gradient of its own leaves that of the term
    (0 * model(**batch).loss).backward()
    for name, grad in gradients(model).items():
        kept, above = (grad[:3], grad[3:]) if "lora_A" in name else (grad[:, :3], grad[:, 3:])
        assert kept.any()
        assert not above.any()


def test_the_weight_of_a_micro_batch_scales_the_term():
    model, batch = wrapped()
    term, life = nest(model, widths=[3, 8]), petl.lifecycle(model)
    found = []
    for weight in (1.0, 0.25):
        life.aux_weight = weight
        (0 * model(**batch).loss).backward()
        found.append(gradients(model))
    assert life.metrics()["aux_loss"] == pytest.approx(sum(term.series().values()))
    for name, grad in found[0].items():
        torch.testing.assert_close(0.25 * grad, found[1][name])


def test_without_labels_there_is_the_distance_alone(caplog):
    model, batch = wrapped()
    term = nest(model)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    for _ in range(2):
        model(**inputs).logits.mean().backward()
    assert [*term.series()] == ["nested_distill"]
    assert sum("no labels" in record.message for record in caplog.records) == 1


def test_evaluation_and_a_disabled_adapter_have_no_term():
    model, batch = wrapped()
    term = nest(model)
    with model.disable_adapter():
        model(**batch)
    model.eval()(**batch)
    assert term.width is None


# Draws


def test_draws_are_uniform_and_follow_from_seed_and_step():
    model, _ = wrapped()
    term = nest(model, widths=[1, 2, 4, 8])
    term.seed = 5
    drawn = [term.draw(step) for step in range(1000)]
    assert drawn == [term.draw(step) for step in range(1000)]
    sigma = math.sqrt(1000 * 1 / 3 * 2 / 3)
    counts = Counter(drawn)
    assert counts.keys() == {1, 2, 4}
    assert all(abs(count - 1000 / 3) < 3 * sigma for count in counts.values())
    term.seed = 6
    assert drawn != [term.draw(step) for step in range(1000)]


@pytest.mark.thorough
def test_steps_are_those_of_the_optimizer_with_and_without_a_lifecycle():
    widths = {}
    for driven in (False, True):
        model, batch = wrapped()
        term = nest(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        life = petl.lifecycle(model)
        if driven:
            life.attach_optimizer(optimizer)
        widths[driven] = []
        for step in range(1, 13):
            for _ in range(2):  # micro-batches
                model(**batch).loss.backward()
                widths[driven].append(term.width)
            optimizer.step()
            if driven:
                life.after_step(step, optimizer)
            optimizer.zero_grad()
        assert widths[driven][::2] == widths[driven][1::2]
        assert len({*widths[driven]}) == 2
    assert widths[False] == widths[True]


def test_the_random_state_is_that_of_plain_training_with_dropout_too():
    states, outputs = [], []
    for nested in (False, True):
        model, batch = wrapped(lora_dropout=0.2)
        if nested:
            nest(model)
        torch.manual_seed(3)
        outputs.append(model(**batch).logits)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert torch.equal(*outputs)


# Files and trainers


def test_the_adapter_is_saved_with_its_widths(tmp_path):
    model, _ = wrapped()
    nest(model, widths=[3, 8], scale="width")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "nested.json").read_text())
    assert content == {"widths": [3, 8], "scale": "width"}


def test_wrap_takes_it_as_other_losses():
    model = petl.wrap(
        testing.tiny_llama(), "nested", method="lora", method_config={"r": 6}, widths=[2, 6]
    )
    assert model.nesting.widths == [2, 6]
    model, _ = wrapped(r=24)
    assert nest(model).widths == [2, 4, 8, 16, 24]
    # each unit of a width is in all blocks
    model, _ = wrapped("compacter", r=24, phm_dim=4)
    assert nest(model).widths == [4, 8, 16, 24]


def test_trainer_draws_by_its_steps(tmp_path):
    model, batch = wrapped()
    term = nest(model)
    rows = [{name: t[i % len(t)] for name, t in batch.items()} for i in range(8)]
    args = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    Trainer(model, args, train_dataset=rows, callbacks=[petl.Callback()]).train()
    assert term.context.step == 3
    assert term.width == term.draw(2)
    assert (tmp_path / "checkpoint-3" / "nested.json").is_file()


# Refusals


def test_a_second_term_and_further_inputs_are_refused():
    model, batch = wrapped()
    nest(model)
    with pytest.raises(InputError):
        nest(model)
    batch["pixel_values"] = torch.zeros(5, 2)
    with pytest.raises(UnsupportedError):
        model(**batch)


def test_kl_of_a_regression_is_refused_and_mse_is_meant():
    base = testing.tiny_bert()
    base.config.problem_type = "regression"
    fields = {"method": "lora", "method_config": {"r": 4, "task_type": "SEQ_CLS"}}
    with pytest.raises(InputError):
        petl.wrap(base, "nested", **fields)
    model = petl.wrap(base, "nested", distance="mse", **fields).train()
    batch = testing.TINY_MODELS["bert"].batch()
    batch["labels"] = torch.randn(len(batch["labels"]), 5)
    model(**batch).loss.backward()
    assert model.nesting.series().keys() == {"nested_loss", "nested_distill"}
