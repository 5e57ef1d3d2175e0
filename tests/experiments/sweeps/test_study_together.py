"""`petl study --together N`: the runs of a method train in one process, in one pass."""

import json
import logging

import pytest
import torch
import warm_python
from omegaconf import OmegaConf
from safetensors.torch import load_file
from training_fixtures import main as train_here

from petl.cli.main import main
from petl.experiments.sweeps import forked_runs, study
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def started(monkeypatch):
    """The command and the standard input of each process that a study starts."""
    found, start = [], study.Study._start

    def noting(self, job, line, given=""):
        found.append((line, given))
        return start(self, job, line, given)

    monkeypatch.setattr(study.Study, "_start", noting)
    # as `sys.executable`, with the libraries imported already
    python = warm_python.python()
    monkeypatch.setattr(study, "TOGETHER", (python, *study.TOGETHER[1:]))
    monkeypatch.setattr(forked_runs, "FORKING", (python, *forked_runs.FORKING[1:]))
    return found


@pytest.mark.thorough
def test_the_rates_and_the_seeds_of_a_method_have_a_process_each(tiny, tmp_path, started, caplog):
    caplog.set_level(logging.INFO, logger="petl")
    folder = tmp_path / "study"
    line = ["study", str(folder), "--methods", "lora", "--seeds", "0,1", "--rates", "1e-4,1e-2"]
    assert main([*line, "--together", "2", "--tuning-seeds", "1", *tiny.steady]) == 0
    assert [command[1:3] for command, _ in started] == [["-m", "petl.cli.train_together"]] * 2
    tuning, final = (json.loads(given) for _, given in started)
    assert tuning["together"] == final["together"] == 2
    names = ["tune/lora/lr-0.0001", "tune/lora/lr-0.01", "runs/lora/seed-0", "runs/lora/seed-1"]
    described = [*tuning["runs"], *final["runs"]]
    assert [run["log"] for run in described] == [f"{folder / name}.log" for name in names]
    assert (folder / "index.html").is_file()
    for name, run in zip(names, described, strict=True):
        log = (folder / f"{name}.log").read_text()
        assert "trains alone" not in log, log
        # the run of its own process, from the same words
        alone = tmp_path / "alone" / name
        words = [word for word in run["overrides"] if not word.startswith("train.run=")]
        train_here()(compose([*words, f"train.run={alone}"]))
        own, other = (load_file(each / WEIGHTS) for each in (folder / name, alone))
        assert own.keys() == other.keys()
        for key, tensor in own.items():
            torch.testing.assert_close(tensor, other[key], atol=2e-5, rtol=1e-4)
        scores = [json.loads((each / "scores.json").read_text()) for each in (folder / name, alone)]
        kind = "validation" if name.startswith("tune") else "after"
        assert scores[0][kind] == pytest.approx(scores[1][kind], rel=1e-4)
    # the rate of the final runs is the better one on validation rows
    noted = json.loads((folder / "rates.json").read_text())["lora"]
    assert noted["validation"][f"{noted['taken']:g}"] == max(noted["validation"].values())
    config = OmegaConf.load(folder / names[-1] / "config.yaml")
    assert (config.train.lr, config.train.seed) == (noted["taken"], 1)


@pytest.mark.thorough
def test_a_run_that_fails_ends_no_other_and_is_made_again_alone(tiny, tmp_path, started, capsys):
    """What is finished is not made again; a folder in the way is an error of one run."""
    in_the_way = tmp_path / "runs" / "lora" / "seed-0"
    in_the_way.mkdir(parents=True)
    (in_the_way / "notes.txt").write_text("")
    line = ["study", str(tmp_path), "--methods", "lora", "--seeds", "0,1", "--together", "2"]
    assert main([*line, *tiny.steady]) == 1
    assert "1 run failed, see" in capsys.readouterr().err
    assert "exists already" in in_the_way.with_suffix(".log").read_text()
    assert (tmp_path / "runs" / "lora" / "seed-1" / WEIGHTS).is_file()
    (in_the_way / "notes.txt").unlink()
    assert main([*line, *tiny.steady]) == 0
    runs = [json.loads(given)["runs"] for _, given in started]
    assert [len(each) for each in runs] == [2, 1]
    assert runs[1][0]["log"] == str(in_the_way.with_suffix(".log"))
