"""The part of a page about predictions."""

import json
import re

import pytest

from petl.experiments.reports.page import render_page
from petl.experiments.reports.predictions_section import MAX_CLASSES, section_of

HOSTILE = '<script>alert("1")</script>\u202e${x}{{ 7 * 7 }}'


def page(folder, rows, before=()):
    for name, part in (("predictions.jsonl", rows), ("predictions_before.jsonl", before)):
        if part:
            (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in part))
    return render_page("it", "predictions.html", section=section_of(folder))


def classified(row, label, prediction, sure=0.75, **more):
    probabilities = {label: 1 - sure, prediction: sure}
    return {
        "row": row,
        "label": label,
        "prediction": prediction,
        "probability": sure,
        "probabilities": probabilities,
        "loss": 1.0,
        **more,
    }


def test_a_folder_without_predictions_has_no_section(tmp_path):
    assert section_of(tmp_path) is None
    assert "<h2>" not in page(tmp_path, [])


def test_texts_and_names_of_a_stranger_are_escaped(tmp_path):
    text = page(tmp_path, [classified(0, f"{HOSTILE}a", HOSTILE, text=HOSTILE, other=HOSTILE)])
    assert text.count("<script") == 1  # the page's own
    assert "\u202e" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text


def test_few_classes_have_a_matrix_and_many_their_most_frequent_confusions(tmp_path):
    rows = [classified(i, "good", "bad" if i < 3 else "good", text="t") for i in range(10)]
    text = page(tmp_path, rows)
    assert "<h3>Confusion matrix</h3>" in text
    assert re.search(r'style="--v:0.700" class="strong"[^>]*>7</td>', text)
    assert "mean confidence 75.0 %, 70.0 % right (n = 10; bins of equal width)" in text
    many = [classified(i, f"c{i}", f"c{i + 1}", text="t") for i in range(MAX_CLASSES)]
    text = page(tmp_path, [*many, classified(99, "c0", "c1", text="t")])
    assert "<h3>Confusion matrix</h3>" not in text
    frequent = text.partition("Most frequent confusions")[2]
    assert "<td>c0</td><td>c1</td><td>2</td>" in frequent


@pytest.mark.parametrize("messages", ["no list", [1], [{"role": "user"}]])
def test_a_conversation_of_another_form_is_shown(tmp_path, messages):
    assert "Worst examples" in page(tmp_path, [{"row": 0, "messages": messages, "loss": 1.0}])
