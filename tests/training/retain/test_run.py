"""`retain.data` in a run: measured, shown, and without effect on training."""

import json
import math
from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch
from media_fixtures import VIT, images
from safetensors.torch import load_file
from task_fixtures import TEMPLATE
from training_fixtures import train, words, write_model
from transformers import GPT2Config, GPT2LMHeadModel

import petl
from petl.cli.main import main
from petl.data.batch_sampler import StepSampler
from petl.data.overlap import normalized
from petl.errors import InputError
from petl.experiments.reports.run_report import write_page
from petl.system.processes import release_all
from petl.training.frozen import FrozenStore
from petl.training.retain.measure import Retained, RetainedText
from petl.training.retain.page import line_of
from petl.training.retain.replay import ReplayOrder
from petl.training.retain.rows import RetainedRow
from petl.training.retain.run import OtherRows, Retaining
from petl.training.retain.settings import RetainConfig
from petl.training.retain.texts import halves

pytest_plugins = ["media_fixtures", "task_fixtures", "training_fixtures"]
TEXTS = [f"{'the cat and a red dog ' * (1 + n % 3)}{n}" for n in range(12)]
MEASURED = ("retain.rows=10", "retain.max_length=32")
NOT_THE_BASE = ("+method=lora", "method.init_lora_weights=false")
AS_THE_BASE = ("method.init_lora_weights=true",)


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    return f"retain.data={file}"


def weights(run):
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("task", "method"),
    [
        (
            "causal_lm",
            ["+method=lora", "method.layers_to_transform=[1]", "train.cache_frozen=true"],
        ),
        pytest.param(
            "causal_lm",
            ["+method=corda", "method.calibration_data.num_samples=8"],
            marks=pytest.mark.thorough,
        ),
        ("seq2seq", ["+method=mola", "method.lora_dropout=0.2"]),
        ("regression", ["+method=corda", "method.calibration_data.num_samples=8"]),
        pytest.param(
            "causal_lm",
            ["+method=lora", "method.init_lora_weights=false"],
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["lora", "corda", "mola", "corda-features", "another-start"],
)
def test_measuring_changes_no_bit_of_training(task, method, families, texts, tmp_path):
    words = families(task, *method, "train.linear_probe=false")
    plain = train(words, tmp_path / "plain")
    measured = train([*words, texts, *MEASURED, "retain.curve=true"], tmp_path / "measured")
    one, other = weights(plain), weights(measured)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert plain.scores["after"] == measured.scores["after"]
    found = measured.scores["retained"]
    assert found["rows"] == 10
    is_features = task == "regression"
    assert (found.get("divergence") is None) == ("+method=corda" in method)
    lines = [
        json.loads(line) for line in (measured.path / "retained.jsonl").read_text().splitlines()
    ]
    assert [line["text"] for line in lines] == TEXTS[:10]
    name, key = ("drift", "retained_drift") if is_features else ("lost", "retained_lost")
    curve = [line[key] for line in measured.metrics if key in line]
    assert len(curve) == 2
    assert "retained" not in plain.scores
    # of the best step, which is one of the two
    assert min(abs(point - found[name]) for point in curve) < 1e-5
    assert found[name] != 0


def test_the_summary_and_the_page_say_it_and_eval_agrees(families, texts, tmp_path, capsys):
    words = families("causal_lm", "+method=lora", "train.linear_probe=false", texts, *MEASURED)
    run = train(words, tmp_path / "run")
    capsys.readouterr()
    write_page(run.path)
    page = (run.path / "report.html").read_text()
    first, _, rest = page.partition("What was lost")
    assert "on other text: loss " in first, "beside the scores"
    assert "On other text: loss " in rest
    file = texts.removeprefix("retain.data=")
    assert main(["eval", str(run.path), "--retain", file]) == 0
    again = json.loads((run.path / "eval-retained" / "scores.json").read_text())["retained"]
    assert again["rows"] == 12
    assert json.loads((run.path / "scores.json").read_text())["retained"]["rows"] == 10


@pytest.mark.parametrize(
    ("task", "method"),
    [("causal_lm", ("+method=binary", "method.inner=adapter")), ("regression", NOT_THE_BASE)],
    ids=["binary", "features"],
)
def test_what_the_start_of_a_method_has_lost_is_told_apart(task, method, families, texts, tmp_path):
    rates = ("train.lr=1e-9", "train.head_lr=1e-9")
    words = families(task, "train.linear_probe=false", texts, *MEASURED, *rates)
    run = train([*words, *method], tmp_path / "run")
    at_start = run.scores["retained_at_start"]
    name = "lost" if task == "causal_lm" else "drift"
    # at a rate of 1e-9 the end is as the start
    assert run.scores["retained"][name] == pytest.approx(at_start, rel=1e-2)
    write_page(run.path)
    assert f"; {at_start:+.2g} before the first step" in (run.path / "report.html").read_text()


def test_a_resumed_run_keeps_what_its_start_had_lost(families, tmp_path, monkeypatch):
    file = tmp_path / "many.jsonl"
    many = [f"the cat and a red dog {n}" for n in range(80)]
    file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in many))
    # a run of eight steps pays for all of them
    monkeypatch.setattr("petl.training.retain.run.SHARE", 10.0)
    words = families("causal_lm", "train.linear_probe=false", f"retain.data={file}", *NOT_THE_BASE)
    words += ["train.save_steps=4"]
    whole = train(words, tmp_path / "whole")
    assert whole.scores["retained"]["rows"] == 40, "half of them, since the start is measured too"

    def kill(self, step, optimizer):
        if step == 6:
            raise KeyboardInterrupt

    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", kill)
        with pytest.raises(KeyboardInterrupt):
            train(words, run)
    release_all()
    again = train([*words, "train.resume=auto"], run)
    assert again.scores["retained_at_start"] == whole.scores["retained_at_start"]
    assert again.scores["retained"] == whole.scores["retained"]
    assert "retained_at_start" not in train([*words, *AS_THE_BASE], tmp_path / "base").scores


@pytest.mark.thorough
def test_a_loss_that_is_not_finite_is_said():
    for after, word in ((900.0, "inf"), (math.nan, "nan")):
        lost = Retained.of([RetainedText("a b", 3, 1.0, after)])
        entry = json.loads(json.dumps(lost.entry()))
        assert word in line_of({"retained": entry, "retained_at_start": 0.25})
        assert "+0.25 before the first step" in line_of(
            {"retained": entry, "retained_at_start": 0.25}
        )


def test_a_limit_is_measured_in_a_short_run_too(families, texts, tmp_path):
    words = families("causal_lm", "+method=lora", "train.linear_probe=false", texts)
    run = train([*words, "retain.limit=5"], tmp_path / "run")
    assert run.scores["retained"]["rows"] == len(TEXTS)
    assert [line["step"] for line in run.metrics if "retained_lost" in line] == [4, 8]


@pytest.mark.parametrize(("k", "passes", "kept"), [(0, 1.0, 60), (2, 4.0, 43), (3, 30.0, 32)])
def test_a_run_that_stored_frozen_blocks_pays_for_fewer_texts(k, passes, kept):
    """With k of 4 blocks stored: 1 - k/4 + k/4 / (3 passes) of the cost, of 1 - k/8 a row."""
    own = Retaining(RetainConfig(data="bundled"), {})
    own.rows = [RetainedRow("x", [1] * 10)] * 60
    store = FrozenStore(True, {})
    store.cache = SimpleNamespace(k=k, prefix=SimpleNamespace(blocks=[None] * 4))
    splits = SimpleNamespace(passes=lambda settings: passes)
    own._spare(SimpleNamespace(features=[own, store], splits=splits, settings=None))
    assert len(own.rows) == kept
    # images, of which as many were chosen as the run pays for
    own.rows, own.other = (), OtherRows(["a"] * 60, dict, [1] * 60)
    own._spare(SimpleNamespace(features=[own, store], splits=splits, settings=None))
    assert len(own.other.names) == 60


@pytest.mark.thorough
def test_a_short_run_does_not_pay_for_texts(families, tmp_path, petl_log):
    words = families("causal_lm", "+method=lora", "train.linear_probe=false")
    run = train(words, tmp_path / "run")  # by default
    assert "retained" not in run.scores
    assert "what is lost on other texts is not measured" in petl_log.text


def test_texts_are_not_mixed_into_numbers(families, tmp_path):
    words = families("regression", "+method=lora", "train.linear_probe=false", "retain.mix=0.5")
    with pytest.raises(InputError):
        train(words, tmp_path / "run")


@pytest.mark.thorough
def test_the_best_checkpoint_is_the_best_within_the_limit(
    families, texts, tmp_path, petl_log, monkeypatch
):
    lost = {1: 0.01, 2: 0.04, 3: 0.02, 4: 0.05, 5: 0.03, 6: 0.07, 7: 0.06, 8: 0.09}
    words = families("causal_lm", "+method=lora", "train.linear_probe=false", texts, *MEASURED)
    words += ["train.lr=0.05", "train.eval_steps=1", "train.schedule=constant"]

    def best(name, limit):
        steps = iter(lost.values())
        monkeypatch.setattr(Retaining, "_change", lambda own, context: next(steps))
        return train([*words, f"retain.limit={limit}"], tmp_path / name)

    limited = best("limited", 0.04)
    assert {l["step"]: l["retained_lost"] for l in limited.metrics if "retained_lost" in l} == lost
    sign = 1 if limited.scores["higher_is_better"] else -1
    scores = {l["step"]: l["validation"] for l in limited.metrics if "validation" in l}
    quality = {s: (sign * v[limited.scores["metric"]], -v["loss"]) for s, v in scores.items()}
    within = [step for step, value in lost.items() if value <= 0.04]
    assert limited.scores["best_step"] == max(within, key=quality.get)
    assert "no checkpoint" not in petl_log.text
    # not a number is beyond any limit, and beyond what is a number
    lost = dict.fromkeys(lost, math.nan) | {3: 5.0}
    assert best("nan", 0.04).scores["best_step"] == 3
    lost = dict.fromkeys(lost, 0.02) | {1: 0.01}
    monkeypatch.setattr(Retained, "change", property(lambda own: 0.01))
    none = best("none", "0.5%")
    assert none.scores["best_step"] == 1
    assert "no checkpoint is within retain.limit=0.5%" in petl_log.text
    assert 'class="alarm"' in (none.path / "report.html").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "task", ["causal_lm", pytest.param("seq2seq", marks=pytest.mark.thorough), "regression"]
)
def test_texts_are_replayed_or_features_measured(task, families, texts, tmp_path):
    words = families(task, "+method=lora", "train.linear_probe=false", texts, *MEASURED)
    plain = train(words, tmp_path / "plain")
    if task == "regression":
        found = plain.scores["retained"]
        assert (found["kind"], found["rows"]) == ("features", 10)
        assert found["drift"] > 0
        return
    mixed = train([*words, "retain.mix=0.25"], tmp_path / "mixed")
    assert mixed.scores["steps"] == plain.scores["steps"]
    assert mixed.scores["tokens"] != plain.scores["tokens"]
    measured = (mixed.path / "retained.jsonl").read_text().splitlines()
    assert 0 < len(measured) < 10  # the other texts are trained on
    assert not torch.equal(*(next(iter(weights(run).values())) for run in (plain, mixed)))


def test_a_batch_with_replay_has_each_row_once_an_epoch_and_texts_in_turn():
    order = ReplayOrder(rows=10, texts=3, batch_size=5, replayed=2)
    assert order.sizes.tolist() == [5, 5, 5, 3]
    epochs = [[batch.tolist() for batch in order.batches(0, epoch)] for epoch in range(3)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [5, 5, 5, 3]
        assert sorted(row for batch in batches for row in batch if row < 10) == list(range(10))
        assert all(sum(row >= 10 for row in batch) == 2 for batch in batches)
    texts = [row - 10 for batches in epochs for batch in batches for row in batch if row >= 10]
    for start in range(0, len(texts), 3):
        assert sorted(texts[start : start + 3]) == [0, 1, 2]
    assert epochs[0] == [batch.tolist() for batch in order.batches(0, 0)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_texts_and_rows_of_the_task_share_no_forward_pass(processes, micro):
    order = ReplayOrder(rows=10, texts=3, batch_size=5, replayed=2)
    plans = [
        StepSampler(10, 5, micro, 8, 0, rank=r, processes=processes, buckets=order)
        for r in range(processes)
    ]
    whole = [batch.tolist() for epoch in (0, 1) for batch in order.batches(0, epoch)]
    streams = [iter(plan) for plan in plans]
    for step, batch in enumerate(whole, start=1):
        found = []
        count = {plan.num_micro_batches(step) for plan in plans}
        assert len(count) == 1, "each process has as many passes"
        for plan, stream in zip(plans, streams, strict=True):
            passes = list(islice(stream, *count))
            own = passes[: len(passes) - plan.num_spare_micro_batches(step)]
            assert all(len({row < 10 for row in each}) == 1 for each in own)
            assert all(len(each) <= (micro or 5) for each in own)
            found += chain(*own)
        assert sorted(found) == sorted(batch)


def test_a_text_is_replayed_or_measured_never_both(tmp_path):
    one, other = halves([*TEXTS, *(text.upper() + "!" for text in TEXTS)])
    assert len(one) + len(other) == 2 * len(TEXTS)
    assert not {normalized(text) for text in one} & {normalized(text) for text in other}
    assert min(len(one), len(other)) > 0


@pytest.mark.thorough
def test_long_texts_of_other_data_are_measured_in_passages(families, tmp_path):
    (tmp_path / "play.jsonl").write_text(json.dumps({"text": "\n".join(TEXTS)}))
    words = families("causal_lm", "+method=lora", "train.linear_probe=false", "retain.rows=9")
    other = f"+data@retain.data=files retain.data.train={tmp_path}/play.jsonl retain.data.pack=true"
    other += f" retain.data.test={tmp_path}/play.jsonl retain.data.task=causal_lm"
    run = train([*words, *other.split(), "retain.max_length=8"], tmp_path / "run")
    assert run.scores["retained"]["rows"] == 9


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["causal_lm", "regression"])
def test_long_texts_are_cut_to_the_positions_of_the_model(task, families, tmp_path, petl_log):
    file, sizes = tmp_path / "long.jsonl", {"n_embd": 32, "n_layer": 1, "n_head": 2}
    file.write_text("".join(f"{json.dumps({'text': f'{text} ' * 9})}\n" for text in TEXTS))
    given = families(task, "+method=lora", "train.linear_probe=false", f"retain.data={file}")
    given += ["retain.rows=12", "train.steps=2", "train.eval_steps=null"]
    if task == "causal_lm":
        ends = {"bos_token_id": 2, "eos_token_id": 3}
        config = GPT2Config(vocab_size=len(words()), n_positions=40, **sizes, **ends)
        chat = {"cls_token": "[CLS]", "chat_template": TEMPLATE}
        write_model(tmp_path / "gpt2", GPT2LMHeadModel, config, **chat)
        given += [f"model.path={tmp_path}/gpt2", "retain.mix=0.25"]
    positions = 40 if task == "causal_lm" else 32
    run = train([*given, "train.validation_share=null"], tmp_path / "run")
    assert f"are cut to the {positions} tokens that the model reads" in petl_log.text
    assert run.scores["retained"]["rows"] == (12 if task == "regression" else 6)


@pytest.mark.thorough
@pytest.mark.parametrize(("steps", "rows"), [(4, None), (200, None), (4, 5)])
def test_images_are_measured_where_a_run_pays_for_them(steps, rows, pictures, tmp_path, petl_log):
    other = ["+data@retain.data=image_folder", f"retain.data.train={pictures}"]
    other += [f"retain.data.test={pictures}", f"retain.rows={rows or 'null'}"]
    words = [*VIT, *images(pictures), "+method=lora", *other, f"train.steps={steps}"]
    run = train([*words, "train.log_steps=100"], tmp_path / "run")
    # 3 % of 200 steps of 6 images are 36, of which there are 6
    expected = None if (steps, rows) == (4, None) else rows or 6
    assert run.scores.get("retained", {}).get("rows") == expected
    assert ("pays for 0 rows" in petl_log.text) is (expected is None)
