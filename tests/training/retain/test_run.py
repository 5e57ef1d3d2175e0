"""`retain.data` in a run: measured, shown, and without effect on training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import train

from petl.cli.main import main
from petl.errors import InputError
from petl.experiments.reports.run_report import write_page

pytest_plugins = ["task_fixtures", "training_fixtures"]
TEXTS = [f"{'the cat and a red dog ' * (1 + n % 3)}{n}" for n in range(12)]
MEASURED = ("retain.rows=10", "retain.max_length=32")


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    return f"retain.data={file}"


def weights(run):
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("task", "method"),
    [
        (
            "causal_lm",
            ["+method=lora", "method.layers_to_transform=[1]", "train.cache_frozen=true"],
        ),
        ("causal_lm", ["+method=corda", "method.calibration_data.num_samples=8"]),
        ("seq2seq", ["+method=mola", "method.lora_dropout=0.2"]),
    ],
    ids=["lora", "corda", "mola"],
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
    assert (found["divergence"] is None) == ("+method=corda" in method)
    lines = [
        json.loads(line) for line in (measured.path / "retained.jsonl").read_text().splitlines()
    ]
    assert [line["text"] for line in lines] == TEXTS[:10]
    curve = [line["retained_lost"] for line in measured.metrics if "retained_lost" in line]
    assert len(curve) == 2
    assert "retained" not in plain.scores
    # of the best step, which is one of the two
    assert min(abs(point - found["lost"]) for point in curve) < 1e-5


def test_the_summary_and_the_page_say_it_and_eval_agrees(families, texts, tmp_path, capsys):
    words = families("causal_lm", "+method=lora", "train.linear_probe=false", texts, *MEASURED)
    run = train(words, tmp_path / "run")
    capsys.readouterr()
    write_page(run.path)
    assert "on other text: loss " in (run.path / "report.html").read_text()
    file = texts.removeprefix("retain.data=")
    assert main(["eval", str(run.path), "--retain", file]) == 0
    again = json.loads((run.path / "eval-retained" / "scores.json").read_text())["retained"]
    assert again["rows"] == 12
    assert json.loads((run.path / "scores.json").read_text())["retained"]["rows"] == 10


def test_a_short_run_does_not_pay_for_texts(families, tmp_path, petl_log):
    words = families("causal_lm", "+method=lora", "train.linear_probe=false")
    run = train([*words, "retain.data=bundled"], tmp_path / "run")
    assert "retained" not in run.scores
    assert "retained texts are not measured: 3% of this run pays for" in petl_log.text


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("causal_lm", ["retain.data=no.csv"], "no.csv"),
        ("causal_lm", ["retain.data=bundled", "retain.rows=0"], "retain.rows=0"),
        (
            "causal_lm",
            ["retain.data=bundled", "retain.curve=true", "train.eval_steps=null"],
            "train.eval_steps is null",
        ),
        ("regression", ["retain.data=bundled"], "has no loss on texts; set retain.data=null"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    task, words, message, families, tmp_path
):
    given = families(task, "+method=lora", "train.linear_probe=false")
    if "train.eval_steps=null" in words:
        words = [*words, "train.validation_share=null"]
    with pytest.raises(InputError, match=message):
        train([*given, *words], tmp_path / "run")
