"""What training changed in rankings: numbers of the section, from files written by hand."""

import json

import pytest

from petl.training.features.rankings import RankingSection
from petl.training.features.section import Lines

# text, first document, nDCG@10, similarity of the relevant and of the nearest other document
BEFORE = [
    ("one two", "wrong", 0.0, 0.2, 0.6),
    ("one two three", "right", 1.0, 0.8, 0.4),
    ("one two three four", "right", 1.0, 0.6, 0.4),
    ("a b c d e", "other", 0.5, 0.4, None),
]
AFTER = [
    ("one two", "right", 1.0, 0.8, 0.2),
    ("one two three", "right", 0.9, 0.8, 0.4),
    ("one two three four", "wrong", 0.25, 0.4, 0.6),
    ("a b c d e", "other", 0.5, 0.4, None),
]


def write(file, queries):
    names = ("text", "prediction", "ndcg_at_10", "nearest_relevant", "nearest_other")
    lines = [
        {"row": row, "label": "right", **dict(zip(names, each, strict=True))}
        for row, each in enumerate(queries)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def section(tmp_path):
    write(tmp_path / "predictions_before.jsonl", BEFORE)
    write(tmp_path / "predictions.jsonl", AFTER)
    return RankingSection.section(tmp_path, {})


def test_queries_whose_first_document_changed_are_listed_with_the_largest_change_first(section):
    assert "Of 4 queries 2 have another first document" in section.text
    assert "higher for 1 of them, and lower for 1" in section.text
    assert section.examples.rows == [
        ["one two", "right", "wrong", "right", "0 → 100 %"],
        ["one two three four", "right", "right", "wrong", "100 → 25 %"],
    ]


def test_similarities_are_shares_of_queries_over_the_same_range(section):
    charts = [chart for chart in section.charts if isinstance(chart, Lines)]
    assert [chart.title.rpartition(", ")[2] for chart in charts] == ["before training", "adapted"]
    for chart, (near, other) in zip(charts, ((0.5, 1.4 / 3), (0.6, 1.2 / 3)), strict=True):
        for curve, mean in zip(chart.curves, (near, other), strict=True):
            assert sum(share for _, share in curve.points) == pytest.approx(100)
            found = sum(x * share for x, share in curve.points) / 100
            assert found == pytest.approx(mean, abs=0.6 / 24)  # the width of a bin
    assert [x for x, _ in charts[0].curves[0].points] == [x for x, _ in charts[1].curves[1].points]


def test_scores_by_length_are_means_over_the_queries_of_each_part(section):
    bars = section.charts[-1].bars
    values = {(bar.group, bar.text.split(" of ")[1]): bar.value for bar in bars}
    assert values["before training", "1 queries"] == pytest.approx(50)
    assert [round(bar.value) for bar in bars] == [0, 100, 100, 90, 100, 25, 50, 50]
    assert [bar.name for bar in bars if bar.name] == ["2", "3", "4", "5"]


def test_without_scores_before_training_there_is_no_comparison(tmp_path):
    write(tmp_path / "predictions.jsonl", AFTER)
    section = RankingSection.section(tmp_path, {})
    assert section.examples is None
    assert section.text == ""
    assert len(section.charts) == 2


def test_other_predictions_have_no_rankings(tmp_path):
    assert RankingSection.section(tmp_path, {}) is None
    (tmp_path / "predictions.jsonl").write_text('{"row": 0, "vector": [0.1, 0.2]}\n')
    assert RankingSection.section(tmp_path, {}) is None
