"""`petl data`: the training data of a run, as statistics and examples."""

import json
import re

import numpy as np
import pytest
from media_fixtures import AST, VIT, audio, images

from petl.data.base import read_data
from petl.data.learned import BRACKETS
from petl.data.models.loading import load_processor
from petl.experiments.planning.preview import (
    Preview,
    example_texts,
    label_tables,
    preview,
    size_table,
    statistics,
)
from petl.training.compose import compose

pytest_plugins = ["media_fixtures", "task_fixtures", "training_fixtures"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def bracketed(found):
    """The texts in brackets of each example."""
    inside = re.compile(f"{BRACKETS[0]}(.*?){BRACKETS[1]}")
    return [inside.findall(text.plain) for text in example_texts(found, color=False)]


def test_classes_lengths_and_truncated_examples_are_counted(tiny):
    found = preview(compose([*tiny.classify, "data.max_length=6"]), examples=2)
    lines = (tiny.folder / "train.csv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split(",") for line in lines), strict=True)
    lengths = [len(text.split()) + 2 for text in texts]  # with [CLS] and [SEP]
    train, test = found.parts
    assert (train.rows, train.encoded, train.dropped, test.rows) == (50, 50, 0, 20)
    assert train.truncated == sum(length > 6 for length in lengths) > 0
    assert train.lengths[0] == min(lengths)
    assert train.lengths[-1] == 6
    assert train.counts == {name: labels.count(name) for name in ("beast", "color", "tool")}
    assert train.loss_fraction is None
    first = next(example_texts(found, color=False)).plain
    assert re.fullmatch(r"1  \[CLS\] [a-z ]+ \[SEP\]  → (beast|color|tool)", first)


def test_quantiles_are_lengths_of_examples(tiny):
    found = preview(compose(tiny.classify))
    lines = (tiny.folder / "train.csv").read_text().splitlines()[1:]
    lengths = sorted(min(16, len(line.split(",")[0].split()) + 2) for line in lines)
    expected = [lengths[int(np.ceil(q * 49))] for q in (0, 0.5, 0.9, 0.99, 1)]
    assert found.parts[0].lengths == expected


@pytest.mark.parametrize(
    ("task", "pattern"),
    [
        ("causal_lm", r"(cat|dog) \[SEP\]"),
        ("seq2seq", r"\[CLS\] (cat|dog) \[SEP\]"),
        ("question_answering", "cat|dog"),
    ],
)
def test_tokens_with_loss_are_in_brackets(families, task, pattern):
    found = preview(compose(families(task)), examples=8)
    rows = [run for run in bracketed(found) if run]
    assert rows
    assert all(len(run) == 1 and re.fullmatch(pattern, run[0]) for run in rows)
    assert 0 < found.parts[0].loss_fraction < 0.5
    absent = [
        text.plain for text in example_texts(found, color=False) if BRACKETS[0] not in text.plain
    ]
    assert all(text.endswith("→ no answer in this window") for text in absent)


def test_both_answers_of_a_pair_are_shown(tiny, tmp_path):
    rows = [{"prompt": "one ", "chosen": "cat", "rejected": "dog"}] * 8
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "model=path",
        f"model.path={tiny.folder}/llama",
        "data=files",
        f"data.train={tmp_path}/pairs.jsonl",
        "data.test_share=0.5",
    ]
    found = preview(compose([*words, "+task=dpo", "task.plain=true"]), examples=1)
    shown = next(example_texts(found, color=False)).plain
    assert re.search(r"chosen: .*one.*⟦.*cat.*⟧\s+rejected: .*one.*⟦.*dog.*⟧", shown, re.DOTALL)


@pytest.mark.parametrize("task", ["causal_lm", "regression", "classification"])
def test_a_split_without_examples_has_no_quantiles(families, tiny, task):
    overrides = tiny.classify if task == "classification" else families(task)
    data = read_data(compose(overrides).data)
    processor = load_processor(compose(overrides).model, data.task)
    parts = []
    for name, rows in (("train", data.train), ("test", data.test.select([]))):
        encoded = data.task.encode(processor, data.test).select(range(len(rows) and 3))
        parts.append(statistics(name, data.task, processor, rows, encoded))
    full, empty = parts
    assert full.lengths
    assert (empty.encoded, empty.lengths, empty.loss_fraction, empty.targets) == (0, *[None] * 3)
    found = Preview("", data.task.unit, parts, [])
    columns, rows = size_table(found)
    assert [len(row) for row in rows] == [len(columns)] * 2
    assert rows[1][5:] == ["-"] * (len(columns) - 5)
    assert rows[0][5:10] == full.lengths
    columns, _ = size_table(Preview("", "pixels", [empty], []))
    assert not any("median" in name for name in columns)
    for columns, rows in label_tables(found):
        assert all(len(row) == len(columns) for row in rows)


def test_windows_are_counted_with_their_questions(families):
    train = preview(compose(families("question_answering"))).parts[0]
    assert train.counts["questions"] == train.rows == 60
    held = train.counts["windows with the answer"], train.counts["windows without"]
    assert sum(held) == train.encoded > 60
    assert min(held) > 0
    assert (train.dropped, train.truncated) == (None, None)


def test_tags_are_counted_and_named(families):
    found = preview(compose(families("token_classification")), examples=1)
    rows = [json.loads(line) for line in (families.folder / "train.jsonl").read_text().splitlines()]
    tags = [tag for row in rows for tag in row["tags"]]
    assert found.parts[0].counts == {tag: tags.count(tag) for tag in sorted(set(tags))}
    (words,) = bracketed(found)
    text = next(example_texts(found, color=False)).plain
    assert len(" ".join(words).split()) == len(text.split("→")[1].split())


def test_regression_targets_are_described_by_quantiles(families):
    found = preview(compose(families("regression")), examples=1)
    assert found.parts[0].targets[0] < found.parts[0].targets[-1]
    assert found.parts[0].counts == {}
    assert "→" in next(example_texts(found, color=False)).plain


@pytest.mark.parametrize("kind", ["pictures", "sounds"])
def test_images_and_audio_are_described_by_shape_and_label(kind, request):
    folder = request.getfixturevalue(kind)
    words = [*VIT, *images(folder)] if kind == "pictures" else [*AST, *audio(folder)]
    found = preview(compose(words), examples=2)
    assert found.parts[0].lengths is None
    assert sorted(found.parts[0].counts.values()) == [3, 3]
    expected = {"pixel_values": (3, 16, 16)} if kind == "pictures" else {"input_values": (64, 16)}
    assert found.examples[0].shapes == expected
    assert " x 16  " in next(example_texts(found, color=False)).plain
