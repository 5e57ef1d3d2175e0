"""`petl eval RUN --retain`: what it prints, writes and refuses."""

import json
import shutil

import pytest

import petl
from petl.cli.main import main

pytest_plugins = ["writer_fixtures", "task_fixtures", "kept_runs"]
TEXTS = [f"{'a plain sentence ' * (1 + n % 3)}{n}" for n in range(9)]


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text, 'kind': 'x'})}\n" for text in TEXTS))
    return file


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
    assert main(["eval", str(run), "--retain", str(texts)]) == 0
    scores = json.loads((run / "scores.json").read_text())
    found = json.loads((run / "eval-retained" / "scores.json").read_text())
    assert scores["retained"] == found["retained"]
    texts.write_text(json.dumps({"text": "another text"}))
    assert main(["eval", str(run), "--retain", str(texts)]) == 0
    again = json.loads((run / "eval-retained" / "scores.json").read_text())
    assert again["retained"]["rows"] == 1
    assert json.loads((run / "scores.json").read_text()) == scores
