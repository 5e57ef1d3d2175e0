"""A feature of a run from outside the tree: settings, scores, log, page, and an effect on the run.

It stands beside the method of another package (`plugin_package`), and no file of petl knows it.
"""

import json
import subprocess
from pathlib import Path

import pytest
import warm_python
from plugin_package import ROOT, environment, write_module
from training_fixtures import Finished, Tiny

from petl.experiments.reports.run_report import write_page

pytest_plugins = ["training_fixtures"]

FEATURE = '''
"""Thermometer: the training loss after every few steps, and a stronger adapter."""

from dataclasses import dataclass

from petl.errors import InputError
from petl.system.values import field, integer, real
from petl.training.features import FEATURES, RunFeature
from petl.training.features.section import Curve, Lines, Section


@dataclass(frozen=True)
class Settings:
    every: int = field(1, integer(1))
    strength: float = field(1.0, real(0))


class Thermometer(RunFeature):
    key, Settings = "thermometer", Settings
    charts = (("warmth", "How warm it was", "degrees"),)

    def settle(self, settings):
        return {**settings, "train": {**settings["train"], "head_lr": 0.5}}

    def check(self, config):
        if config.train.seed == 13:
            raise InputError("train.seed=13 is unlucky: choose another")

    def order(self, rows):
        return rows._replace(train=rows.train.select(range(8)))

    def before_wrapping(self, setup, fields):
        setup.notes.append("it is warm")
        return {**fields, "strength": self.settings.strength}

    def before_training(self, context):
        found = context.evaluate(context.splits.test, "reading the thermometer")
        context.add({"warm": {"loss": found["loss"]}}, "thermometer")

    def after_step(self, context, step):
        if step % self.settings.every == 0:
            context.log({"step": step, "warmth": float(step)})

    def after_training(self, context, step):
        loss = context.evaluate(context.splits.test, "reading it again")["loss"]
        return {self.key: {"loss": loss, "steps": step}}

    @classmethod
    def section(cls, folder, scores):
        steps = scores.get(cls.key, {}).get("steps", 0)
        chart = Lines("Warmth", "step", "degrees", [Curve("warmth", [(1.0, 2.0), (2.0, 3.0)])])
        return Section("Thermometer", f"{steps} steps.", [chart], line=f"it took {steps} steps")


FEATURES["thermometer"] = "thermometer:Thermometer"
'''
WORDS = ["--config-dir", "configs", "+method=diag", "imports=[diag_methods,thermometer]"]


def petl(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run petl with these arguments where both modules are found."""
    return subprocess.run(
        [warm_python.python(), *words],
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a method and a feature."""
    folder = tmp_path_factory.mktemp("loose")
    write_module(folder)
    (folder / "thermometer.py").write_text(FEATURE)
    return folder


@pytest.mark.thorough
def test_a_run_has_what_the_feature_adds(tiny: Tiny, package: Path):
    more = ["+thermometer.every=2", "+thermometer.strength=3", "train.steps=4"]
    words = [*WORDS, *tiny.classify, *more, "train.log_steps=1", f"train.run={package}/run"]
    ran = petl([str(ROOT / "train.py"), *words], package)
    assert ran.returncode == 0, ran.stderr
    run = Finished(package / "run")
    # settings: checked, completed, and stored
    stored = (run.path / "config.yaml").read_text()
    assert "thermometer:\n  every: 2\n  strength: 3" in stored
    assert "head_lr: 0.5" in stored
    assert run.scores["head_lr"] == 0.5
    # an effect before wrapping, and on the rows: eight of them are a step of their own
    adapter = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert adapter["strength"] == 3.0
    assert [line["epoch"] for line in run.metrics if "epoch" in line] == [1, 2, 3, 4]
    # scores, log and page
    assert run.scores["warm"]["loss"] == pytest.approx(run.scores["before"]["loss"])
    assert run.scores["thermometer"] == {
        "loss": pytest.approx(run.scores["after"]["loss"]),
        "steps": 4,
    }
    assert [line["warmth"] for line in run.metrics if "warmth" in line] == [2.0, 4.0]
    assert "it took 4 steps" in ran.stdout
    page = (run.path / "report.html").read_text()
    assert "<h2>Thermometer</h2>" in page
    assert "4 steps." in page
    assert "<title>How warm it was: warmth</title>" in page
    # where the package is not installed, the page is the same without that part
    assert "<h2>Thermometer</h2>" not in write_page(run.path).read_text()


# commands in one process, each after a line with its number
COMMANDS = """
import json, sys
from petl.cli.main import main
for number, words in enumerate(json.loads(sys.argv[1])):
    print(number, file=sys.stderr)
    assert main(words) == (2 if number else 0)
"""


@pytest.mark.thorough
def test_a_plan_says_what_it_notes_and_its_settings_are_refused(tiny: Tiny, package: Path):
    wrong = [
        (["+thermometer.every=0"], "thermometer.every=0 is not an integer from 1"),
        (["+thermometer.evry=2"], "no setting thermometer.evry; did you mean"),
        (["+thermometer.every=2", "train.seed=13"], "train.seed=13 is unlucky"),
        (["+thermometr.every=2"], "no setting thermometr; did you mean"),
    ]
    given = [["+thermometer.every=2"], *(words for words, _ in wrong)]
    plans = json.dumps([["plan", *WORDS, *tiny.classify, *words] for words in given])
    ran = petl(["-c", COMMANDS, plans], package)
    assert ran.returncode == 0, ran.stderr
    assert "it is warm" in ran.stdout
    for number, (_, message) in enumerate(wrong, 1):
        assert message in ran.stderr.partition(f"\n{number}\n")[2].partition(f"\n{number + 1}\n")[0]
