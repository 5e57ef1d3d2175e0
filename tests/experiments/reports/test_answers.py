"""Where the predictions of two runs differ."""

import json
import math

import numpy as np
import pytest
from comparable import write_run

from petl.cli import main
from petl.errors import InputError
from petl.experiments.reports.answers import compare_answers, lines_of

pytest_plugins = ["export_fixtures", "training_fixtures"]


def labeled(*predictions, label="good", loss=0.5, **more):
    """Lines of a classifier: a prediction for each row, all with this label."""
    return [
        {"row": i, "text": f"t{i}", "label": label, "prediction": p, "loss": loss + i, **more}
        for i, p in enumerate(predictions)
    ]


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)
    return folder


@pytest.fixture
def compared(tmp_path):
    """Compare two runs with these predictions."""

    def call(first, second, examples=5):
        return compare_answers(
            write(tmp_path / "a", first), write(tmp_path / "b", second), examples
        )

    return call


def test_each_example_is_counted_by_who_is_right(compared):
    first = labeled("good", "good", "good", "bad", "bad", "worse")
    second = labeled("good", "bad", "bad", "good", "bad", "bad")
    found = compared(first, second)
    assert dict(found.outcomes) == {"both": 1, "first": 2, "second": 1, "neither": 2}
    a, b = found.names
    assert found.table().rows == [
        ["both right", "1"],
        [f"only {a} right", "2"],
        [f"only {b} right", "1"],
        ["both wrong", "2"],
    ]
    assert found.sentences() == [
        "2 against 1 examples: no clear difference (McNemar's exact test, p = 1).",
        "Predictions that differ: 4 of 6.",
    ]


def test_rankings_are_compared_in_pairs(compared):
    before, after = [0.1, 0.9, 0.5, 0.4], [0.3, 0.8, 0.9, 0.4]
    rows = (
        [{**line, "ndcg_at_10": n} for line, n in zip(labeled(*"abcd"), side, strict=True)]
        for side in (before, after)
    )
    found = compared(*rows)
    gained = np.subtract(after, before)
    # 3.1824: Student's quantile of 3 degrees of freedom in tables
    half = 3.1824 * gained.std(ddof=1) / 2
    words = [
        f"{value:+.4f}" for value in (gained.mean(), gained.mean() - half, gained.mean() + half)
    ]
    (line,) = (line for line in found.sentences() if "nDCG@10" in line)
    assert all(word in line for word in words), (line, words)
    assert "4 queries" in line
    assert "nDCG" not in "".join(compared(labeled(*"abcd"), labeled(*"abcd")).sentences())


def test_the_examples_are_those_that_tell_the_runs_apart_most(compared):
    first = [{**line, "loss": 0.1} for line in labeled(*["good"] * 4)]
    second = [{**line, "loss": loss} for line, loss in zip(
        labeled(*["bad"] * 4), (1.0, 4.0, 2.0, 3.0), strict=True)]  # fmt: skip
    (table,) = compared(first, second, examples=2).tables().values()
    assert [row[0] for row in table.rows] == ["1", "3"]
    assert table.rows[0][1:] == ["t1", "good", "good", "bad"]
    assert compared(first, second, examples=0).tables() == {}
    (title,) = compared(second, first).tables()
    assert title.startswith("Only ")
    assert title.endswith("/b is right")


def test_words_and_generated_answers_are_right_as_a_whole(compared):
    one = [{"row": 0, "tokens": ["a", "b"], "label": ["X", "O"], "prediction": ["X", "O"]}]
    other = [{**one[0], "prediction": ["X", "X"]}]
    assert dict(compared(one, other).outcomes) == {"first": 1}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    line = {"row": 0, "messages": chat, "label": "Yes", "tokens": 3, "loss": 1.0}
    exact = [{**line, "prediction": " Yes", "exact_match": 1.0, "rougeL": 1.0}]
    wrong = [{**line, "tokens": 4, "prediction": "No", "exact_match": 0.0, "rougeL": 0.0}]
    found = compared(wrong, exact)
    assert dict(found.outcomes) == {"second": 1}
    assert found.tables().popitem()[1].rows == [["0", "user: Hi", "Yes", "No", " Yes"]]


def test_numbers_and_losses_are_compared_by_their_size(compared):
    one = [{"row": i, "text": "t", "label": 2.0, "prediction": p} for i, p in enumerate((2, 4, 1))]
    other = [{**line, "prediction": p} for line, p in zip(one, (2.5, 2, 3), strict=True)]
    found = compared(one, other)
    assert not found.is_graded
    assert dict(found.outcomes) == {"first": 1, "second": 1, "both": 1}
    assert found.table().rows[-1] == ["equal", "1"]
    texts = [{"row": 0, "text": "t", "loss": 1.5, "tokens": 9}]
    found = compared(texts, [{**texts[0], "loss": 1.0, "tokens": 7}])
    assert dict(found.outcomes) == {"second": 1}
    assert found.tables().popitem()[1].rows == [["0", "t", "", "1.5", "1"]]


def test_two_losses_that_are_not_finite_are_equal(compared):
    lines = [{"row": i, "text": f"t{i}", "loss": loss} for i, loss in enumerate((math.inf, 1.0))]
    found = compared(lines, [lines[0], {**lines[1], "loss": 2.0}])
    assert dict(found.outcomes) == {"both": 1, "first": 1}


def test_examples_that_one_run_has_dropped_are_counted(compared):
    lines = labeled("good", "good", "bad")
    found = compared(lines[1:], [lines[0], lines[2]])
    assert (found.missing, sum(found.outcomes.values())) == (2, 1)
    assert "Examples with a prediction of one run only: 2." in found.sentences()


def test_runs_on_different_examples_are_refused(compared, tmp_path):
    lines = labeled("good", "good")
    for one, other, words in (
        (lines, [lines[0], {**lines[1], "text": "another"}], "text of row 1"),
        (lines, labeled("good", "good", label="bad"), "label of row 0"),
        (lines, lines[::-1], "row 0 is after row 1"),
        ([{"text": "no row"}], lines, r"predictions\.jsonl, line 1"),
    ):
        with pytest.raises(InputError, match=words):
            compared(one, other)
    (tmp_path / "a" / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a" / "eval-test").mkdir()
    (tmp_path / "a" / "predictions.jsonl").rename(
        tmp_path / "a" / "eval-test" / "predictions.jsonl"
    )
    (tmp_path / "b" / "predictions.jsonl").unlink()
    assert sum(1 for _ in lines_of(tmp_path / "a")) == 2  # of `petl eval`
    with pytest.raises(InputError, match=str(tmp_path / "b")):
        compare_answers(tmp_path / "a", tmp_path / "b", 5)


# The command


def command(capsys, *words):
    capsys.readouterr()
    status = main.main(["compare", *map(str, words)])
    return status, *capsys.readouterr()


def test_real_runs_agree_with_their_scores(lora_run, mola_run):
    found = compare_answers(lora_run.path, mola_run.path, 100)
    rows = sum(found.outcomes.values())
    for run, side in ((lora_run, "first"), (mola_run, "second")):
        right = found.outcomes["both"] + found.outcomes[side]
        assert right / rows == pytest.approx(run.scores["after"]["accuracy"])
        assert len(found.examples[side]) == found.outcomes[side]


def test_runs_keep_their_order_if_folders_above_them_are_named(tmp_path, capsys):
    runs = [tmp_path / "second" / "seed-0", tmp_path / "first" / "seed-0"]
    for run, method, predictions in zip(
        runs, ("mola", "lora"), (("good", "bad"), ("bad", "bad")), strict=True
    ):
        write(write_run(run, 0.5, f"+method={method}"), labeled(*predictions))
    _, expected, _ = command(capsys, *runs, "--answers")
    _, out, _ = command(capsys, *(run.parent for run in runs), "--answers")
    assert out == expected
