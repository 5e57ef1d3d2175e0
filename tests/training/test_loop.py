"""The training loop, on tiny models in this process."""

import math
import os
import signal
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from training_fixtures import Finished, train, train_until_killed, trained_once
from transformers import BertForSequenceClassification

import petl
from petl.data.base import read_data
from petl.data.models.loading import load_base, load_tokenizer
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.errors import InputError, RunStopped
from petl.training import loop
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.features import features_of, orders_of
from petl.training.runs.checkpoint import verify
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]


def assert_same(one: Finished, other: Finished, **tolerance: float) -> None:
    """Equal adapters; bit-exact unless a tolerance is given."""
    assert one.adapter.keys() == other.adapter.keys()
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(other.adapter[name], tensor, **(tolerance or EXACT))


EXACT = {"atol": 0.0, "rtol": 0.0}
# eight steps of AdamW in float32: sums in another order differ in the last digits, and early steps
# divide by their size
SPLIT = {"atol": 5e-5, "rtol": 1e-3}


def test_the_loop_does_what_a_loop_written_by_hand_does(tiny, tmp_path):
    common = [*tiny.steady, "+method=lora", "train.steps=9", "train.warmup=3", "train.buckets=null"]
    run = train(common, tmp_path / "run")

    cfg = compose(common)
    torch.manual_seed(0)
    data, tokenizer = read_data(cfg.data), load_tokenizer(cfg.model)
    rows, collate = data.task.encode(tokenizer, data.train), data.task.collate(tokenizer)
    targets = ["query", "key", "value", "intermediate.dense", "output.dense"]
    config = LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=targets)
    model = get_peft_model(load_base(cfg.model, data.task), config)
    head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    matrices = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "lr": 1e-3, "weight_decay": 0.01},
            {"params": [p for p in head if p.dim() == 2], "lr": 1e-2, "weight_decay": 0.01},
            {"params": [p for p in head if p.dim() == 1], "lr": 1e-2, "weight_decay": 0.0},
        ]
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(9):  # seven batches are an epoch of fifty rows
        generator = torch.Generator().manual_seed(step // 7)
        order = torch.randperm(50, generator=generator).tolist()
        at = 8 * (step % 7)
        batch = collate([rows[i] for i in order[at : at + 8]])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([*head, *matrices], 1.0)
        share = [1 / 3, 2 / 3, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6][step]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(run.adapter[name], tensor, atol=1e-6, rtol=1e-5)


# Any split of the same rows


@pytest.mark.thorough
@pytest.mark.parametrize(("task", "method"), [("steady", "lora"), ("complete", "mola")])
def test_micro_batches_of_any_size_train_like_the_whole_batch(tiny, tmp_path, task, method):
    common = [*getattr(tiny, task), f"+method={method}", "train.steps=4", "train.log_steps=1"]
    if method == "mola":  # its balance statistics are about one forward, so a split changes them
        common.append("method.router_aux_loss_coef=0")
    whole = train(common, tmp_path / "whole")
    for size in (3, 1):
        cut = train([*common, f"train.micro_batch_size={size}"], tmp_path / f"by_{size}")
        assert_same(whole, cut, **SPLIT)
        for one, other in zip(whole.metrics, cut.metrics, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [["train.buckets=4", "train.max_tokens=64"], ["train.batch_sizes={6: 11, 8: 8, 12: 5}"]],
)
def test_steps_of_similar_rows_pad_less_and_may_be_cut_as_well(tiny, tmp_path, settings):
    common = [*tiny.complete, "+method=lora", "train.steps=8", "train.log_steps=1"]
    bucketed = [*common, *settings]
    plain = trained_once(*common, "train.buckets=null")
    whole = train(bucketed, tmp_path / "whole")
    cut = train([*bucketed, "train.micro_batch_size=3"], tmp_path / "cut")
    assert_same(whole, cut, **SPLIT)
    assert cut.scores["padding"] <= whole.scores["padding"] < plain.scores["padding"] / 2
    assert plain.metrics[-1]["padding"] == plain.scores["padding"]


@pytest.mark.thorough
def test_packed_texts_may_be_cut_into_micro_batches(tiny, tmp_path):
    common = [*tiny.complete, "+method=lora", "data.pack=true", "train.steps=4"]
    whole = train(common, tmp_path / "whole")
    cut = train([*common, "train.micro_batch_size=3"], tmp_path / "cut")
    assert_same(whole, cut, **SPLIT)
    assert cut.scores["after"] == pytest.approx(whole.scores["after"], rel=1e-4)
    assert whole.scores["after"]["loss"] < whole.scores["before"]["loss"]
    assert whole.scores["padding"] < 0.05


def without_most_labels(monkeypatch):
    """Leave labels on fillers only, so that some rows have none."""
    collate = CausalLM.collate

    def masking(self, *args):
        def collated(rows):
            batch = original(rows)
            return {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] < 12, -100)}

        original = collate(self, *args)
        return collated

    monkeypatch.setattr(CausalLM, "collate", masking)


@pytest.mark.thorough
def test_a_micro_batch_without_labels_counts_nothing(tiny, tmp_path, monkeypatch):
    without_most_labels(monkeypatch)
    common = [*tiny.complete, "+method=lora", "train.steps=8"]
    whole = train(common, tmp_path / "whole")
    cut = train([*common, "train.micro_batch_size=1"], tmp_path / "cut")
    assert_same(whole, cut, **SPLIT)


@pytest.mark.thorough
def test_the_auxiliary_loss_counts_once_whatever_the_accumulation(tiny, tmp_path):
    # all rows alike: then each micro-batch has the statistics of the whole
    rows = tiny.folder / "alike.csv"
    rows.write_text("text,label\n" + "the red dog,color\n" * 16 + "a big axe,tool\n" * 16)
    common = [
        *(o for o in tiny.steady if not o.startswith(("data.train", "data.test"))),
        *(
            f"data.train={rows}",
            f"data.test={rows}",
            "data.allow_overlap=true",
            "+method=mola",
            "train.batch_size=32",
        ),
        *("method.router_aux_loss_coef=1", "train.log_steps=1", "train.max_grad_norm=null"),
    ]
    whole = train([*common, "train.steps=1"], tmp_path / "whole").metrics[0]
    # rows come interleaved, so that every micro-batch holds both kinds; their shares differ a bit
    cut = train([*common, "train.steps=1", "train.micro_batch_size=16"], tmp_path / "cut").metrics[
        0
    ]
    assert cut["aux_loss"] == pytest.approx(whole["aux_loss"], rel=0.02)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.05)


# Order and hooks


def test_the_method_acts_after_the_optimizer_and_before_gradients_are_cleared(
    tiny, tmp_path, monkeypatch
):
    seen = []
    after_step = petl.Lifecycle.after_step

    def watching(self, step, optimizer):
        gradients = [p.grad is not None for g in optimizer.param_groups for p in g["params"]]
        counts = {int(s["step"]) for s in optimizer.state.values()}
        seen.append((step, all(gradients), counts))
        after_step(self, step, optimizer)

    monkeypatch.setattr(petl.Lifecycle, "after_step", watching)
    train([*tiny.steady, "+method=lora", "train.steps=3"], tmp_path / "run")
    assert seen == [(1, True, {1}), (2, True, {2}), (3, True, {3})]


def test_training_lowers_the_loss_and_raises_the_score(tiny, tmp_path):
    fast = ["train.steps=60", "train.lr=1e-2", "train.head_lr=5e-2"]
    fast.append("train.buckets=null")  # a random model of fifty rows needs mixed steps to learn
    run = train([*tiny.steady, "+method=lora", *fast], tmp_path / "run")
    assert run.metrics[-1]["loss"] < 0.85 * run.metrics[0]["loss"]
    assert run.scores["after"]["accuracy"] > run.scores["before"]["accuracy"] + 0.2


@pytest.mark.cells(1)
@pytest.mark.parametrize("kind", ["true", "reentrant"])
def test_gradient_checkpointing_changes_losses_by_rounding_only(tiny, tmp_path, kind):
    common = [*tiny.complete, "+method=lora"]
    plain = trained_once(*common)
    saving = train([*common, f"train.gradient_checkpointing={kind}"], tmp_path / "saving")
    assert_same(plain, saving, atol=1e-6, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_a_segmented_loss_trains_alike(tiny, tmp_path, precision):
    common = [*tiny.complete, "+method=mola", f"train.precision={precision}"]
    whole = train([*common, "train.loss_segment=null"], tmp_path / "whole")
    for name, segment in (("auto", []), ("five", ["train.loss_segment=5"])):
        found = train([*common, *segment], tmp_path / name)
        tolerance = (
            {"atol": 1e-6, "rtol": 1e-5} if precision == "no" else {"atol": 3e-3, "rtol": 0.0}
        )
        assert_same(whole, found, **tolerance)


@pytest.mark.thorough
def test_a_bf16_model_and_bf16_products_learn_as_float32_does(tiny, tmp_path):
    common = [*tiny.steady, "+method=lora", "train.steps=20", "train.log_steps=20"]
    exact = train(common, tmp_path / "exact").metrics[0]["loss"]
    half = train([*common, "train.precision=bf16"], tmp_path / "half").metrics[0]["loss"]
    assert half == pytest.approx(exact, rel=0.02)


# The log


@pytest.mark.thorough
def test_a_log_line_is_the_mean_of_the_steps_since_the_last(tiny, tmp_path):
    common = [*tiny.steady, "+method=mola", "train.steps=5"]
    each = train([*common, "train.log_steps=1"], tmp_path / "each").metrics
    pairs = train([*common, "train.log_steps=2"], tmp_path / "pairs").metrics
    assert [m["step"] for m in pairs] == [2, 4, 5]
    for key in ("loss", "aux_loss", "grad_norm"):
        expected = [sum(m[key] for m in pair) / 2 for pair in (each[0:2], each[2:4])]
        assert [m[key] for m in pairs[:2]] == pytest.approx(expected, rel=1e-5)
    assert pairs[2]["loss"] == pytest.approx(each[4]["loss"], rel=1e-5)


@pytest.mark.thorough
def test_a_line_of_more_steps_than_are_kept_is_the_mean_of_the_last(tiny, tmp_path, monkeypatch):
    common = [*tiny.steady, "+method=lora", "train.steps=7", "train.score_before=false"]
    each = train([*common, "train.log_steps=1"], tmp_path / "each").metrics
    monkeypatch.setattr(loop, "MOST_ROWS", 2)
    few = [*common, "train.log_steps=5", "train.save_steps=4"]
    lines = train(few, tmp_path / "few").metrics
    expected = [sum(m["loss"] for m in each[end - 2 : end]) / 2 for end in (5, 7)]
    assert [m["step"] for m in lines] == [5, 7]
    assert [m["loss"] for m in lines] == pytest.approx(expected, rel=1e-5)
    train_until_killed(few, tmp_path / "killed", step=5)
    assert [m["loss"] for m in train([*few, "train.resume=auto"], tmp_path / "killed").metrics] == [
        m["loss"] for m in lines
    ]


@pytest.mark.thorough
def test_the_loss_is_logged_without_the_auxiliary_loss(tiny, tmp_path):
    common = [*tiny.steady, "+method=mola", "train.log_steps=1", "train.steps=1"]
    small = train([*common, "method.router_aux_loss_coef=0.001"], tmp_path / "small").metrics[0]
    large = train([*common, "method.router_aux_loss_coef=10"], tmp_path / "large").metrics[0]
    assert large["aux_loss"] == pytest.approx(1e4 * small["aux_loss"], rel=1e-3)
    assert large["loss"] == pytest.approx(small["loss"], abs=1e-4)


@pytest.mark.thorough
def test_nothing_is_fetched_from_the_device_between_log_lines(tiny, tmp_path, monkeypatch):
    fetched = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, original=original, name=name):
            if self.requires_grad or self.is_floating_point():
                fetched.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    before_and_after = {}
    for steps in (3, 9):
        fetched.clear()
        overrides = [*tiny.complete, "+method=lora", f"train.steps={steps}", "train.log_steps=100"]
        train([*overrides, "train.save_steps=null"], tmp_path / f"{steps}")
        before_and_after[steps] = len(fetched)
    assert before_and_after[3] == before_and_after[9]


# Evaluation that steers


@pytest.mark.cells(1)
@pytest.mark.parametrize(("losses", "best"), [([1.0] * 5, 2), ([1.0, 1.0, 1.0, 0.9, 1.0], 4)])
def test_the_adapter_is_that_of_the_best_evaluation(tiny, tmp_path, monkeypatch, losses, best):
    course = iter(zip([0.3, 0.9, 0.5, 0.9, 0.1], losses, strict=True))
    original = Classification.summarize

    def summarize(self, total):
        scores = original(self, total)
        is_held_out = scores["rows"] == 10  # the test has twenty
        chosen = dict(zip(("accuracy", "loss"), next(course), strict=True)) if is_held_out else {}
        return scores | chosen

    monkeypatch.setattr(Classification, "summarize", summarize)
    common = [*tiny.steady, "+method=lora", "train.steps=5", "train.eval_steps=1"]
    common += ["train.validation_share=0.2", "train.save_steps=1", "train.keep_checkpoints=1"]
    run = train(common, tmp_path / "run")
    assert run.scores["best_step"] == best  # of the two best the one with the lower loss, or first
    assert run.scores["validation_scores"]["loss"] == losses[best - 1]
    assert run.checkpoints == [f"step-00000{best}", "step-000005"]
    folder = run.path / "checkpoints" / f"step-00000{best}" / "adapter"
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(run.adapter[name], tensor)


def test_training_stops_early_when_evaluations_get_no_better(tiny, tmp_path, petl_log):
    common = [*tiny.steady, "+method=lora", "train.steps=40", "train.lr=1e-9", "train.head_lr=1e-9"]
    run = train([*common, "train.eval_steps=2", "train.early_stopping=3"], tmp_path / "run")
    assert (
        "early stopping after step 8 of 40: no better validation accuracy in 3 eval"
        in petl_log.text
    )
    assert run.scores["steps"] == 8  # the first evaluation, then three without a better accuracy
    first = next(line["validation"] for line in run.metrics if "validation" in line)
    assert run.scores["validation"] == first["accuracy"]


def test_a_validation_score_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):
    original = Classification.summarize

    def summarize(self, total):
        return {**original(self, total), "loss": math.nan}

    monkeypatch.setattr(Classification, "summarize", summarize)
    common = [*tiny.steady, "+method=lora", "train.eval_steps=2", "train.test=false"]
    with pytest.raises(RunStopped):
        train(common, tmp_path / "run")
    assert all("validation" not in line for line in Finished(tmp_path / "run").metrics)


def test_the_test_rows_are_scored_before_and_after_only(tiny, tmp_path, monkeypatch):
    sizes = []
    original = Classification.summarize

    def counting(self, total):
        scores = original(self, total)
        sizes.append(scores["rows"])
        return scores

    monkeypatch.setattr(Classification, "summarize", counting)
    common = [*tiny.steady, "+method=lora", "train.steps=4", "train.eval_steps=2"]
    run = train(common, tmp_path / "run")
    assert sizes == [20, 5, 5, 20]
    assert [m["step"] for m in run.metrics if "validation" in m] == [2, 4]


# What ends a run early


def poison(monkeypatch, at: int) -> None:
    """Make the loss NaN from forward pass `at` on."""
    calls = []
    original = Classification.items

    def items(self, batch):
        calls.append(1)
        if len(calls) >= at:
            batch["labels"] = batch["labels"] * 0 - 100  # the mean over no label at all is NaN
        return original(self, batch)

    monkeypatch.setattr(Classification, "items", items)


def test_a_nan_loss_stops_with_its_step_and_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, at=6)
    common = [*tiny.steady, "+method=lora", "train.steps=30", "train.save_steps=2"]
    with pytest.raises(RunStopped, match="step 6 ") as stopped:
        train(common, tmp_path / "run")
    assert stopped.value.status == 1
    kept = Finished(tmp_path / "run").checkpoints
    assert kept == ["step-000002", "step-000004"]
    for name in kept:
        verify(tmp_path / "run" / "checkpoints" / name)


@pytest.mark.thorough
def test_a_run_without_a_gradient_says_that_nothing_is_trained(
    tiny, tmp_path, monkeypatch, petl_log
):
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(loss * 0))
    train([*tiny.steady, "+method=lora"], tmp_path / "run")
    assert "the gradient has been 0 up to step 1, so nothing is trained" in petl_log.text


def test_a_weight_that_is_not_finite_is_never_saved(tiny, tmp_path, monkeypatch):
    after_step = petl.Lifecycle.after_step

    def breaking(self, step, optimizer):
        after_step(self, step, optimizer)
        if step == 3:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(petl.Lifecycle, "after_step", breaking)
    common = [*tiny.steady, "+method=lora", "train.steps=3", "train.save_steps=1"]
    with pytest.raises(RunStopped):
        train(common, tmp_path / "run")
    assert Finished(tmp_path / "run").checkpoints == ["step-000001", "step-000002"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(
    tiny, tmp_path, monkeypatch, number, status
):
    after_step = petl.Lifecycle.after_step

    def interrupting(self, step, optimizer):
        if step == 3:
            os.kill(os.getpid(), number)
        after_step(self, step, optimizer)

    monkeypatch.setattr(petl.Lifecycle, "after_step", interrupting)
    before = signal.getsignal(number)
    with pytest.raises(RunStopped) as stopped:
        train([*tiny.steady, "+method=lora", "train.steps=30"], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    assert stopped.value.status == status
    assert "after step 3 of 30; to resume: petl train " in str(stopped.value)
    assert str(stopped.value).endswith(f"train.resume={checkpoint}")
    verify(checkpoint)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path, monkeypatch):
    steps = []

    def twice(self, step, optimizer):
        steps.append(step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(petl.Lifecycle, "after_step", twice)
    with pytest.raises(KeyboardInterrupt):
        train([*tiny.steady, "+method=lora", "train.steps=30"], tmp_path / "run")
    assert steps == [1]


def test_a_step_without_a_label_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "items", lambda self, batch: 0)
    with pytest.raises(InputError):
        train([*tiny.steady, "+method=lora"], tmp_path / "run")


def test_a_model_without_gradient_checkpointing_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    with pytest.raises(InputError):
        train([*tiny.steady, "+method=lora", "train.gradient_checkpointing=true"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_learning_rates_follow_the_schedule(tiny, tmp_path):
    common = [*tiny.steady, "+method=lora", "train.steps=8", "train.log_steps=1", "train.warmup=2"]
    rates = [m["lr"] for m in train(common, tmp_path / "run").metrics]
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    falls = [a - b for a, b in pairwise(rates[2:])]
    assert falls == pytest.approx([1e-3 / 6] * 5)


# What a run says of itself


@pytest.mark.thorough
def test_each_pass_of_a_run_has_a_line(tiny, tmp_path, petl_log):
    words = [*tiny.steady, "+method=corda", "method.r=2", "method.calibration_data.num_samples=4"]
    words += ["train.linear_probe=true", "train.find_lr=true", "train.find_lr_steps=10"]
    train([*words, "train.eval_steps=2"], tmp_path / "run")
    lines = iter(petl_log.messages)
    for begin in (
        "calibrating the initial values of the adapter: 4 batches",
        "linear probe: features of 45 examples: 1 batch",
        "linear probe: features of 20 examples: 1 batch",
        "linear probe: training the head: 24 steps",
        "before training: scored in the pass of the linear probe",
        "range test, learning rates from 1e-06 to 1: 10 steps",
        "training: 4 steps, metrics every step (train.log_steps)",
        "scoring 20 test examples after training: 1 batch",
    ):
        assert begin in lines, (begin, petl_log.messages)  # in this order


@pytest.mark.cells(1)
@pytest.mark.parametrize(("steps", "points"), [(4, 4), (50, 25)])
def test_a_short_run_has_a_curve(tiny, tmp_path, steps, points):
    words = [*tiny.steady, "+method=lora", f"train.steps={steps}", "train.score_before=false"]
    run = train(words, tmp_path / "run")
    assert len(run.metrics) == points
    assert "before" not in run.scores
    assert TrainConfig().log_interval(10_000) == 10


@pytest.mark.parametrize(
    ("kind", "words", "sorts"),
    [
        ("classify", [], True),
        ("classify", ["train.batch_size=8"], False),
        ("complete", [], True),
        ("complete", ["data.pack=true"], False),
        ("classify", ["data.order=by_class", "train.steps=null"], False),
    ],
    ids=["texts", "few steps", "language model", "packed", "class by class"],
)
def test_rows_of_similar_length_share_a_step_by_default_where_they_can(tiny, kind, words, sorts):
    cfg = compose([*getattr(tiny, kind), "+method=lora", "train.batch_size=2", *words])
    config = read_config(cfg)
    splits = encode_splits(
        config.data.read(),
        load_tokenizer(cfg.model),
        config.train,
        Accelerator(cpu=True),
        orders_of(features_of(config.resolved)),
    )
    assert (splits.buckets is not None) is sorts
