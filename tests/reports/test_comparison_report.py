"""The page of a comparison: table, sentences, pictures."""

import re
from itertools import pairwise

import pytest
from comparable import write_run
from matplotlib.figure import Figure

from petl.cli import main
from petl.reports.charts import Point, draw_costs, few_plain_ticks, front
from petl.reports.comparison import compare
from petl.reports.comparison_report import results, summary, write_page


@pytest.fixture
def runs(tmp_path):
    for method, scores in {
        "lora": (0.50, 0.52, 0.54),
        "mola": (0.60, 0.61, 0.62),
        "mos": (0.51, 0.52, 0.53),
    }.items():
        for seed, score in enumerate(scores):
            words = [f"+method={method}", f"train.seed={seed}"]
            write_run(tmp_path / "runs" / method / str(seed), score, *words)
    return tmp_path / "runs"


def test_the_table_says_score_size_time_and_difference(runs):
    table = results(*compare([runs]))
    assert all(len(row) == len(table.columns) for row in table.rows)
    first = dict(zip(table.columns, table.rows[0], strict=True))
    assert first["method"] == "mola"
    assert first["test accuracy"] == "61.0 ± 1.0 %"
    assert first["parameters"] == "1,000"
    assert first["file"] == "4 kB"
    assert first["s a step"] == "0.500"
    assert first["against lora"] == "+9.0 (+8.0 to +10.0)"
    assert table.rows[-1][:2] == ["before training", "10.0 %"]


def test_a_tie_is_called_one(runs):
    better, tied, error = summary(*compare([runs]))
    assert better == "mola: better than lora with every seed."
    assert tied.startswith("mos: not told apart from lora")
    assert "4.9 points" in error  # sqrt(0.61 * 0.39 / 100)


def test_two_seeds_are_too_few_to_tell_methods_apart(runs):
    (runs / "mos" / "2" / "scores.json").unlink()
    first, _ = summary(*compare([runs]))
    assert first == "Fewer than 3 seeds: too few to tell these apart."


def test_the_page_holds_the_table_and_its_pictures(runs, tmp_path):
    page, table, picture = write_page(compare([runs]), tmp_path / "page")
    text = page.read_text()
    assert "61.0 ± 1.0 %" in text
    assert "data:image/png;base64," in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # it can be passed on alone
    assert table.read_text().startswith("| method | test accuracy |")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_pictures(tmp_path):
    point = Point("lora " + "train.early_stopping=1 " * 8, 1.0, 0.5, 0.0)
    path = tmp_path / "costs.png"
    assert draw_costs({"a": [point], "b": [point]}, path, score="x", higher_is_better=True) == [
        path
    ]


def test_marks_of_a_logarithmic_axis_are_plain_and_stand_apart():
    figure = Figure(figsize=(6, 4))
    for ratio, marks in ((20, {"0.5", "1", "2", "5"}), (2000, {"1", "10", "100"})):
        axes = figure.add_subplot()
        axes.set(xscale="log", xlim=(0.4, 0.4 * ratio))
        few_plain_ticks(axes.xaxis, ratio)
        figure.canvas.draw()
        labels = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
        assert marks <= {label.get_text() for label in labels}
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
        axes.remove()


def test_the_page_of_runs_that_are_not_alike_says_so(tmp_path):
    for i, method in enumerate(("lora", "mola")):
        after = {"accuracy": 0.5, "rows": 50.0 * (i + 1)}
        words = f"+method={method}", f"train.steps={6 * (i + 1)}"
        write_run(tmp_path / method, 0.0, *words, after=after)
    _, table, _ = write_page(compare([tmp_path]), tmp_path / "page")
    text = table.read_text()
    assert "Not only methods differ between these runs: train.steps=6 or 12." in text
    assert "data: wordnet, 50 or 100 test rows" in text


def test_the_rates_of_a_study_are_shown_and_the_taken_one_is_marked(runs, tmp_path):
    rates = {"lora": {"validation": {"0.01": 0.5, "0.001": 0.625}, "taken": 0.001}}
    rates["mos"] = {"validation": {"0.01": 0.25}, "taken": 0.01}
    _, table, _ = write_page(compare([runs]), tmp_path / "page", rates)
    assert "| lora | 62.5 % * | 50.0 % |" in table.read_text()
    assert "| mos | failed | 25.0 % * |" in table.read_text()


def test_the_page_of_a_search_says_that_its_scores_are_of_held_out_rows(tmp_path):
    for method in ("lora", "mos"):
        write_run(tmp_path / method, 0.0, f"+method={method}", after=None, validation=0.4)
    page, *_ = write_page(compare([tmp_path]), tmp_path / "page")
    assert "<th>held-out accuracy</th>" in page.read_text()
    assert "test rows" not in page.read_text()


def test_compare_is_a_command(runs, tmp_path, capsys):
    status = main.main(["compare", str(runs), "--out", str(tmp_path / "out")])
    assert status == 0
    assert "61.0 ± 1.0 %" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").is_file()


def test_each_data_set_is_a_section_of_its_own(runs, tmp_path, capsys):
    write_run(tmp_path / "runs" / "other", 0.3, "+method=lora", "data=files", "data.train=x.csv")
    status = main.main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert status == 0
    said = capsys.readouterr().out
    assert said.index("files x.csv on minilm\n") < said.index("wordnet on minilm\n")
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.startswith("## files x.csv on minilm\n\n| method |")
    assert "\n## wordnet on minilm\n" in text
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/png;base64,") == 2
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"costs-1.png", "costs-2.png"}


def test_compare_of_nothing_is_one_message(tmp_path, capsys):
    assert main.main(["compare", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_the_front_is_what_nothing_beats():
    points = [Point("a", 1, 5, 0), Point("b", 2, 4, 0), Point("c", 3, 7, 0), Point("d", 3, 6, 0)]
    assert [point.name for point in front(points, higher_is_better=True)] == ["a", "c"]
    assert [point.name for point in front(points, higher_is_better=False)] == ["a", "b"]
