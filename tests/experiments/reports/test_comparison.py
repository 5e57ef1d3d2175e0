"""Comparison of finished runs: entries, their names, their differences to the baseline."""

import pytest
from comparable import write_run

from petl.cli.main import main as command
from petl.errors import InputError
from petl.experiments.reports import comparison
from petl.experiments.reports.find_runs import find_runs

pytest_plugins = ["training_fixtures"]


def only(paths):
    """The comparison of runs of one data set."""
    (found,) = comparison.compare(paths)
    return found


@pytest.fixture
def study(tmp_path):
    """LoRA and MoLA with three seeds; MoS, of which one seed is missing."""
    for method, scores in {
        "lora": (0.50, 0.52, 0.54),
        "mola": (0.51, 0.55, 0.56),
        "mos": (0.49, 0.535),
    }.items():
        for seed, score in enumerate(scores):
            folder = tmp_path / method / f"seed-{seed}"
            write_run(folder, score, f"+method={method}", f"train.seed={seed}")
    return tmp_path


def test_the_command_counts_the_runs_that_are_in_its_tables(study, capsys):
    validation = {"after": None, "validation": 0.5}
    words = ["+method=lora", "train.test=false", "train.eval_steps=5"]
    write_run(study / "tuned", 0.5, *words, **validation)
    assert command(["compare", str(study), str(study / "nowhere")]) == 1
    assert "compared 8 runs; left out: 1" in capsys.readouterr().err


def test_runs_that_differ_in_the_seed_are_one_entry_and_the_best_comes_first(study):
    (found,) = comparison.compare([study])
    assert [entry.name for entry in found.entries] == ["mola", "lora", "mos"]
    mola = found.entries[0]
    assert [run.seed for run in mola.runs] == [0, 1, 2]
    assert mola.mean == pytest.approx(0.54)
    # by hand: ((0.03)^2 + (0.01)^2 + (0.02)^2) / 2 = 0.0007
    assert mola.spread == pytest.approx(0.0007**0.5)
    assert mola.step_seconds == 0.5
    assert mola.step_cpu_seconds == 0.4


def test_gains_are_taken_seed_by_seed(study):
    (found,) = comparison.compare([study])
    mola, lora, mos = found.entries
    assert found.baseline is lora
    assert found.gains(mola) == pytest.approx([0.01, 0.03, 0.02])
    assert found.verdict(mola) == "better in all 3 seeds (0, 1, 2)"
    assert found.gains(mos) == pytest.approx([-0.01, 0.015])
    assert found.shared_seeds(mos) == [0, 1]
    assert found.verdict(mos) == "better in 1 of 2 seeds (0, 1)"
    assert found.verdict(lora) == ""


def test_entries_without_a_seed_in_common_are_not_paired(tmp_path):
    for seed, method in enumerate(("lora", "mola")):
        write_run(tmp_path / method, 0.5 + seed / 10, f"+method={method}", f"train.seed={seed}")
    found = only([tmp_path])
    assert [found.verdict(entry) for entry in found.entries] == ["no seed in common", ""]


def test_of_equal_scores_the_entry_with_the_lower_loss_comes_first(tmp_path):
    for method, loss in (("lora", 0.3), ("mola", 0.2), ("mos", 0.2)):
        after = {"accuracy": 0.5, "loss": loss, "rows": 100.0}
        write_run(tmp_path / method, 0.5, f"+method={method}", after=after)
    assert [entry.name for entry in only([tmp_path]).entries] == ["mola", "mos", "lora"]


def test_scores_on_other_examples_are_compared_apart(tmp_path):
    rows = {"accuracy": 0.5, "rows": 64.0}
    write_run(tmp_path / "a", 0.5, "+method=lora")
    write_run(tmp_path / "b", 0.7, "+method=mola", "data.test_rows=64", after=rows)
    write_run(tmp_path / "c", 0.7, "+method=mos", "data.seed=5")
    write_run(tmp_path / "d", 0.7, "+method=mos", after={"accuracy": 0.5, "rows": 99.0})
    found = comparison.compare([tmp_path])
    assert [entry.name for each in found for entry in each.entries] == [
        "lora",
        "mola",
        "mos",
        "mos",
    ]
    assert found[1].examples == "data.test_rows=64, data.seed=13, rows=64"
    assert found[3].examples == "data.test_rows=2000, data.seed=13, rows=99"


def test_runs_without_test_scores_are_counted_where_others_have_them(study):
    write_run(study / "search", 0.0, "+method=lora", "train.seed=7", after=None, validation=0.9)
    found = only([study])
    assert found.unscored == 1
    assert 7 not in {run.seed for run in found.runs}


def test_a_run_whose_scores_are_not_finite_is_refused(tmp_path):
    after = {"accuracy": 0.5, "loss": float("nan"), "rows": 9.0}
    write_run(tmp_path / "a", 0.5, "+method=lora", after=after)
    with pytest.raises(InputError, match="loss nan"):
        comparison.compare([tmp_path])


def test_the_scores_of_a_probe_count_once_for_each_seed_and_model(tmp_path):
    probe = {"accuracy": 0.3, "rows": 100.0}
    for method in ("lora", "mola"):
        for seed in (0, 1):
            words = f"+method={method}", f"train.seed={seed}"
            write_run(tmp_path / method / str(seed), 0.5, *words, linear_probe=probe)
    assert only([tmp_path]).reference("linear_probe") == {"minilm": [0.3, 0.3]}


def test_models_of_two_folders_have_their_own_scores_before_training(tmp_path):
    folders = [tmp_path / "bases" / name for name in ("one", "two")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "bert"}')
        words = "+method=lora", "model=path", f"model.path={folder}"
        write_run(tmp_path / "runs" / str(number), 0.5, *words, before=0.1 + number / 10)
    found = only([tmp_path / "runs"])
    assert found.reference("before") == {str(folders[0]): [0.1], str(folders[1]): [0.2]}
    assert found.confounders() == []


def test_settings_that_differ_besides_the_method_are_listed(tmp_path):
    words = ["train.lr=0.1"], ["train.steps=6"], ["train.steps=24", "data.max_length=64"]
    for i, (method, more) in enumerate(zip(("lora", "mola", "mos"), words, strict=True)):
        write_run(tmp_path / str(i), 0.5, f"+method={method}", f"train.seed={i}", *more)
    assert only([tmp_path]).confounders() == [
        "data.max_length=48 or 64",
        "train.steps=null or 6 or 24",
    ]
    assert only([tmp_path / "0"]).confounders() == []


def test_a_loss_is_better_when_it_is_lower(tmp_path):
    for method, loss in (("lora", 2.0), ("mos", 1.5)):
        after = {"loss": loss, "rows": 4.0}
        figures = {"after": after, "metric": "loss", "higher_is_better": False}
        write_run(tmp_path / method, 0.0, f"+method={method}", **figures)
    (found,) = comparison.compare([tmp_path])
    assert [entry.name for entry in found.entries] == ["mos", "lora"]
    assert found.gains(found.entries[0]) == [0.5]


def test_entries_of_one_method_are_named_by_what_differs(tmp_path):
    for i, words in enumerate(
        (["+method=lora", "method.r=4"], ["+method=lora"], ["+method=lora", "+loss=density"])
    ):
        write_run(tmp_path / str(i), 0.5, *words)
    names = {entry.name for entry in only([tmp_path]).entries}
    assert names == {"lora r=4", "lora r=8", "lora+density"}


def test_an_entry_of_a_recipe_has_the_name_of_the_recipe(tmp_path):
    for method in ("adapter", "houlsby", "deft"):
        write_run(tmp_path / method, 0.5, f"+method={method}")
    names = {entry.name for entry in only([tmp_path]).entries}
    assert names == {"adapter", "houlsby", "deft+density"}


def test_entries_have_different_names_where_rates_and_other_settings_differ(tmp_path):
    for i, words in enumerate(("", "train.lr=0.01", "method.r=4", "method.r=4 train.lr=0.02")):
        write_run(tmp_path / str(i), 0.5, "+method=lora", *words.split())
    write_run(tmp_path / "other", 0.5, "+method=lora", "method.r=2")
    names = sorted(entry.name for entry in only([tmp_path]).entries)
    assert names == [
        "lora r=2",
        "lora r=4 train.lr=0.001",
        "lora r=4 train.lr=0.02",
        "lora r=8 train.lr=0.001",
        "lora r=8 train.lr=0.01",
    ]


def test_of_runs_with_the_same_settings_and_seed_the_latest_counts(tmp_path, petl_log):
    for name, score, hour in (("a", 0.5, 9), ("b", 0.7, 11), ("c", 0.6, 10)):
        started = f"2026-11-25T{hour:02}:00:00+00:00"
        write_run(tmp_path / name, score, "+method=lora", started=started)
    assert only([tmp_path]).entries[0].scores == [0.7]
    assert f"{tmp_path}/a is left out: {tmp_path}/c has the same settings" in petl_log.text


@pytest.mark.thorough
def test_each_data_set_has_a_comparison_of_its_own(tmp_path):
    loss = {"after": {"loss": 2.0}, "metric": "loss", "higher_is_better": False}
    for i, (data, figures) in enumerate(
        (
            (["data=wordnet"], {}),
            (["data=hamlet"], loss),
            (["data=files", "data.train=a.csv"], {}),
            (["data=files", "data.train=b.csv"], {}),
            (["data=wordnet", "train.seed=1"], {}),
        )
    ):
        write_run(tmp_path / str(i), 0.5, "+method=lora", *data, **figures)
    found = comparison.compare([tmp_path])
    assert [each.topic for each in found] == ["files a.csv", "files b.csv", "hamlet", "wordnet"]
    assert [len(each.runs) for each in found] == [1, 1, 1, 2]


def test_unfinished_runs_are_left_out(study):
    write_run(study / "tuned", 0.9, "+method=lora", "train.seed=7", after=None)
    assert all(run.seed < 3 for run in only([study]).runs)


def test_an_evaluation_in_a_run_is_no_run(study):
    """That of a writer has a count of tokens that no run has."""
    place = study / "lora" / "seed-0" / "eval-new"
    place.mkdir()
    (place / "scores.json").write_text('{"loss": 7.0, "tokens": 50.0, "after": {"loss": 7.0}}')
    assert find_runs([study]).left_out == []


def test_runs_without_test_scores_are_compared_by_validation_scores(tmp_path):
    for method, score in (("lora", 0.4), ("mola", 0.3)):
        write_run(tmp_path / method, 0.0, f"+method={method}", after=None, validation=score)
    (found,) = comparison.compare([tmp_path])
    assert found.split == "validation"
    assert [(entry.name, entry.mean) for entry in found.entries] == [("lora", 0.4), ("mola", 0.3)]
