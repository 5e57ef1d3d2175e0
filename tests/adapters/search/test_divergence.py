"""The divergence of a model from itself: against a loop, over prefixes, on every kind of output."""

import pytest
import torch

import petl
from petl import testing
from petl.adapters import search
from petl.testing.models import tiny_bert, tiny_llama, tiny_t5

IGNORED = -100


def token_batches(seed=0):
    """Two batches of tokens with some labels, of different lengths."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for rows, length in ((3, 9), (2, 6)):
        ids = torch.randint(3, 90, (rows, length), generator=rng)
        labels = ids.clone()
        labels[torch.rand(labels.shape, generator=rng) < 0.4] = IGNORED
        mask = torch.ones_like(ids)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def class_batches():
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (5, 7), generator=rng)
    labels = torch.randint(0, 5, (5,), generator=rng)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}]


def wrapped(base, task):
    return testing.stir(petl.wrap(base, "lora", r=2, target_modules="all-linear", task_type=task))


@torch.no_grad()
def change(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(1.5)


@torch.no_grad()
def position_logits(model, batches):
    """Logits at the labels, position by position: those of the token before, for a decoder."""
    found = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for own, labels in zip(logits, batch["labels"], strict=True):
            places = range(1, len(labels))
            found += [own[place - 1].double() for place in places if labels[place] != IGNORED]
    return found


def lumped(reference, logits, top):
    """KL of the `top` likeliest classes of the reference and one for all others."""
    p, q = reference.softmax(-1), logits.softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -p[i].item())
    pairs = [(p[i], q[i]) for i in order[:top]]
    if top < len(p):
        pairs.append((sum(p[i] for i in order[top:]), sum(q[i] for i in order[top:])))
    return sum(float(a * (a / b).log()) for a, b in pairs)


@pytest.mark.parametrize("top", [4, 96, 512])
def test_it_is_the_mean_over_the_first_labels_of_a_decoder(top):
    model, batches = wrapped(tiny_llama(2), "CAUSAL_LM").train(), token_batches()
    before = position_logits(model.eval(), batches)
    model.train()
    distance = search.Divergence(model, batches, top)
    assert distance.total == len(before)
    assert distance(1000) == pytest.approx(0, abs=1e-6)
    change(model)
    assert model.training
    after = position_logits(model.eval(), batches)
    expected = [lumped(p, q, top) for p, q in zip(before, after, strict=True)]
    for tokens in (1, 5, len(expected) - 1, len(expected), 1000):
        first = expected[:tokens]
        assert distance(tokens) == pytest.approx(sum(first) / len(first), rel=1e-4, abs=1e-8)


def test_batches_behind_the_last_position_that_counts_are_not_computed():
    model = wrapped(tiny_llama(2), "CAUSAL_LM").eval()
    batches = [*token_batches(), *token_batches(1)]
    whole = search.Divergence(model, batches)
    first = sum(whole.counts[0])
    for most, computed in ((1, 1), (first, 1), (first + 1, 2), (whole.total + 5, 4)):
        distance = search.Divergence(model, batches, most=most)
        assert (distance.total, len(distance.reference)) == (min(most, whole.total), computed)
        loss = search.TaskLoss(model, batches, most=most)
        assert (loss.total, len(loss.batches)) == (min(most, whole.total), computed)
    part = search.Divergence(model, batches, most=first + 1)
    change(model)
    assert part(first) == whole(first)
    assert part(1000) == whole(first + 1)


def test_a_classifier_has_one_position_to_a_row():
    model, batches = wrapped(tiny_bert(), "SEQ_CLS").eval(), class_batches()
    (batch,) = batches
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        distance = search.Divergence(model, batches)
        change(model)
        after = model(**inputs).logits
    assert distance.total == 5
    expected = [lumped(p.double(), q.double(), 5) for p, q in zip(before, after, strict=True)]
    assert distance(3) == pytest.approx(sum(expected[:3]) / 3, rel=1e-4)


def test_the_labels_of_an_encoder_decoder_are_not_shifted():
    model, batches = wrapped(tiny_t5(), "SEQ_2_SEQ_LM").eval(), token_batches()
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
        distance = search.Divergence(model, batches)
        change(model)
        after = [model(**batch).logits for batch in batches]
    expected = [
        lumped(p.double(), q.double(), 512)
        for batch, one, two in zip(batches, before, after, strict=True)
        for label, p, q in zip(
            batch["labels"].flatten(), one.flatten(0, 1), two.flatten(0, 1), strict=True
        )
        if label != IGNORED
    ]
    assert distance(1000) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_the_loss_of_the_task_is_that_of_the_model():
    model, batches = wrapped(tiny_bert(), "SEQ_CLS").eval(), class_batches()
    loss = search.TaskLoss(model, batches)
    with torch.no_grad():
        expected = float(model(**{name: t[:3] for name, t in batches[0].items()}).loss)
    assert loss(3) == pytest.approx(expected)


def test_what_cannot_be_measured_is_refused():
    model, batches = wrapped(tiny_llama(2), "CAUSAL_LM"), token_batches()
    unlabeled = [{**b, "labels": torch.full_like(b["labels"], IGNORED)} for b in batches]
    regression = wrapped(tiny_bert(), "SEQ_CLS")
    regression.base_model.model.classifier.modules_to_save["default"] = torch.nn.Linear(64, 1)
    for call, words in (
        (lambda: search.Divergence(model, unlabeled), "2 calibration batches"),
        (lambda: search.Divergence(model, batches, 0), "top=0"),
        (lambda: search.Divergence(model, batches)(0), "tokens=0"),
        (lambda: search.Divergence(regression, class_batches()), "--metric loss"),
    ):
        with pytest.raises(petl.InputError, match=words):
            call()
