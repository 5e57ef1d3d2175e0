"""The commands study, batch-sizes, buckets and configs."""

import pytest
from omegaconf import OmegaConf
from training_fixtures import ROOT, Tiny

from petl.cli.main import main
from petl.experiments.sweeps import forked_runs

pytest_plugins = ["training_fixtures"]

WRONG = [
    (["study", "FOLDER", "--methods", "lora", "--seeds", "a"], "'a' is not an integer"),
    (["study", "FOLDER", "--methods", "lora", "--rates", "fast"], "'fast' is not a number"),
    (["study", "FOLDER", "--methods", "lora", "--jobs", "0"], "'0' is not an integer from 1"),
    (["study", "FILE", "--methods", "lora"], "cannot write to"),
    (["study", "FOLDER"], "no method is given"),
    (["study", "FOLDER", "--methods", "lroa"], "no method 'lroa'; did you mean 'lora'"),
    (["batch-sizes", "+method=lora", "--output", "FOLDER"], "is no file that can be written"),
    (["advise", "method.target_modules=[query]"], "fields of its own YAML"),
    (["advise", "+loss=nested"], "without a further loss"),
    (["advise", "train={lr:0.1}"], "train.NAME=VALUE"),
    (["advise", "train.lr=0.1"], "chooses train.lr"),
    (["advise", "retain.limit=0.2"], "--lost"),
    (["advise", "retain.curve=true"], "--lost"),
    (["buckets", "FOLDER"], "is no file that can be written"),
    (["configs", "method/lroa"], "no configuration 'method/lroa'; did you mean 'method/lora'"),
]


def status_of(words: list[str]) -> int:
    """The exit status of `petl` with these words."""
    try:
        return main(words)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_arguments_are_refused_before_any_work(tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    assert status_of(words) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["FILE", "FOLDER"]


def test_a_study_whose_runs_fail_writes_the_page_of_the_others(
    tmp_path, monkeypatch, capsys, tiny: Tiny
):
    written = []
    monkeypatch.setattr(
        "petl.experiments.reports.comparison_report.write_page", lambda *_: written.append(1)
    )
    monkeypatch.setattr(forked_runs, "FORKS", False)
    monkeypatch.setattr(forked_runs, "TRAIN", ("false",))
    (tmp_path / "runs" / "lora" / "seed-0").mkdir(parents=True)
    words = ["study", str(tmp_path), "--methods", "lora", "--seeds", "0", *tiny.classify]
    assert main(words) == 1
    assert not written  # nothing to show
    assert "1 run failed, see" in capsys.readouterr().err


def test_buckets_are_written_and_the_padding_that_they_save_is_printed(
    tmp_path, capsys, tiny: Tiny
):
    file = tmp_path / "buckets.yaml"
    assert main(["buckets", str(file), *tiny.classify, "train.buckets=4"]) == 0
    assert OmegaConf.load(file).padding.after < OmegaConf.load(file).padding.before
    assert f"; {file}\n" in capsys.readouterr().out


def test_configs_are_listed_and_printed(capsys):
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert str(ROOT / "configs") in out
    assert "+method" in out
    assert main(["configs", "method/mola"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/method/mola.yaml").read_text()
