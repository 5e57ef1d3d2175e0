"""The preview without torch says what that with the model's own tokenizer says."""

import json

import pytest

from petl.errors import InputError
from petl.experiments.planning.early_preview import preview_early
from petl.experiments.planning.preview import preview
from petl.training.compose import compose

ROWS = [
    ("Well-known café, isn't it?", "Both of them", "yes|often"),
    ("unaffable myocarditis 東京 " * 4, "and more of them", "no"),
    ("a", "b", "often"),
    ("the words of a row", "a second text", "yes"),
] * 6


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    for name, rows in (("train", ROWS), ("test", [*ROWS[:3], ("a fresh one", "", "no")])):
        keys = ("text", "second", "label")
        lines = (json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return ["data=files", f"data.train={tmp_path}/train.jsonl", "data.max_length=12"]


def test_texts_with_any_number_of_classes(files):
    words = [*files, "data.task=multi_label", "data.separator='|'"]
    cfg = compose([*words, f"data.test={files[1].partition('=')[2].replace('train', 'test')}"])
    found = preview_early(cfg, 5)
    assert found is not None
    assert found == preview(cfg, 5)
    assert found.parts[0].truncated == 6
    assert found.examples[0].label


def test_pairs_of_texts_that_are_divided(files):
    words = ["data.text_pair=second", "data.labels=[often,no,yes,yes|often]", "data.test_share=0.3"]
    cfg = compose([*files, *words])
    assert preview_early(cfg) == preview(cfg)


def test_the_data_of_the_quickstart(files):
    cfg = compose(["data.train_rows=60", "data.test_rows=40"])
    assert preview_early(cfg) == preview(cfg)


@pytest.mark.parametrize(
    "words",
    [
        ["model=vit_random"],
        ["data.task=causal_lm", "model=smollm2"],
        ["data.new_tokens=[myocarditis]"],
        ["data.max_length=513"],
    ],
)
def test_what_needs_more_than_the_tokenizer_is_not_read(files, words):
    assert preview_early(compose([*files, *words])) is None


# Rows as they are, without a model

QUESTIONS = [("who is it", "it is Bob", "Bob"), ("where is it?", "here it is", "here")] * 9
OF_TASK = {
    "regression": [{"text": f"text {i % 17}", "label": i / 4} for i in range(20)],
    "token_classification": [
        {"tokens": ["at", f"N{i % 13}"], "tags": ["O", "B-X" if i % 3 else "O"]} for i in range(20)
    ],
    "question_answering": [
        {"question": f"{q} {i // 4}", "context": c, "answers": [a]}
        for i, (q, c, a) in enumerate(QUESTIONS)
    ],
    "retrieval": [{"query": f"query {i % 15}", "positive": f"text {i}"} for i in range(20)],
    "reranking": [
        {"query": f"query {i % 15}", "positive": f"text {i}", "negatives": ["one", "other"]}
        for i in range(20)
    ],
    "causal_lm": [{"text": f"a text of number {i % 16}"} for i in range(20)],
}


def written(tmp_path, task, rows, *words):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return compose(
        ["data=files", f"data.train={tmp_path}/rows.jsonl", "data.test_share=0.4", *words]
        + ([f"data.task={task}"] if task else [])
    )


@pytest.mark.parametrize("task", OF_TASK)
def test_rows_labels_and_leaks_are_those_of_the_preview_of_a_model(tmp_path, task):
    cfg = written(tmp_path, task, OF_TASK[task])
    found, other = preview_early(cfg, 2, names_model=False), preview(cfg, 2)
    assert found is not None
    assert (found.overlap, found.unit) == (other.overlap, "characters")
    assert len(found.examples) == len(other.examples) == 2
    for own, of_model in zip(found.parts, other.parts, strict=True):
        for name in ("name", "rows", "targets"):
            assert getattr(own, name) == getattr(of_model, name)
        if task == "token_classification":
            assert own.counts == of_model.counts


def test_a_length_is_that_of_all_texts_and_turns_have_their_roles(tmp_path):
    turns = [[{"role": "user", "content": "hello" * i}] for i in range(1, 11)]
    answer = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [*each, answer]} for each in turns]
    cfg = written(tmp_path, "causal_lm", rows, "data.test_rows=2")
    found = preview_early(cfg, 10, names_model=False)
    lengths = [5 * i + len("yes") for i in range(1, 11)]
    assert {n for part in found.parts for n in part.lengths} <= {*lengths}
    shown = found.examples[0].pieces[0].text.split("\n")
    assert shown[0].startswith("user: hellohello"[:11])
    assert shown[1] == "assistant: yes"


def test_pairs_of_answers_are_told_apart(tmp_path):
    rows = [{"prompt": f"q {i}", "chosen": "this", "rejected": "that"} for i in range(10)]
    found = preview_early(written(tmp_path, None, rows, "+task=dpo"), 1, names_model=False)
    (shown,) = found.examples[0].pieces
    assert shown.text.split("\n")[1:] == ["chosen: this", "rejected: that"]


def test_a_fault_of_a_row_is_told(tmp_path):
    rows = [{"text": "a", "target": "b"}] * 9 + [{"text": "a", "target": 3}]
    with pytest.raises(InputError, match="line 10"):
        preview_early(written(tmp_path, "seq2seq", rows), names_model=False)
