"""Runs whose adapters train in one pass, compared with the same runs one by one."""

import inspect
import io
import json
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import ROOT, drawing_once, main

from petl.cli import train_together
from petl.cli.train import train
from petl.efficiency.together.group import AdapterGroup
from petl.system.settings import command_line
from petl.system.settings.command_line import command, how_to_resume
from petl.training.compose import compose
from petl.training.together.runs import RunJob, train_runs

pytest_plugins = ["training_fixtures"]
# of what a run writes, what is a time or a path, and not a result
TIMES = {"seconds", "time"}
WEIGHTS = "adapter_model.safetensors"


def overrides_of(tiny, folder: Path, words: list[str]) -> list[str]:
    """A run with evaluations, checkpoints and an adapter of rank 2."""
    return [
        "+method=lora",
        *("method.r=2", "train.eval_steps=2", "train.save_steps=2", "train.log_steps=1"),
        *tiny.steady,
        *words,
        *(f"train.run={folder}", "train.resume=auto"),
    ]


def together(jobs: dict[Path, list[str]], width: int, stop_at: int | None = None) -> list[int]:
    """Make runs in one process; return the number of runs in each pass.

    Args:
        stop_at: number of the pass after which all runs are asked to stop.
    """
    sizes, losses = [], AdapterGroup.losses

    def counting(self, batches):
        sizes.append(len(batches))
        if len(sizes) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, batches)

    with drawing_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterGroup, "losses", counting)
        start = inspect.unwrap(train)
        train_runs(
            [
                RunJob(words, partial(compose, words), Path(f"{run}.log"), start)
                for run, words in jobs.items()
            ],
            width,
        )
    return sizes


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without times, and without a level below."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    flat = [line | line.get("validation", {}) for line in lines]
    return [{k: v for k, v in line.items() if k not in {*TIMES, "validation"}} for line in flat]


def assert_equal_runs(found: Path, expected: Path) -> None:
    """Compare files, metrics, scores and weights."""
    names = [{p.name for p in run.iterdir() if p.name != ".lock"} for run in (found, expected)]
    assert names[0] == names[1]
    assert len(metrics(found)) == len(metrics(expected))
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    own, weights = (load_file(run / "adapter" / WEIGHTS) for run in (found, expected))
    assert own.keys() == weights.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, weights[name], atol=2e-5, rtol=1e-4)
    one, other = (json.loads((run / "scores.json").read_text()) for run in (found, expected))
    for key in ("before", "after"):
        assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4)
    assert one["validation"] == pytest.approx(other["validation"], rel=1e-4, abs=1e-4)


@pytest.mark.thorough
def test_runs_in_one_pass_are_those_of_their_own_processes(tiny, tmp_path):
    """Two at a time of three, which differ in rate, length and seed; dropout of one adapter."""
    settings = {
        "a": ["train.lr=1e-3", "train.steps=6"],
        "b": ["train.lr=3e-3", "train.steps=4", "train.seed=1"],
        "c": ["train.lr=1e-2", "train.steps=4", "train.early_stopping=1"],
    }
    jobs = {
        tmp_path / "together" / name: overrides_of(tiny, tmp_path / "together" / name, words)
        for name, words in settings.items()
    }
    (tmp_path / "together").mkdir()
    sizes = together(jobs, 2)
    assert sizes.count(2) >= 6
    for name, words in settings.items():
        log = tmp_path / "together" / f"{name}.log"
        assert (tmp_path / "together" / name / "scores.json").exists(), log.read_text()
        assert "adapted" in log.read_text()
        alone = tmp_path / "alone" / name
        main()(compose(overrides_of(tiny, alone, words)))
        assert_equal_runs(tmp_path / "together" / name, alone)


@pytest.mark.thorough
def test_passes_of_runs_with_stored_blocks_read_the_rows_of_all_of_them(
    tiny, tmp_path, monkeypatch, petl_log
):
    """Two runs with stores, in one pass, and one that computes its blocks, in another."""
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    # two epochs
    upper = ["method.layers_to_transform=top:1", "train.steps=14", "train.eval_steps=7"]
    settings = {
        "a": [*upper, "train.seed=0"],
        "b": [*upper, "train.seed=1", "train.lr=3e-3", "train.validation_share=0.3"],
        "c": [*upper, "train.cache_frozen=false"],
    }
    jobs = {
        tmp_path / "together" / name: overrides_of(tiny, tmp_path / "together" / name, words)
        for name, words in settings.items()
    }
    (tmp_path / "together").mkdir()
    assert together(jobs, 3) == [2, 1] * 14  # those with stores share passes
    counts = re.findall(r"(\d+) of (\d+) passes skipped the frozen blocks", petl_log.text)
    assert len(counts) == 2
    assert all(hits == total for hits, total in counts)
    # those of all runs, and the evaluations of one: before, after each epoch, after
    assert max(int(hits) for hits, _ in counts) >= 14 + 1 + 2 + 1
    for name, words in settings.items():
        alone = tmp_path / "alone" / name
        main()(compose(overrides_of(tiny, alone, words)))
        assert_equal_runs(tmp_path / "together" / name, alone)


def test_the_folder_of_configurations_and_the_command_are_those_of_one_run(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "method"
    folder.mkdir(parents=True)
    own = (ROOT / "configs" / "method" / "lora.yaml").read_text()
    (folder / "lora.yaml").write_text(re.sub(r"(?m)^r: .*", "r: 2", own))
    seen = []

    def training(cfg, bases):
        seen.append((cfg.method.r, command(), how_to_resume("runs/x/checkpoints/step-3")))
        yield from ()

    monkeypatch.setattr(train_together, "train", training)
    monkeypatch.setattr(command_line, "_added", [])
    monkeypatch.setattr(sys, "argv", ["x", "--config-dir", str(tmp_path / "configs")])
    runs = [{"overrides": ["+method=lora"], "log": str(tmp_path / "log")}]
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"together": 1, "runs": runs})))
    train_together.main()
    ((rank, started, resumed),) = seen
    assert rank == 2
    for words in (started, resumed):
        assert f"petl train --config-dir {tmp_path / 'configs'} +method=lora" in words


@pytest.mark.thorough
def test_a_run_that_cannot_train_together_trains_alone_and_one_that_fails_ends_alone(
    tiny, tmp_path, petl_log
):
    jobs = {
        tmp_path / "dora": ["+method=dora", *tiny.steady, f"train.run={tmp_path / 'dora'}"],
        tmp_path / "wrong": ["+method=mloa", *tiny.steady, f"train.run={tmp_path / 'wrong'}"],
    }
    assert together(jobs, 2) == []
    assert "this run trains alone: the LoRA layer" in petl_log.text
    assert (tmp_path / "dora" / "scores.json").exists()
    assert "no method 'mloa'" in (tmp_path / "wrong.log").read_text()
