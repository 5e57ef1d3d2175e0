"""The report of a comparison: table, sentences, charts."""

import pytest
from comparable import write_run

from petl.experiments.reports.comparison import compare
from petl.experiments.reports.comparison_report import (
    charts_of,
    learning_rates_tried,
    results,
    summary,
    write_page,
)


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
    assert first["test accuracy, n = 100"] == "61.0 ± 1.0 %"
    assert first["95 % interval"] == "51.2 to 70.0 %"  # Wilson, 61 of 100
    assert first["seeds"] == "3"
    assert first["parameters"] == "1,000"
    assert first["adapter file"] == "4 kB"
    assert first["s/step"] == "0.500"
    assert first["vs lora"] == "+9.0 (+8.0 to +10.0)"
    assert table.rows[-1][:2] == ["before training", "10.0 %"]


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", ["lost", "drift"])
def test_what_was_lost_is_a_column_and_an_axis_where_all_seeds_have_it(name, tmp_path):
    for method, values in {"lora": (0.1, 0.3), "mola": (0.05, None), "mos": (-0.02, -0.02)}.items():
        for seed, value in enumerate(values):
            words = [f"+method={method}", f"train.seed={seed}"]
            measured = {"rows": 32, name: value}
            figures = {} if value is None else {"retained": measured}
            write_run(tmp_path / method / str(seed), 0.5 + seed / 10, *words, **figures)
    (comparison,) = compare([tmp_path])
    table = results(comparison)
    (column,) = (i for i, title in enumerate(table.columns) if "other texts" in title)
    found = {row[0]: row[column] for row in table.rows}
    assert found["lora"] == "+0.200 ± 0.141"  # the sample's standard deviation
    assert found["mos"] == "-0.020 ± 0.000"
    assert found["mola"] == found["before training"] == ""
    chart = charts_of(comparison)[name]  # with a point of each entry that has it
    assert "mos" in chart
    assert "mola" not in chart
    assert not any("What was lost" in line for line in summary(comparison))


def test_runs_that_measured_other_texts_are_named(tmp_path):
    for seed, measured in enumerate(({"rows": 32, "tokens": 4011}, {"rows": 48, "tokens": 6050})):
        words = ["+method=lora", f"train.seed={seed}"]
        write_run(tmp_path / f"{seed}", 0.5, *words, retained={**measured, "lost": 0.1})
    (said,) = (line for line in summary(*compare([tmp_path])) if "What was lost" in line)
    assert "32 of 4,011 tokens; 48 of 6,050 tokens" in said


def test_entries_whose_seeds_disagree_are_not_ranked(runs):
    better, unclear, chance, spread, interval = summary(*compare([runs]))
    assert better == "mola: better than lora in every seed."
    assert unclear == "mos: no clear difference to lora (the seeds disagree)."
    assert "all of 3 seeds by chance in 1 of 4" in chance  # 2 * 0.5**3
    assert spread == "± is the standard deviation over the seeds of a method."
    assert interval.startswith("The 95 % interval is Wilson's, for the choice of the test examples")


@pytest.mark.parametrize(("last", "named"), [(0.40, True), (0.53, False)])
def test_a_seed_far_from_the_others_is_named(tmp_path, last, named):
    for seed, score in enumerate((0.51, 0.52, 0.53, 0.52, last)):
        write_run(tmp_path / str(seed), score, "+method=lora", f"train.seed={seed}")
    said = [line for line in summary(*compare([tmp_path])) if "Seed 4 of lora" in line]
    assert len(said) == named


def test_a_loss_has_no_interval(tmp_path):
    after = {"loss": 2.0, "tokens": 512.0}
    figures = {"after": after, "metric": "loss", "higher_is_better": False}
    for method in ("lora", "mos"):
        write_run(tmp_path / method, 0.0, f"+method={method}", "data=hamlet", **figures)
    found = compare([tmp_path])
    assert results(*found).columns[:3] == ["method", "test loss, n = 512 tokens", "seeds"]
    assert "interval" not in " ".join(summary(*found))
    assert "means better, that is lower" in " ".join(summary(*found))


def test_rates_have_their_seeds_and_those_not_tried_are_not_failed():
    noted = {
        "lora": {
            "validation": {"0.001": 0.5, "0.01": 0.6},
            "seeds": {"0.001": 3, "0.01": 1},
            "failed": ["0.1"],
            "taken": 0.001,
            "edge": "lowest",
        },
        "mos": {"validation": {"0.0003": 0.4}, "taken": 0.0003},
    }
    table = learning_rates_tried("accuracy", noted)
    assert table.columns[1:] == ["0.0003", "0.001", "0.01", "0.1"]
    assert table.rows == [
        ["lora", "", "50.0 %, 3 seeds * (lowest tried)", "60.0 %, 1 seed", "failed"],
        ["mos", "40.0 % *", "", "", ""],
    ]


def test_the_page_says_by_what_rates_of_equal_score_are_chosen(runs, tmp_path):
    noted = {"lora": {"validation": {"0.001": 0.5, "0.01": 0.5}, "taken": 0.01}}
    pages = write_page(compare([runs]), tmp_path / "page", noted)[:2]
    for page in pages:
        assert page.read_text().count("same accuracy are compared by their validation loss") == 1
    assert len(pages) == 2


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_is_counted_is_plural_unless_it_is_one(tmp_path, seeds):
    for seed in range(seeds):
        write_run(tmp_path / "runs" / str(seed), 0.5, "+method=lora", f"train.seed={seed}")
    (page, *_) = write_page(compare([tmp_path / "runs"]), tmp_path / "page")
    assert ("1 run, started" in page.read_text()) == (seeds == 1)
    assert ("2 runs, started" in page.read_text()) == (seeds == 2)


def test_without_a_baseline_no_difference_is_spoken_of(tmp_path):
    for method, seeds in {"mola": (0, 1), "mos": (0,)}.items():
        for seed in seeds:
            words = [f"+method={method}", f"train.seed={seed}"]
            write_run(tmp_path / method / str(seed), 0.5, *words)
    said = " ".join(summary(*compare([tmp_path])))
    assert "over different seeds" in said
    assert "differences" not in said


@pytest.mark.thorough
def test_a_run_without_training_has_no_time_of_a_step(tmp_path):
    write_run(tmp_path / "lora", 0.5, "+method=lora")
    write_run(tmp_path / "icv", 0.6, "+method=icv", steps=0, tokens=0, seconds=0.0, cpu_seconds=0.0)
    compared = compare([tmp_path])
    table = results(*compared)
    times = {row[0]: row[table.columns.index("s/step") :][:2] for row in table.rows}
    assert (times["icv"], times["lora"]) == (["", ""], ["0.500", "0.400"])
    files = {file.name: file.read_text() for file in write_page(compared, tmp_path / "page")}
    assert "lora\ntest accuracy" in files["step.svg"]
    assert "icv" not in files["step.svg"]
    assert "icv\ntest accuracy" in files["file.svg"]
    alone = compare([tmp_path / "icv"])
    names = [file.name for file in write_page(alone, tmp_path / "alone")]
    assert "step.svg" not in names
    assert "file.svg" in names
