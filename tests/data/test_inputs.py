"""Rows for a task that exists: without labels to predict, with labels to score."""

import json

import pytest

from petl.data.inputs import read_inputs
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.media import ImageClassification
from petl.data.tasks.question_answering import QuestionAnswering
from petl.data.tasks.regression import Regression
from petl.data.tasks.seq2seq import Seq2Seq
from petl.data.tasks.token_classification import TokenClassification
from petl.errors import InputError

TWO = Classification(classes=["bad", "good"])
WORDS = TokenClassification(classes=["O", "X"])
PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(folder, row, task, labels=False, **settings):
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row))
    (found,) = read_inputs([str(file)], task, settings, labels=labels)
    assert found[0] == row  # with all columns, to be written beside the predictions
    return found[1]


@pytest.mark.parametrize(
    ("task", "row", "settings", "expected"),
    [
        (TWO, {"id": 7, "text": "x"}, {}, {"text": "x"}),
        (TWO, {"a": "x", "b": "y"}, {"text": "{a}{b}"}, {"text": "xy"}),
        (Regression(), {"text": "x"}, {"source": "files", "train": "gone.csv"}, {"text": "x"}),
        (WORDS, {"tokens": ["x"]}, {}, {"tokens": ["x"]}),
        (
            QuestionAnswering(),
            {"question": "q", "context": "c"},
            {},
            {"question": "q", "context": "c", "number": 0},
        ),
        (CausalLM(chat=True), {"messages": PAIR}, {}, {"messages": PAIR[:1]}),
        (CausalLM(chat=True), {"messages": PAIR[:1]}, {}, {"messages": PAIR[:1]}),
        (CausalLM(chat=True), {"prompt": "q"}, {}, {"messages": PAIR[:1]}),
        (CausalLM(chat=True), {"x": "q"}, {"prompt": "x", "answer": "y"}, {"messages": PAIR[:1]}),
        (CausalLM(chat=True), {"instruction": "q", "input": ""}, {}, {"messages": PAIR[:1]}),
        (CausalLM(), {"text": "x"}, {}, {"text": "x"}),
        (Seq2Seq(), {"text": "x"}, {}, {"text": "x"}),
        (Seq2Seq(), {"instruction": "q"}, {}, {"text": "q"}),
    ],
)  # fmt: skip
def test_rows_without_labels_are_read_for_every_task(tmp_path, task, row, settings, expected):
    assert read(tmp_path, row, task, **settings) == expected


def test_rows_with_labels_have_those_of_the_task(tmp_path):
    row = {"text": "x", "label": "good"}
    assert read(tmp_path, row, TWO, labels=True) == {"text": "x", "label": 1}
    found = read(tmp_path, {"messages": PAIR}, CausalLM(chat=True), labels=True)
    assert found == {"messages": PAIR}


def test_an_adapter_reads_the_kind_of_rows_that_it_was_trained_on(tmp_path):
    both = {"text": "x", "prompt": "q"}
    assert read(tmp_path, both, CausalLM(chat=True)) == {"messages": PAIR[:1]}
    assert read(tmp_path, both, CausalLM()) == {"text": "x"}


def test_files_are_read_as_they_are_needed(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "x\n" * 5 + "a,b\n")
    rows = iter(read_inputs([str(file)], TWO, {}))
    assert [next(rows)[1] for _ in range(5)] == [{"text": "x"}] * 5
    with pytest.raises(InputError, match="line 7"):
        next(rows)


def media(folder, name, labels=False):
    images = ImageClassification(classes=["a", "b"])
    return list(read_inputs([str(folder / name)], images, {}, labels=labels))


def test_images_are_files_those_of_a_folder_or_those_of_a_table(tmp_path):
    for name in ("b/2.png", "a/1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    files = [str(tmp_path / "in" / name) for name in ("a/1.png", "b/2.png")]
    assert [row for _, row in media(tmp_path, "in")] == [{"path": file} for file in files]
    assert media(tmp_path, "in/a/1.png") == [({"path": files[0]}, {"path": files[0]})]
    for hidden in ("a/._1.png", "a/.ipynb_checkpoints/1.png"):  # of macOS, of Jupyter
        (tmp_path / "in" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / hidden).write_bytes(b"")
    assert [row for _, row in media(tmp_path, "in")] == [{"path": file} for file in files]
    labeled = media(tmp_path, "in", labels=True)
    assert [(row["path"], row["label"]) for _, row in labeled] == [(files[0], 0), (files[1], 1)]
    assert len({row["sha256"] for _, row in labeled}) == 2
    (tmp_path / "t.csv").write_text("id,path,label\n5,in/b/2.png,b\n")
    ((raw, row),) = media(tmp_path, "t.csv")
    assert raw == {"id": "5", "path": "in/b/2.png", "label": "b"}
    assert row == {"path": files[1]}
    assert media(tmp_path, "t.csv", labels=True)[0][1]["label"] == 1
    (tmp_path / "t.csv").write_text("path,label\nin/b/2.png,c\n")
    (tmp_path / "u.csv").write_text("path\nin/b/3.png\n")
    wrong = {"t.csv": "'c'", "u.csv": r"u\.csv, line 2.*3\.png", "in/a/1.png": "labels"}
    for name, words in wrong.items():
        with pytest.raises(InputError, match=words):
            media(tmp_path, name, labels=name != "u.csv")
