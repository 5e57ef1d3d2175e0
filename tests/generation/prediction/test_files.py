"""`petl predict`: rows of files with their predictions, in their order, with bounded memory."""

import csv
import json
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kept_runs import lines

from petl.adapters.export.saved_adapter import find
from petl.cli import main
from petl.data.tasks.regression import Regression
from petl.errors import InputError, RunStopped
from petl.generation.prediction.files import PredictionFile, predict_files
from petl.generation.prediction.predictor import Predictor, predicted
from petl.generation.prediction.tables import JsonLines
from petl.training.runs.records import PREDICTIONS

pytest_plugins = ["task_fixtures", "kept_runs"]
# the columns of each task that tell rows apart, in input and predictions.jsonl
INPUTS = {
    "regression": ("text", "text"),
    "token_classification": ("tokens", "tokens"),
    "question_answering": ("context", "context"),
    "causal_lm": ("text", "messages"),
    "seq2seq": ("text", "text"),
}
UNLABELED = ("text", "more", "tokens", "question", "context")


def predict(run, names, out, *settings, **options):
    predict_files(
        find(run.path), [str(name) for name in names], PredictionFile(out), settings, **options
    )
    return lines(out) if out.suffix == ".jsonl" else None


@pytest.mark.parametrize("task", INPUTS)
def test_predictions_are_those_of_the_run_and_need_no_labels(kept_run, families, task, tmp_path):
    run, (name, kept) = kept_run(task), INPUTS[task]
    given = lines(families.folder / "test.jsonl")
    unlabeled = [{key: row[key] for key in UNLABELED} | {"id": i} for i, row in enumerate(given)]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in unlabeled))
    found = predict(run, [file], tmp_path / "out.jsonl")
    assert [{key: row[key] for key in (*UNLABELED, "id")} for row in found] == unlabeled

    def key(value):
        return json.dumps(value[0]["content"] if kept == "messages" else value)

    expected = {key(row[kept]): row for row in lines(run.path / PREDICTIONS)}
    for row in found:
        own = expected[json.dumps(row[name])]
        if task == "regression":
            assert row["prediction"] == pytest.approx(own["prediction"], abs=1e-4)
        else:
            assert row["prediction"] == own["prediction"]
        if "probability" in own:
            assert row["probability"] == pytest.approx(own["probability"], abs=1e-4)


def test_formats_are_those_of_the_suffixes_and_keep_all_columns(kept_run, tmp_path):
    run = kept_run("regression")
    (tmp_path / "in.csv").write_text('id,text,more\n007,"the cat, red",a\n8,a dog,b\n')
    predict(run, [tmp_path / "in.csv"], tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["id", "text", "more", "prediction"]
    assert table["id"].to_pylist() == ["007", "8"]
    first = table["prediction"].to_pylist()
    renamed = table.rename_columns(["id", "text", "more", "old"])
    types = renamed.schema.set(0, renamed.schema.field(0).with_type(pa.large_string()))
    pq.write_table(renamed.cast(types), tmp_path / "b.parquet")
    predict(run, [tmp_path / "b.parquet"], tmp_path / "c.parquet")
    assert pq.read_schema(tmp_path / "c.parquet").field("id").type == pa.large_string()
    predict(run, [tmp_path / "b.parquet"], tmp_path / "d.tsv")
    rows = list(csv.DictReader((tmp_path / "d.tsv").open(), delimiter="\t"))
    assert [float(row["prediction"]) for row in rows] == pytest.approx(first)
    assert rows[0]["text"] == "the cat, red"


def test_other_columns_and_several_files(kept_run, tmp_path):
    run = kept_run("regression")
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"review,more\nthe {name} cat,x\n")
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    found = predict(run, files, tmp_path / "out.jsonl", "data.text=review")
    assert [row["review"] for row in found] == ["the a cat", "the b cat"]
    found = predict(run, files, tmp_path / "out.jsonl", 'data.text="{review}!"')
    assert len(found) == 2
    for word in ("data.tex=review", "data.train=x", "data.labels=[a]", "train.steps=3"):
        with pytest.raises(InputError, match=word.partition("=")[0]):
            predict(run, files, tmp_path / "out.jsonl", word)


@pytest.mark.thorough
def test_answers_may_be_longer_than_those_that_were_scored(kept_run, tmp_path):
    run = kept_run("seq2seq")
    (tmp_path / "in.jsonl").write_text('{"text": "the cat"}\n')
    counts = []
    for most in (None, 1):
        (row,) = predict(run, [tmp_path / "in.jsonl"], tmp_path / "o.jsonl", max_new_tokens=most)
        counts.append(len(row["prediction"].split()))
    assert counts[1] <= 1 < 4 > counts[0]


class Alive(dict):
    """A row that counts how many there are."""

    now: weakref.WeakSet = weakref.WeakSet()
    most = 0
    __hash__ = object.__hash__

    def __init__(self, number):
        super().__init__(text=number)
        Alive.now.add(self)
        Alive.most = max(Alive.most, len(Alive.now))


@pytest.mark.parametrize("processes", [1, 3])
def test_rows_keep_their_order_and_few_of_them_are_in_memory(processes):
    parts = []

    def predict(rows):
        parts.append(len(rows))
        return [{"prediction": row["text"]} for row in rows]

    accelerator = SimpleNamespace(num_processes=processes)
    predictor = SimpleNamespace(window=4, accelerator=accelerator, predict=predict)
    Alive.most, counted = 0, []
    rows = ((row := Alive(i), row) for i in range(1000))
    numbers = []
    for window in predicted(predictor, rows, counted.append):
        numbers += [raw["text"] for raw, found in window if found["prediction"] == raw["text"]]
    assert numbers == list(range(1000))
    assert sum(counted) == 1000
    assert max(parts) == 4
    assert Alive.most <= 3 * 4 * processes  # read, predicted, written


def test_only_errors_of_writing_are_about_the_output(tmp_path, monkeypatch):
    output = PredictionFile(tmp_path / "out.jsonl")
    with pytest.raises(OSError, match="of reading"), output.opened(["in.csv"], Regression()):
        raise OSError("of reading")
    assert not output.file.exists()
    with pytest.raises(RunStopped), output.reported():
        raise OSError(28, "full")
    (tmp_path / "file").touch()
    beneath = PredictionFile(tmp_path / "file" / "out.jsonl")
    with pytest.raises(RunStopped), beneath.opened(["in.csv"], Regression()):
        pass
    with pytest.raises(BrokenPipeError), PredictionFile(None).reported():
        raise BrokenPipeError
    # closing the file fails as writing it has
    monkeypatch.setattr(JsonLines, "close", Mock(side_effect=OSError(28, "full")))
    with pytest.raises(RunStopped), output.opened(["in.csv"], Regression()), output.reported():
        raise OSError(28, "full")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in.csv", "--out", "in.csv"], "is the file that is read"),
        (["in.csv", "--out", "o.xlsx"], "not in a supported format; available: .csv, .tsv"),
        (["empty.csv"], "has no rows"),
        (["in.csv", "--out", "o.csv"], "the input has a column 'prediction' already"),
        (["short.csv"], "line 2: 1 in place of the 2 fields"),
        (["data.text=more"], "no FILE is given"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    kept_run, words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text("text,more,prediction\na,b,c\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "short.csv").write_text("text,more\na\n")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main.main(["predict", str(kept_run("regression").path), *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.splitlines()[-1].startswith("error: ")
    assert out == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("last", ['{"id": 7}', '{"text": '], ids=["no text", "damaged"])
def test_a_wrong_last_row_is_reported_before_the_model_is_loaded(
    kept_run, last, tmp_path, monkeypatch
):
    run, file = kept_run("regression"), tmp_path / "in.jsonl"
    file.write_text('{"text": "the cat", "more": "x"}\n' * 3 + last)
    monkeypatch.setattr(Predictor, "of", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(InputError, match=r"in\.jsonl.*line 4"):
        predict(run, [file], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_adapter_folder_alone_knows_its_task_and_the_output_may_be_a_pipe(
    kept_run, tmp_path, capsysbinary
):
    adapter = kept_run("token_classification").path / "adapter"
    alone = tmp_path / "adapter-alone"
    alone.mkdir()
    for file in adapter.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    (tmp_path / "in.jsonl").write_text('{"tokens": ["the", "cat\\u202e"]}\n')
    assert main.main(["predict", str(alone), str(tmp_path / "in.jsonl")]) == 0
    text = capsysbinary.readouterr().out.decode()
    assert "\u202e" not in text
    assert json.loads(text)["tokens"] == ["the", "cat\u202e"]
    assert len(json.loads(text)["prediction"]) == 2
    (alone / "task.json").unlink()
    assert main.main(["predict", str(alone), str(tmp_path / "in.jsonl")]) == 2
    assert b"has no task.json, so its task and classes are unknown" in capsysbinary.readouterr().err


@pytest.mark.slow
def test_two_processes_write_what_one_writes(kept_run, families, tmp_path, capfd):
    run, test = str(kept_run("regression").path), str(families.folder / "test.jsonl")
    words = ["predict", run, test, "--batch-size", "2", "--prefix", "p_"]
    for name, more in (("one", []), ("two", ["--processes", "2"])):
        assert main.main([*words, "--out", str(tmp_path / f"{name}.jsonl"), *more]) == 0
    one, two = (lines(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert [row["p_prediction"] for row in two] == pytest.approx([r["p_prediction"] for r in one])
    assert [row["text"] for row in two] == [row["text"] for row in one]
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main.main(["predict", run, "gone.csv", "--processes", "2"])
    assert capfd.readouterr().err.count("FILE=gone.csv does not exist") == 1


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_a_conversation_that_the_template_refuses_is_named_by_file_and_line(
    kept_run, command, tmp_path, capsys
):
    kept = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lost = [kept[0], {**kept[1], "reasoning_content": "c"}]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    row = lambda turns: json.dumps({"messages": [*turns, *kept]}) + "\n"  # noqa: E731
    first.write_text(row(kept) * 2)
    second.write_text(row(kept) + "\n" + row(lost) + row(kept))  # an empty line is no row
    run, out = str(kept_run("causal_lm").path), tmp_path / "out.jsonl"
    columns = ["data.prompt=null", "data.answer=null", "data.messages=messages"]
    words = {
        "predict": ["predict", run, str(first), str(second), "--out", str(out), *columns],
        "eval": [
            "eval",
            run,
            "--data",
            str(first),
            str(second),
            "--out",
            str(tmp_path / "out"),
            *columns,
        ],
    }
    assert main.main(words[command]) == 2
    assert "second.jsonl, line 3: the chat template" in capsys.readouterr().err
    assert not out.exists()
