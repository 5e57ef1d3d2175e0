"""`petl.train_together`, compared with a training of its own for each adapter."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import petl
from petl.core.model.copies import share_weights
from petl.errors import UnsupportedError
from petl.testing.models import (
    causal_batch,
    class_batch,
    image_batch,
    pair_batch,
    tiny_bert,
    tiny_llama,
    tiny_qwen3_moe,
    tiny_t5,
    tiny_vit,
)

LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}


def full_batch(make, rows: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch without padding, so that batches of all jobs have one shape."""
    batch = make(rows, seed)
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 3)
    labels = batch["labels"] if batch["labels"].dim() == 1 else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def separate(base: nn.Module, job: petl.Job) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Train one job alone, by a loop that is written out; return losses, tensors and the model."""
    train, seed = dict(job.train), job.train.get("seed", 0)
    torch.manual_seed(seed)
    model = petl.wrap(share_weights(base), job.method, **job.fields)
    petl.fuse_lora(model)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    heads = [p for n, p in trained.items() if "modules_to_save" in n]
    matrices = [p for n, p in trained.items() if p.dim() > 1 and "modules_to_save" not in n]
    vectors = [p for n, p in trained.items() if p.dim() == 1 and "modules_to_save" not in n]
    groups = [
        {"params": matrices, "lr": train["lr"], "weight_decay": 0.01},
        {"params": vectors, "lr": train["lr"], "weight_decay": 0.0},
        {"params": [p for p in heads if p.dim() > 1], "lr": 1e-2, "weight_decay": 0.01},
        {"params": [p for p in heads if p.dim() == 1], "lr": 1e-2, "weight_decay": 0.0},
    ]
    groups = [{**group, "peak": group["lr"]} for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, fused=True)
    life = petl.lifecycle(model)
    life.attach_optimizer(optimizer, 0, train["steps"])
    torch.manual_seed(seed)
    losses, total = [], train["steps"]
    warmup = train.get("warmup", 0)
    batches = itertools.cycle(job.batches)
    for step in range(1, total + 1):
        loss = model(**next(batches)).loss
        loss.backward()
        done = (step - 1 - warmup) / max(1, total - warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (step / warmup if step <= warmup else 1 - done)
        nn.utils.clip_grad_norm_(trained.values(), train.get("max_grad_norm", 1.0))
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in trained.items()}, model.eval()


def difference(tensors: dict[str, torch.Tensor], trained: petl.TrainResult) -> float:
    """The largest difference of a trained tensor."""
    found = dict(trained.model.named_parameters())
    assert {n for n, p in found.items() if p.requires_grad} == tensors.keys()
    return max((tensors[n] - found[n].detach()).abs().max().item() for n in tensors)


def jobs_of(make, method: str, fields: dict[str, Any], rate: float = 1e-3) -> list[petl.Job]:
    """Five jobs that differ in rate, length, seed and rows, with clipping that acts."""
    return [
        petl.Job(
            method,
            [make(4, 10 * k + i) for i in range(4)],
            {"steps": 4 + k, "lr": rate * (k + 1), "warmup": k, "seed": k, "max_grad_norm": 0.5},
            fields,
        )
        for k in range(5)
    ]


@pytest.mark.thorough
@pytest.mark.parametrize(("build", "bound"), [(tiny_llama, 0), (tiny_qwen3_moe, 2e-6)])
def test_adapters_on_rows_of_one_length_equal_their_own_training(build, bound):
    """Three at a time, of five that end at different steps, with dropout of each."""
    base = build()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    jobs = jobs_of(
        lambda rows, seed: full_batch(causal_batch, rows, seed),
        "lora",
        {**LORA, "target_modules": "block-linear", "task_type": "CAUSAL_LM"},
    )
    for job, trained in zip(jobs, petl.train_together(base, jobs, together=3), strict=True):
        losses, tensors, _ = separate(base, job)
        assert trained.losses == pytest.approx(losses, rel=bound, abs=0)
        assert difference(tensors, trained) <= bound
        assert trained.steps == job.train["steps"]
    after = base.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losses[-1] < losses[0]


@pytest.mark.thorough
@pytest.mark.parametrize(("build", "attention"), [(tiny_bert, "sdpa"), (tiny_t5, "eager")])
def test_dropout_in_the_base_is_that_of_each_adapter_to_the_bit(build, attention):
    """Masks of an adapter's rows come from its own generator, as in a pass of its own."""
    torch.manual_seed(0)
    base = build()
    config = type(base.config)(**{**base.config.to_dict(), **DROPOUT[build]})
    config._attn_implementation = attention
    base = type(base)(config)
    make = {tiny_bert: class_batch, tiny_t5: pair_batch}[build]
    kind = {tiny_bert: "SEQ_CLS", tiny_t5: "SEQ_2_SEQ_LM"}[build]
    shapes = make(4, 0)

    def whole(rows, seed):
        batch = make(rows, seed)
        masks = {n: torch.ones_like(t) for n, t in batch.items() if n.endswith("mask")}
        assert all(batch[n].shape == shapes[n].shape for n in batch)
        return batch | masks

    jobs = jobs_of(whole, "lora", {**LORA, "task_type": kind})[:3]
    for job, trained in zip(jobs, petl.train_together(base, jobs, together=2), strict=True):
        losses, tensors, _ = separate(base, job)
        assert trained.losses == losses
        assert difference(tensors, trained) == 0


DROPOUT = {
    tiny_bert: {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    tiny_t5: {"dropout_rate": 0.2},
}


def test_a_base_whose_random_numbers_cannot_be_told_apart_is_refused():
    class Noisy(type(tiny_bert())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.randn_like(output.logits) * self.training
            return output

    train, fields = {"steps": 1}, {"task_type": "SEQ_CLS"}
    base = tiny_bert()
    base.__class__ = Noisy
    with pytest.raises(UnsupportedError):
        petl.train_together(base, [petl.Job("lora", [class_batch(2, 0)], train, fields)])
    base = tiny_bert()
    base.config.layerdrop = 0.1
    with pytest.raises(UnsupportedError):
        petl.train_together(base, [petl.Job("lora", [class_batch(2, 0)], train, fields)])


FAMILIES = {
    "llama": (tiny_llama, causal_batch, "CAUSAL_LM"),
    "t5": (tiny_t5, pair_batch, "SEQ_2_SEQ_LM"),
    "vit": (tiny_vit, image_batch, None),
}


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_heads_and_other_families_equal_their_own_training(family):
    build, make, task_type = FAMILIES[family]
    base = build()
    fields = {**LORA, "lora_dropout": 0.0, "task_type": task_type}
    if family == "vit":
        fields |= {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
        fields["target_modules"] = "all-linear"
        fields["exclude_modules"] = ["classifier"]
    jobs = jobs_of(make, "lora", fields)[:3]
    for job, trained in zip(jobs, petl.train_together(base, jobs, together=2), strict=True):
        losses, tensors, _ = separate(base, job)
        torch.testing.assert_close(trained.losses, losses, atol=2e-6, rtol=1e-6)
        assert difference(tensors, trained) < 1e-5


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("mos", {"r": 2, "lora_dropout": 0.2}),
        ("mola", {"r": 2, "num_experts": 4, "lora_dropout": 0.2}),
        ("adapter", {"bneck_dropout": 0.2}),
        ("increlora", {"tinit": 1, "deltaT": 2}),
    ],
)
def test_other_methods_equal_their_own_training(method, fields):
    base = tiny_bert()
    jobs = jobs_of(class_batch, method, {**fields, "task_type": "SEQ_CLS"}, rate=3e-4)[:3]
    for job, trained in zip(jobs, petl.train_together(base, jobs, together=2), strict=True):
        losses, tensors, _ = separate(base, job)
        torch.testing.assert_close(trained.losses, losses, atol=1e-5, rtol=1e-5)
        assert difference(tensors, trained) < 2e-5
        assert losses[-1] < losses[0]


def test_ranks_alphas_and_dropouts_may_differ():
    """Smaller ranks are filled up; batches have other numbers of rows and tokens."""
    base, jobs = tiny_llama(), []
    for k, (r, alpha) in enumerate([(8, 16), (2, 16), (4, 1)]):
        batch = causal_batch(2 + k, k)
        batch = {name: value[:, : 9 - k] for name, value in batch.items()}
        fields = {"r": r, "lora_alpha": alpha, "target_modules": "all-linear"}
        train = {"steps": 4, "lr": 1e-3, "seed": k, "head_lr": None}
        jobs.append(petl.Job("lora", [batch], train, {**fields, "task_type": "CAUSAL_LM"}))
    for job, trained in zip(jobs, petl.train_together(base, jobs, together=3), strict=True):
        losses, tensors, _ = separate(base, job)
        torch.testing.assert_close(trained.losses, losses, atol=2e-6, rtol=1e-6)
        assert difference(tensors, trained) < 1e-6


def test_early_stopping_and_best_weights_are_of_each_adapter():
    """Scores that fall from the start, or rise to the end, by job."""
    base, seen = tiny_bert(), {}

    def falling(model):
        assert not model.training
        seen.setdefault("weights", [p.clone() for p in model.parameters() if p.requires_grad])
        seen["score"] = seen.get("score", 0) - 1
        return seen["score"]

    def rising(model):
        seen["last"] = seen.get("last", 0) + 1
        return seen["last"]

    batches = [class_batch(3, 0)]
    train = {"steps": 12, "lr": 1e-3, "eval_steps": 2, "early_stopping": 2}
    fields = {"task_type": "SEQ_CLS"}
    jobs = [petl.Job("lora", batches, train, fields, evaluate) for evaluate in (falling, rising)]
    first, second = petl.train_together(base, jobs, together=2)
    assert (first.steps, first.score, first.best_step) == (6, -1, 2)
    assert (second.steps, second.score, second.best_step) == (12, 6, 12)
    now = [p for p in first.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(now, seen["weights"], strict=True))


def test_the_best_weights_of_a_method_that_grows_have_their_ranks():
    seen = []

    def falling(model):
        found = {n: b.clone() for n, b in model.named_buffers() if n.endswith(".rank")}
        seen.append((found, model(**class_batch(4, 3)).logits))
        return -len(seen)

    fields = {"task_type": "SEQ_CLS", "tinit": 1, "deltaT": 1, "target_r": 3}
    train = {"steps": 8, "lr": 1e-2, "eval_steps": 2}
    job = petl.Job("increlora", [class_batch(3, 0)], train, fields, falling)
    (trained,) = petl.train_together(tiny_bert(), [job])
    (ranks, logits), (later, _) = seen[0], seen[-1]
    assert trained.best_step == 2
    assert sum(later.values()) > sum(ranks.values())
    now = dict(trained.model.named_buffers())
    assert all(torch.equal(now[name], rank) for name, rank in ranks.items())
    assert torch.equal(trained.model(**class_batch(4, 3)).logits, logits)


def test_a_score_that_is_undefined_is_the_worst():
    scores = [[math.nan, 1.0, 0.5], [math.nan] * 3, [1.0, math.nan, 2.0]]
    train = {"steps": 6, "lr": 1e-3, "eval_steps": 2}
    jobs = [
        petl.Job("lora", [class_batch(3, 0)], train, {"task_type": "SEQ_CLS"}, evaluate)
        for evaluate in (lambda _, rest=rest: next(rest) for rest in map(iter, scores))
    ]
    found = petl.train_together(tiny_bert(), jobs, together=3)
    assert [(one.score, one.best_step) for one in found] == [(1.0, 4), (None, None), (2.0, 6)]


@pytest.mark.thorough
def test_a_trained_adapter_saves_and_loads_alone(tmp_path):
    base = tiny_bert()
    jobs = jobs_of(class_batch, "lora", {**LORA, "task_type": "SEQ_CLS"})[:2]
    trained = petl.train_together(base, jobs, together=2)
    batch = class_batch(3, 7)
    for k, each in enumerate(trained):
        each.model.save_pretrained(tmp_path / str(k))
        loaded = petl.load(tiny_bert(), tmp_path / str(k)).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, each.model(**batch).logits)


@pytest.mark.thorough
def test_without_a_number_small_steps_share_a_pass(monkeypatch):
    """About 512 tokens in a pass: 15 batches of 4 x 8 tokens, so all five jobs at once."""
    sizes = []
    from petl.efficiency.together.group import AdapterGroup

    losses = AdapterGroup.losses
    monkeypatch.setattr(
        AdapterGroup,
        "losses",
        lambda self, batches: sizes.append(len(batches)) or losses(self, batches),
    )
    jobs = jobs_of(class_batch, "lora", {"task_type": "SEQ_CLS"})
    petl.train_together(tiny_bert(), jobs)
    assert sizes == [5] * 4 + [4, 3, 2, 1]


def test_jobs_of_two_methods_or_on_other_modules_are_refused():
    batches, train = [class_batch(2, 0)], {"steps": 1}
    lora = petl.Job("lora", batches, train, {"task_type": "SEQ_CLS"})
    mos = petl.Job("mos", batches, train, {"r": 2, "task_type": "SEQ_CLS"})
    key = petl.Job("lora", batches, train, {"target_modules": ["key"], "task_type": "SEQ_CLS"})
    for other, words in ((mos, "LoraConfig and MosConfig"), (key, "modules")):
        with pytest.raises(petl.InputError, match=words):
            petl.train_together(tiny_bert(), [lora, other], together=2)


def test_jobs_are_a_list_of_jobs_that_is_checked_before_anything_trains(monkeypatch):
    job = petl.Job("lora", [class_batch(2, 0)], {"steps": 1}, {"task_type": "SEQ_CLS"})
    wrong = petl.Job("lora", [class_batch(2, 0)], {"steps": 1.5})
    monkeypatch.setattr("petl.training.together.jobs.wrap", None)  # would be called to train
    for jobs, part in (
        (job, r"got one petl\.Job: give it a list of jobs, \[job\]"),
        ([], r"jobs=\[\]"),
        (iter([job]), "jobs=list_iterator"),
        ([job, {"steps": 1}], r"jobs\[1\] is of type dict"),
        ([job, wrong], r"steps=1\.5"),
    ):
        with pytest.raises(petl.InputError, match=part):
            petl.train_together(tiny_bert(), jobs)


def test_settings_may_be_numbers_of_numpy_and_null_is_the_default():
    given = {"steps": np.int64(2), "lr": np.float64(1e-3), "betas": (0.9, 0.95), "seed": None}
    job = petl.Job("lora", [class_batch(2, 0)], given, {"task_type": "SEQ_CLS"})
    (trained,) = petl.train_together(tiny_bert(), [job])
    assert trained.steps == 2
    settings = job.settings(trained.model.active_peft_config)
    assert (settings.lr, settings.betas, settings.seed) == (1e-3, [0.9, 0.95], 0)
    job.train = {"steps": 2, "lr": None}
    settings = job.settings(trained.model.active_peft_config)
    assert settings.lr == petl.method("lora").default_lr({})


def test_packed_rows_are_refused():
    ids = torch.arange(3, 11)[None]
    batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}
    job = petl.Job("lora", [{**batch, "labels": ids}], {"steps": 1}, {"task_type": "CAUSAL_LM"})
    with pytest.raises(UnsupportedError):
        petl.train_together(tiny_llama(2), [job])


def test_a_loss_that_is_not_known_from_the_logits_is_refused():
    class Other(type(tiny_bert())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.loss is not None:
                output.loss = 2 * output.loss
            return output

    base = tiny_bert()
    base.__class__ = Other
    job = petl.Job("lora", [class_batch(2, 0)], {"steps": 1}, {"task_type": "SEQ_CLS"})
    with pytest.raises(UnsupportedError):
        petl.train_together(base, [job])
