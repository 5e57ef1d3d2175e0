"""The preview without torch says what that with the model's own tokenizer says."""

import json

import pytest

from petl.experiments.planning.preview import preview
from petl.experiments.planning.texts import preview_texts
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
    found = preview_texts(cfg, 5)
    assert found is not None
    assert found == preview(cfg, 5)
    assert found.parts[0].truncated == 6
    assert found.examples[0].label


def test_pairs_of_texts_that_are_divided(files):
    words = ["data.text_pair=second", "data.labels=[often,no,yes,yes|often]", "data.test_share=0.3"]
    cfg = compose([*files, *words])
    assert preview_texts(cfg) == preview(cfg)


def test_the_data_of_the_quickstart(files):
    cfg = compose(["data.train_rows=60", "data.test_rows=40"])
    assert preview_texts(cfg) == preview(cfg)


@pytest.mark.parametrize(
    "words",
    [
        ["model=vit_random"],
        ["data.task=causal_lm"],
        ["data.task=regression"],
        ["data.new_tokens=[myocarditis]"],
        ["data.max_length=513"],
    ],
)
def test_what_needs_more_than_the_tokenizer_is_not_read(files, words):
    assert preview_texts(compose([*files, *words])) is None
