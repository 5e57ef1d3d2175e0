"""Runs on two data sets at once, from the command to predictions and the page."""

import csv
import json
from random import Random

import pytest
from kept_runs import lines
from task_runs import executed
from training_fixtures import (
    CLASSES,
    FILLERS,
    Finished,
    assert_same_course,
    launch,
    train,
    train_until_killed,
)

import petl
from petl.adapters.export.onnx import export_onnx
from petl.adapters.export.saved_adapter import find
from petl.cli.main import main
from petl.errors import InputError, UnsupportedError

pytest_plugins = ["training_fixtures"]

METHODS = {
    "lora": ["+method=lora", "method.target_modules=[query,value]"],
    "polyhistor": ["+method=polyhistor", "method.r=4", "method.task_dim=8"],
}
MIXED = ["data.sampling=temperature", "data.temperature=4"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tiny):
    """Overrides for two sets: the class of a word, and whether two texts share their last word."""
    folder, rng = tmp_path_factory.mktemp("sets"), Random(0)
    pairs = []
    for _ in range(30):
        label, word = rng.choice(["same", "beast"]), rng.choice(CLASSES["tool"])
        other = word if label == "same" else rng.choice(CLASSES["beast"])
        pairs.append((f"the {word}", f"{rng.choice(FILLERS)} {other}", label))
    for name, rows in (("pairs", pairs[:20]), ("pairs-test", pairs[20:])):
        with (folder / f"{name}.csv").open("w", newline="") as opened:
            csv.writer(opened).writerows([("one", "two", "verdict"), *rows])
    words = "data:files,train:{0}/{1}.csv,test:{0}/{2}.csv,max_length:{3}"
    kinds = words.format(tiny.folder, "train", "test", 16)
    both = words.format(folder, "pairs", "pairs-test", 8)
    columns = "text:one,text_pair:two,label:verdict"
    return [
        *("model=path", f"model.path={tiny.folder}/steady", "data=tasks"),
        f"data.sets={{kind:{{{kinds}}},pair:{{{both},{columns}}}}}",
        *("train.steps=12", "train.batch_size=8", "train.lr=5e-3", "train.log_steps=1"),
    ]


@pytest.fixture(
    scope="module", params=["polyhistor", pytest.param("lora", marks=pytest.mark.thorough)]
)
def run(request, sets, tmp_path_factory):
    """A run of each method, with a linear probe and validation."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    more = ["train.eval_steps=6", "train.validation_share=0.2", *MIXED]
    return train([*METHODS[request.param], *sets, *more], folder)


def test_scores_are_given_by_task(run):
    assert run.scores["metric"] == "mean_accuracy"
    for part in ("before", "linear_probe", "after"):
        scores = run.scores[part]
        mean = (scores["kind_accuracy"] + scores["pair_accuracy"]) / 2
        assert scores["mean_accuracy"] == pytest.approx(mean)
        assert scores["rows"] == 30
    (kept,) = {tuple(sorted({line["task"] for line in lines(run.path / "predictions.jsonl")}))}
    assert kept == ("kind", "pair")
    validation = [line["validation"] for line in run.metrics if "validation" in line]
    assert all("kind_macro_f1" in scores for scores in validation)
    page = (run.path / "report.html").read_text()
    for shown in ("mean_accuracy", "pair_accuracy", "kind/tool", "pair/same"):
        assert shown in page


@pytest.mark.thorough
def test_an_evaluation_repeats_the_scores_and_takes_files(run, tmp_path):
    after = run.scores["after"]
    assert petl.evaluate(run.path) == pytest.approx({k: after[k] for k in after}, abs=1e-5)
    rows = [
        {"text": "the red one", "text_pair": "", "task": "kind", "label": "color"},
        {"text": "the saw", "text_pair": "a saw", "task": "pair", "label": "same"},
        {"text": "the saw", "text_pair": "a cat", "task": "pair", "label": "beast"},
    ]
    found = petl.evaluate(run.path, rows, out=tmp_path / "out")
    assert found["rows"] == 3
    assert {line["label"] for line in lines(tmp_path / "out" / "predictions.jsonl")} == {
        "color", "same", "beast",
    }  # fmt: skip
    with pytest.raises(InputError, match="'kind/same'"):
        petl.evaluate(run.path, [{**rows[0], "label": "same"}], out=tmp_path / "bad")
    alone = [petl.evaluate(run.path, [row], out=tmp_path / str(i)) for i, row in enumerate(rows)]
    losses = [scores["loss"] for scores in alone]
    assert found["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_predictions_name_labels_of_the_rows_task(run):
    rows = [
        {"text": "the red one", "task": "kind"},
        {"text": "the saw", "text_pair": "a saw", "task": "pair"},
        {"text": "the red one", "task": 0},
    ]
    found = petl.predict(run.path, rows)
    assert [*found[0]["probabilities"]] == [*found[2]["probabilities"]] == sorted(CLASSES)
    assert [*found[1]["probabilities"]] == ["beast", "same"]
    assert found[0]["prediction"] == found[2]["prediction"]
    for task, words in (("pair", "row 1: text_pair"), ("other", "row 1: .*'other'.* kind, pair")):
        with pytest.raises(InputError, match=words):
            petl.predict(run.path, [{"text": "a", "task": task}])


def test_a_file_is_predicted_with_columns_of_other_names(run, tmp_path, capsys):
    rows = [{"body": "the red one", "aim": "kind"}, {"body": "a", "aim": "pair", "more": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["data.text=body", "data.task_column=aim", "data.text_pair=more"]
    out = tmp_path / "found.jsonl"
    main(["predict", str(run.path), str(tmp_path / "rows.jsonl"), *words, "--out", str(out)])
    classes = [line["probabilities"].keys() for line in lines(out)]
    assert classes == [{"beast", "color", "tool"}, {"beast", "same"}]


def test_the_code_of_the_card_predicts_a_label_of_the_first_task(run, capsys, tiny):
    adapter = run.path / "adapter"
    found = executed(adapter, tiny.folder / "steady")
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("kind/")
    assert found["logits"].shape == (1, 5)
    assert "trained on the tasks kind, pair for multitask classification" in (
        (adapter / "README.md").read_text()
    )


def test_no_onnx_is_written(run, tmp_path):
    with pytest.raises(UnsupportedError):
        export_onnx(find(run.path), tmp_path / "onnx", None)


@pytest.mark.thorough
def test_the_plan_counts_the_heads_and_the_rows_of_both(sets, capsys):
    main(["plan", *METHODS["lora"], *sets, *MIXED])
    shown = capsys.readouterr().out
    assert "12 steps" in shown
    assert "70 examples" in shown
    assert f"{5 * 32 + 5:,}" in shown  # weight and bias of the head for 3 + 2 classes
    assert "train.buckets" not in shown


@pytest.mark.thorough
def test_a_stopped_run_goes_on_with_the_same_rows(sets, tmp_path):
    words = [
        *METHODS["polyhistor"],
        *sets,
        *MIXED,
        "train.save_steps=5",
        "train.linear_probe=false",
    ]
    straight = train(words, tmp_path / "straight")
    train_until_killed(words, tmp_path / "killed", 8)
    resumed = train([*words, "train.resume=auto"], tmp_path / "killed")
    assert_same_course(resumed, straight, atol=0)


@pytest.mark.thorough
def test_two_processes_train_as_one_on_the_same_rows(sets, tmp_path):
    words = [*METHODS["polyhistor"], *sets, *MIXED, "train.linear_probe=false"]
    one = train(words, tmp_path / "one")
    ran = launch([*words, f"train.run={tmp_path}/two"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    two = Finished(tmp_path / "two")
    assert json.loads((two.path / "environment.json").read_text())["processes"] == 2
    assert_same_course(two, one, atol=1e-4)
    assert two.scores["after"] == pytest.approx(one.scores["after"], abs=1e-4)


def test_a_temperature_changes_which_rows_are_seen(sets, tmp_path):
    words = [*METHODS["lora"], *sets, "train.linear_probe=false", "train.steps=3"]
    by_size = train([*words, "data.sampling=size"], tmp_path / "size")
    mixed = train([*words, *MIXED], tmp_path / "mixed")
    # the same model: only the rows can make the difference
    assert by_size.scores["before"] == mixed.scores["before"]
    assert by_size.metrics[0]["loss"] != pytest.approx(mixed.metrics[0]["loss"], abs=1e-4)
