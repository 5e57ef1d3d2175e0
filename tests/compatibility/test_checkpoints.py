"""Stopped runs resume and reach the losses of the uninterrupted run.

The folders of `checkpoints/` are a promise to users with stopped runs that begins with version
0.2.0: from then on they are only added to (`scripts/make_compatibility_fixtures.py`).
"""

import json
import shutil
from pathlib import Path

import compatibility_runs
import pytest
from training_fixtures import Finished, train

# Relative. Not bitwise: the steps after the checkpoint round otherwise on other processors, by up
# to 6e-7 with AVX2 or no vector instructions in place of AVX-512.
TOLERANCE = 1e-5
NAMES = sorted(file.parent.name for file in compatibility_runs.CHECKPOINTS.glob("*/expected.json"))


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory during a test; holds the model and the data of the runs."""
    compatibility_runs.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resume(name: str, checkpoint: str) -> Finished:
    """Resume the run `name` in a copy of its folder; `checkpoint` is `train.resume`."""
    shutil.copytree(compatibility_runs.CHECKPOINTS / name / "run", "run")
    run = train(
        [*compatibility_runs.expected_of(name)["overrides"], f"train.resume={checkpoint}"],
        Path("run"),
    )
    resumed_from = json.loads((run.path / "environment.json").read_text())["resumed_from"]
    assert resumed_from is not None, "the run started from step 0"
    assert Path(resumed_from).name == f"step-{compatibility_runs.SAVED:06d}"
    return run


def assert_recorded_losses(run: Finished, name: str) -> None:
    expected = compatibility_runs.expected_of(name)
    losses = [line["loss"] for line in run.metrics]
    assert losses == pytest.approx(expected["losses"], rel=TOLERANCE, abs=0)
    assert run.scores["after"]["loss"] == pytest.approx(expected["after"], rel=TOLERANCE, abs=0)


def test_every_run_has_its_folder():
    assert set(NAMES) == set(compatibility_runs.RUNS)


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_resumes_to_the_recorded_losses(workdir, name):
    assert_recorded_losses(resume(name, "run"), name)


@pytest.mark.thorough
def test_auto_finds_an_old_run_by_its_config(workdir):
    """`auto` compares config.yaml with the command; if they differ, it starts a new run."""
    assert_recorded_losses(resume("mola", "auto"), "mola")


def test_resuming_with_another_setting_is_refused(workdir):
    """Shows that the tests above do compare settings."""
    shutil.copytree(compatibility_runs.CHECKPOINTS / "mola" / "run", "run")
    with pytest.raises(Exception, match=r"method\.top_k=2"):
        train(
            [
                *compatibility_runs.expected_of("mola")["overrides"],
                "method.top_k=1",
                "train.resume=run",
            ],
            Path("run"),
        )
