"""Rows with any number of classes: reading, loss, scores, the threshold, predictions."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from training_fixtures import train

from petl.cli import main
from petl.data.base import read_data
from petl.data.tasks.multi_label import MultiLabel
from petl.errors import InputError
from petl.system.files.read import parse_list
from petl.testing import tiny_bert

pytest_plugins = ["training_fixtures"]
CLASSES = ["a", "b", "c"]
SETS = [["a"], ["a", "b"], [], ["c", "b"], ["c"], ["a", "b", "c"]]


def read(file, **settings):
    base = {"name": "files", "source": "files", "task": "multi_label", "max_length": 32}
    return read_data({**base, "train": str(file), "test": str(file), **settings})


def sets_of(raw):
    rows = sorted(raw.train, key=lambda row: int(row["text"].split()[1]))
    return [[raw.task.classes[i] for i in row["label"]] for row in rows]


LISTS = "\n".join(json.dumps({"text": f"row {i}", "label": own}) for i, own in enumerate(SETS))
CELLS = "text,label\n" + "\n".join(f"row {i},{'|'.join(own)}" for i, own in enumerate(SETS))
COLUMNS = "text,a,b,c\n" + "\n".join(
    f"row {i}," + ",".join(str(int(name in own)) for name in CLASSES) for i, own in enumerate(SETS)
)


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("a.jsonl", LISTS, {}),
        ("a.csv", CELLS, {"separator": "|"}),
        ("b.csv", CELLS.replace("|", " ; "), {"separator": ";"}),
        ("a.csv", COLUMNS, {"label_columns": CLASSES}),
        ("a.csv", COLUMNS.replace(",1", ",True").replace(",0", ",no"), {"label_columns": CLASSES}),
        ("a.tsv", "text\tlabel\n" + "\n".join(
            f"row {i}\t{json.dumps(own)}" for i, own in enumerate(SETS)
        ).replace('"', '""').replace("[", '"[').replace("]", ']"'), {}),
    ],
    ids=["lists", "cells", "spaces", "columns", "words", "json in cells"],
)  # fmt: skip
def test_every_form_gives_the_same_rows(tmp_path, name, content, settings):
    (tmp_path / name).write_text(content)
    raw = read(tmp_path / name, **settings)
    assert raw.task.classes == CLASSES
    assert sets_of(raw) == [sorted(own) for own in SETS]


@pytest.mark.parametrize("text", ["[a, b]", "[1], [2]", "[1][0]", "a]", "[" * 999 + "]" * 999])
def test_a_text_in_brackets_that_is_no_list_is_left_as_it_is(text):
    assert parse_list(text) is None


def test_lists_that_pandas_writes_as_text_are_lists(tmp_path):
    cells = [["sales", "it's"], [], ["tech"], ["sales", "tech"], ["it's"]] * 4
    file = tmp_path / "lists.csv"
    pd.DataFrame({"text": [f"row {i}" for i in range(20)], "label": cells}).to_csv(
        file, index=False
    )
    raw = read(file)
    assert raw.task.classes == ["it's", "sales", "tech"]
    assert sets_of(raw)[:4] == [["it's", "sales"], [], ["tech"], ["sales", "tech"]]
    with pytest.raises(InputError, match=r"data\.task=multi_label") as refused:
        read(file, task="classification")
    assert "separator" not in str(refused.value)


@pytest.mark.parametrize("separator", ["|", ";", ",", "/"])
def test_several_classes_in_a_cell_are_asked_about(tmp_path, separator):
    header, *rows = CELLS.replace(",", "\t").splitlines()
    file = tmp_path / "a.tsv"
    content = [header, *(row.replace("|", separator) for row in rows if not row.endswith("\t"))]
    file.write_text("\n".join(content))
    with pytest.raises(InputError, match=r"data\.task=multi_label '?data\.separator=") as refused:
        read(file, task="classification")
    assert separator in str(refused.value)
    raw = read(file, task="classification", labels=["a", f"a{separator}b", f"c{separator}b", "c",
                                                    f"a{separator}b{separator}c"])  # fmt: skip
    assert len(raw.task.classes) == 5


@pytest.mark.parametrize("cells", [["a;b", "b", "a", "c;a"], ["a;b", "a", "b"]])
def test_cells_of_several_classes_are_asked_about_by_every_task(tmp_path, cells):
    rows = [{"text": f"row {i}", "label": cells[i % len(cells)]} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for task in ("classification", "multi_label"):
        with pytest.raises(InputError, match=r"'data\.separator=\";\"'") as refused:
            read(tmp_path / "a.jsonl", task=task)
        assert ("data.task=" in str(refused.value)) == (task == "classification")


def test_a_text_of_two_classes_is_asked_about_where_rows_may_have_several(tmp_path):
    def classes(*cells, task):
        rows = [{"text": f"row {i}", "label": cells[i % len(cells)]} for i in range(12)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return read(tmp_path / "a.jsonl", task=task).task.classes

    cells = ["toxic;threat", "toxic", "insult"]
    assert len(classes(*cells, task="classification")) == 3, "threat is no class of its own"
    with pytest.raises(InputError):
        classes(*cells, task="multi_label")
    # in lists, each is a class
    assert classes(*([cell] for cell in cells), task="multi_label") == sorted(cells)


@pytest.mark.parametrize(
    "names",
    [
        *(["yes", "yes, often", "no"], ["R&D, EU", "Sales, US", "HR"], ["1/2", "3/4", "5/6"]),
        *(["sci/tech", "sci/fi", "sports"], ["rock and roll, pop", "jazz, pop", "pop"]),
        *(["yes", "no", "yes/no"], ["Austin, TX", "Dallas, TX", "Reno, NV", "Elko, NV"]),
    ],
)
def test_names_with_a_comma_stay_classes(tmp_path, names):
    rows = [{"text": f"row {i}", "label": names[i % len(names)]} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(read(tmp_path / "a.jsonl", task="classification").task.classes) == sorted(names)


# Scores


@pytest.fixture
def scored():
    """A task, logits and labels of 40 rows, with a class in no label and one in all."""
    generator = torch.Generator().manual_seed(3)
    task = MultiLabel(["a", "b", "never", "always", "e"])
    labels = (torch.rand(40, 5, generator=generator) < 0.3).float()
    labels[:, 2], labels[:, 3] = 0.0, 1.0
    return task, 2 * torch.randn(40, 5, generator=generator) + labels, labels


def by_hand(logits, labels, threshold):
    """F1 over pairs and the mean over classes, counted one by one."""
    counts = np.zeros((labels.shape[1], 3))
    for i, c in itertools.product(range(len(labels)), range(labels.shape[1])):
        predicted = float(torch.sigmoid(logits[i, c])) >= threshold
        counts[c] += predicted and labels[i, c] == 1, predicted, labels[i, c] == 1

    def f1(hits, predicted, labeled):
        return 2 * hits / (predicted + labeled) if predicted + labeled else 0.0

    return f1(*counts.sum(0)), np.mean([f1(*own) for own in counts])


@pytest.mark.parametrize("threshold", [None, 0.23, 0.8])
def test_scores_are_those_of_counting(scored, threshold):
    task, logits, labels = scored
    task.threshold = threshold
    outputs = task.outputs_from_logits(logits)
    total = sum(
        task.score(task.outputs_from_logits(logits[i : i + 7]), {"labels": labels[i : i + 7]})
        for i in range(0, 40, 7)
    )
    assert torch.allclose(total, task.score(outputs, {"labels": labels}))
    scores = task.summarize(total)
    micro, macro = by_hand(logits, labels, threshold or 0.5)
    assert scores["micro_f1"] == pytest.approx(micro, abs=1e-12)
    assert scores["macro_f1"] == pytest.approx(macro, abs=1e-12)
    p = logits.double().sigmoid()
    loss = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert scores["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert scores["rows"] == 40


def test_the_threshold_is_the_best_of_all(scored):
    task, logits, labels = scored
    total = task.score(task.outputs_from_logits(logits), {"labels": labels})
    found = task.tuned(total)
    each = {k: by_hand(logits, labels, k / 100)[0] for k in range(1, 100)}
    assert found.summarize(total)["micro_f1"] == pytest.approx(max(each.values()))
    best = [k for k, value in each.items() if value > max(each.values()) - 1e-12]
    assert round(100 * found.threshold) == min(best, key=lambda k: abs(k - 50))
    assert task.threshold is None, "the task of the run is as it was"
    task.threshold = 0.7
    assert task.tuned(total) is task, "a threshold that is set stays"


def test_the_model_computes_the_loss_of_the_task(scored):
    task, _, labels = scored
    model = tiny_bert().eval()
    model.config.problem_type = task.model_kwargs()["problem_type"]
    batch = {"input_ids": torch.arange(40 * 6).view(40, 6) % 50, "labels": labels}
    outputs = model(**batch)
    total = task.score(outputs, batch)
    assert outputs.loss.item() == pytest.approx(total[0].item() / 40, rel=1e-5)
    assert task.head_loss(outputs.logits, batch).item() == pytest.approx(outputs.loss.item())


def test_predictions_are_what_is_scored(scored):
    task, logits, labels = scored
    task.threshold = 0.37
    outputs = task.outputs_from_logits(logits)
    rows = [{"_number": i, "labels": own.tolist()} for i, own in enumerate(labels)]
    found = dict(task.described(task.predict(outputs, {}).numpy(), rows))
    hits = sum(len({*each["label"]} & {*each["prediction"]}) for each in found.values())
    both = sum(len(each["label"]) + len(each["prediction"]) for each in found.values())
    scores = task.summarize(task.score(outputs, {"labels": labels}))
    assert 2 * hits / both == pytest.approx(scores["micro_f1"])
    losses = [each["loss"] for each in found.values()]
    assert np.mean(losses) == pytest.approx(scores["loss"], rel=1e-4)


def test_outputs_that_are_no_numbers_give_a_loss_that_is_none(scored):
    task, logits, labels = scored
    logits[3, 1] = float("nan")
    outputs = task.outputs_from_logits(logits)
    assert np.isnan(task.summarize(task.score(outputs, {"labels": labels}))["loss"])


# A run


@pytest.mark.thorough
def test_a_run_chooses_the_threshold_on_validation_rows(tiny, tmp_path, capsys):
    words = ["apple", "bread", "cheese"]
    rows = []
    for i in range(120):
        own = [word for n, word in enumerate(words) if (i >> n) & 1]
        rows.append({"text": f"we ate {' and '.join(own) or 'nothing'} today {i}", "label": own})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:100])))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows[100:])))
    settings = [word for word in tiny.steady if not word.startswith("data.")]
    data = ["data=files", "data.task=multi_label", "data.max_length=24"]
    files = [f"data.{part}={tmp_path}/{part}.jsonl" for part in ("train", "test")]
    more = ["train.steps=20", "train.eval_steps=10", "train.lr=0.01", "train.linear_probe=true"]
    run = train([*settings, *data, *files, *more, "+method=lora"], tmp_path / "run")
    threshold = run.scores["validation_scores"]["threshold"]
    assert json.loads((run.path / "adapter/task.json").read_text())["threshold"] == threshold
    assert run.scores["after"]["threshold"] == threshold
    lines = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        chosen = [name for name, p in line["probabilities"].items() if p >= threshold]
        assert line["prediction"] == chosen
    assert {"linear_probe", "before", "after"} <= run.scores.keys()
    page = (run.path / "report.html").read_text()
    assert all(f">{word}<" in page for word in words)
    assert "apple, bread" in page, "expected classes of an example"
    # the same for new rows, from the saved adapter alone
    capsys.readouterr()
    out = tmp_path / "new.jsonl"
    assert (
        main.main(["predict", str(run.path), str(tmp_path / "test.jsonl"), "--out", str(out)]) == 0
    )
    again = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    assert again == [line["prediction"] for line in lines]
