"""`petl eval RUN --retain`: what it prints, writes and refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import train

import petl
from petl.adapters.export.saved_adapter import find
from petl.cli.main import main
from petl.core.adapter_file import WEIGHTS
from petl.data.tasks.causal_lm import end_text

pytest_plugins = ["writer_fixtures", "task_fixtures", "kept_runs", "training_fixtures"]
TEXTS = [f"{'a plain sentence ' * (1 + n % 3)}{n}" for n in range(9)]


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text, 'kind': 'x'})}\n" for text in TEXTS))
    return file


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", ["lora", "mola", "t5-lora"])
def test_the_result_is_that_of_the_function(name, writers, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["eval", str(writers.folder / name), "--retain", str(texts), "--out", str(out)]) == 0
    )
    assert capsys.readouterr().out.startswith("on other text: loss ")
    found = json.loads((out / "scores.json").read_text())["retained"]
    language = writers.load(name)
    expected = petl.retained(language.model, TEXTS, language.tokenizer)
    assert found["lost"] == pytest.approx(expected.lost, abs=1e-6)
    assert found["interval"] == pytest.approx(expected.interval, abs=1e-6)
    assert (found["kind"], found["rows"], found["tokens"]) == ("language", 9, expected.tokens)
    assert "texts" not in found
    lines = [json.loads(line) for line in (out / "retained.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    names = {"text", "tokens", "before", "after", "divergence", "agreement"}
    assert all(line.keys() == names for line in lines)
    # it is no place of a run, and holds results
    assert (
        main(["eval", str(writers.folder / name), "--retain", str(texts), "--out", str(out)]) == 2
    )


@pytest.mark.thorough
def test_the_bundled_texts_are_measured_without_a_file(writers, capsys):
    assert main(["eval", str(writers.folder / "lora"), "--retain"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_other_evaluations_and_other_columns_are_refused(writers, texts, tmp_path, capsys):
    run = str(writers.folder / "lora")
    assert main(["eval", run, "--data", str(texts), "--retain"]) == 2
    assert "of another evaluation than --retain" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("txt\nabc\n")
    assert main(["eval", run, "--retain", str(other)]) == 2
    assert "has no column text; did you mean txt" in capsys.readouterr().err.replace("'", "")


def test_a_run_gets_the_measure_once(kept_run, texts, tmp_path):
    run = shutil.copytree(kept_run("causal_lm").path, tmp_path / "run")
    before = json.loads((run / "scores.json").read_text())
    assert main(["eval", str(run), "--retain", str(texts)]) == 0
    scores = json.loads((run / "scores.json").read_text())
    assert scores == {**before, "retained": scores["retained"]}
    found = json.loads((run / "eval-retained" / "scores.json").read_text())
    assert scores["retained"] == found["retained"]
    page = (run / "report.html").read_text()
    assert "What was lost" in page
    assert "What was lost on each" in page
    texts.write_text(json.dumps({"text": "another text"}))
    assert main(["eval", str(run), "--retain", str(texts)]) == 0
    again = json.loads((run / "eval-retained" / "scores.json").read_text())
    assert again["retained"]["rows"] == 1
    assert json.loads((run / "scores.json").read_text()) == scores


@pytest.mark.thorough
def test_a_chat_adapter_reads_plain_text_without_its_template(families, texts, tmp_path, capsys):
    words = families("causal_lm", "+method=lora", "train.steps=2")
    run = train([*words, "train.linear_probe=false"], tmp_path / "run").path
    assert main(["eval", str(run), "--data", str(texts), "data.format=text"]) == 0
    found = json.loads((run / "eval-texts" / "scores.json").read_text())
    saved = find(run)
    ids = [saved.processor(text)["input_ids"] for text in TEXTS]
    end = saved.processor.eos_token_id
    assert found["tokens"] == sum(len(end_text(each, end)) - 1 for each in ids)


@pytest.mark.thorough
def test_strength_is_a_dial_of_a_finished_run(families, texts, tmp_path, capsys):
    words = families("causal_lm", "+method=lora", "train.steps=4", "train.lr=0.1")
    run = train([*words, "train.linear_probe=false"], tmp_path / "run").path
    given = ["strength", str(run), "--retain", str(texts)]
    out = tmp_path / "softer"
    before = json.loads((run / "scores.json").read_text())
    assert main([*given, "--choose", "limit=1000", "--out", str(out)]) == 0
    found = json.loads((run / "scores.json").read_text())["strengths"]
    assert [*found["scores"]] == [*found["lost"]] == ["0", "0.25", "0.5", "0.75", "1", "1.25"]
    assert (found["lost"]["0"], found["used"]) == (0.0, 1.0)
    scores = json.loads((run / "scores.json").read_text())
    assert scores == {**before, "strengths": found}
    assert found["scores"]["1"] == pytest.approx(scores["validation"], rel=1e-4)
    assert "What was learned and lost" in (run / "report.html").read_text()
    chosen = float(capsys.readouterr().out.rpartition("strength ")[2].partition(":")[0])
    sign = 1 if scores["higher_is_better"] else -1
    assert found["scores"][f"{chosen:g}"] == sign * max(sign * v for v in found["scores"].values())
    one, other = (load_file(folder / WEIGHTS) for folder in (run / "adapter", out))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        expected = chosen * tensor if "lora_B" in name else tensor
        torch.testing.assert_close(other[name], expected)
    one = [*given, "--strengths", "1"]
    assert main([*one, "--choose", "limit=0", "--out", str(tmp_path / "no")]) == 2
    assert "each strength loses more" in capsys.readouterr().err
    assert main([*given, "--choose", "0.5"]) == 2
    assert "go together" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_run_without_validation_rows_is_scored_on_a_file(families, texts, tmp_path, capsys):
    none = ["train.eval_steps=null", "train.validation_share=null", "train.linear_probe=false"]
    words = families("regression", "+method=lora", "train.steps=2", "train.lr=0.1", *none)
    run = train(words, tmp_path / "run").path
    given = ["strength", str(run), "--retain", str(texts), "--strengths", "0.5,1"]
    assert main(given) == 2
    assert "give others with --data FILE" in capsys.readouterr().err
    tested = f"{families.folder}/test.jsonl"
    assert main([*given, "--data", tested]) == 2
    assert "is data.test of the run" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join((families.folder / "train.jsonl").read_text().splitlines()[:7]))
    assert main([*given, "--data", str(other)]) == 0
    found = json.loads((run / "scores.json").read_text())["strengths"]
    assert found["rows"] == 7
    expected = petl.evaluate(run, other)[found["metric"]]
    assert found["scores"]["1"] == pytest.approx(expected, rel=1e-4)
    assert found["scores"]["0.5"] != found["scores"]["1"]


@pytest.mark.thorough
def test_eval_computes_in_the_precision_of_the_run(families, texts, tmp_path):
    words = families("causal_lm", "+method=lora", "train.steps=2", "train.precision=bf16")
    run = train([*words, "train.linear_probe=false"], tmp_path / "run").path
    assert main(["eval", str(run), "--retain", str(texts)]) == 0
    found = json.loads((run / "eval-retained" / "scores.json").read_text())["retained"]
    saved = find(run)
    exact = petl.retained(saved.model(), TEXTS, saved.processor)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = petl.retained(saved.model(), TEXTS, saved.processor)
    assert found["loss_after"] == pytest.approx(rounded.loss_after, abs=1e-6)
    assert found["loss_after"] != pytest.approx(exact.loss_after, abs=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "words",
    [
        ["+method=lora", "method.init_lora_weights=pissa", "method.r=4"],
        pytest.param(
            ["+method=corda", "method.calibration_data.num_samples=8", "method.r=4"],
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["pissa", "corda"],
)
def test_the_strength_of_a_changed_base_is_of_what_training_added(words, families, texts, tmp_path):
    own = families("causal_lm", *words, "train.steps=4", "train.linear_probe=false")
    run = train([*own, "train.lr=0.05"], tmp_path / "run").path
    out = tmp_path / "softer"
    given = ["strength", str(run), "--retain", str(texts), "--strengths", "0,0.5,1"]
    assert main([*given, "--choose", "limit=1000", "--out", str(out)]) == 0
    lost = json.loads((run / "scores.json").read_text())["strengths"]["lost"]
    # a plain LoRA of twice the rank on the base as it was
    assert lost["0"] == pytest.approx(0.0, abs=1e-6)
    assert lost["1"] != pytest.approx(lost["0"], abs=1e-4)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
