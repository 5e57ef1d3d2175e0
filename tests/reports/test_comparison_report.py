"""The report of a comparison: table, sentences, charts."""

import re

import pytest
from comparable import write_run

from petl.cli import main
from petl.reports.comparison import compare
from petl.reports.comparison_report import results, standard_error, summary, write_page


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


def test_the_table_has_score_size_time_and_difference(runs):
    table = results(*compare([runs]))
    assert all(len(row) == len(table.columns) for row in table.rows)
    first = dict(zip(table.columns, table.rows[0], strict=True))
    assert first["method"] == "mola"
    assert first["test accuracy"] == "61.0 ± 1.0 %"
    assert first["parameters"] == "1,000"
    assert first["adapter file"] == "4 kB"
    assert first["s/step"] == "0.500"
    assert first["vs lora"] == "+9.0 (+8.0 to +10.0)"
    assert table.rows[-1][:2] == ["before training", "10.0 %"]


def test_entries_whose_seeds_disagree_are_not_ranked(runs):
    better, unclear, error = summary(*compare([runs]))
    assert better == "mola: better than lora in every seed."
    assert unclear == "mos: no clear difference to lora (the seeds disagree)."
    assert "4.9 points" in error  # sqrt(0.61 * 0.39 / 100)


def test_two_seeds_are_too_few_to_rank_methods(runs):
    (runs / "mos" / "2" / "scores.json").unlink()
    first, _ = summary(*compare([runs]))
    assert first == "Fewer than 3 seeds: too few to rank these methods."


def test_the_page_has_the_table_and_charts_and_needs_no_other_file(runs, tmp_path):
    page, table, *charts = write_page(compare([runs]), tmp_path / "page")
    text = page.read_text()
    assert "61.0 ± 1.0 %" in text
    assert text.count("<svg ") == 5
    assert "adapter parameters (thousands)" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert table.read_text().startswith("| method | test accuracy |")
    names = ["parameters.svg", "file.svg", "step.svg", "memory.svg", "legend.svg"]
    assert [chart.name for chart in charts] == names
    assert charts[0].read_text() in text


def test_settings_that_differ_besides_the_method_are_reported(tmp_path):
    for i, method in enumerate(("lora", "mola")):
        after = {"accuracy": 0.5, "rows": 50.0 * (i + 1)}
        words = f"+method={method}", f"train.steps={6 * (i + 1)}"
        write_run(tmp_path / method, 0.0, *words, after=after)
    _, table, *_ = write_page(compare([tmp_path]), tmp_path / "page")
    text = table.read_text()
    assert "These runs also differ in other settings: train.steps=6 or 12." in text
    assert "data: wordnet, 50 or 100 test examples" in text


def test_the_learning_rates_of_a_study_are_listed_and_the_chosen_one_is_marked(runs, tmp_path):
    rates = {"lora": {"validation": {"0.01": 0.5, "0.001": 0.625}, "taken": 0.001}}
    rates["mos"] = {"validation": {"0.01": 0.25}, "taken": 0.01}
    _, table, *_ = write_page(compare([runs]), tmp_path / "page", rates)
    assert "| lora | 62.5 % * | 50.0 % |" in table.read_text()
    assert "| mos | failed | 25.0 % * |" in table.read_text()


def test_the_page_of_a_search_labels_its_scores_as_validation_scores(tmp_path):
    for method in ("lora", "mos"):
        write_run(tmp_path / method, 0.0, f"+method={method}", after=None, validation=0.4)
    page, *_ = write_page(compare([tmp_path]), tmp_path / "page")
    assert "<th>validation accuracy</th>" in page.read_text()
    assert "test examples" not in page.read_text()


def test_compare_is_a_command(runs, tmp_path, capsys):
    status = main.main(["compare", str(runs), "--out", str(tmp_path / "out")])
    assert status == 0
    assert "61.0 ± 1.0 %" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").is_file()


def test_each_data_set_is_a_section_of_its_own(runs, tmp_path, capsys):
    write_run(tmp_path / "runs" / "other", 0.3, "+method=lora", "data=files", "data.train=x.csv")
    status = main.main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert status == 0
    printed = capsys.readouterr().out
    assert printed.index("files x.csv on minilm\n") < printed.index("wordnet on minilm\n")
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.startswith("## files x.csv on minilm\n\n| method |")
    assert "\n## wordnet on minilm\n" in text
    assert (tmp_path / "out" / "index.html").read_text().count("<svg ") == 10
    assert {"step-1.svg", "step-2.svg"} < {p.name for p in (tmp_path / "out").glob("*.svg")}


def test_compare_of_nothing_is_one_message(tmp_path, capsys):
    assert main.main(["compare", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_the_standard_error_is_not_zero_when_all_answers_are_right(tmp_path):
    write_run(tmp_path / "lora", 1.0, "+method=lora")
    (found,) = compare([tmp_path])
    assert standard_error(found) == pytest.approx((101 / 102 * 1 / 102 / 100) ** 0.5)
