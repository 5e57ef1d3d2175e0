"""The shipped sweeps, as W&B reads them and as Hydra does without it."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import yaml
from comparable import write_run
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from training_fixtures import ROOT, command_after

import petl
from petl.errors import JobSkipped
from petl.experiments.sweeps.best_setting import best_setting_lines
from petl.system.settings.command_line import config_dir
from petl.training.compose import compose
from petl.training.runs import resume
from petl.training.runs.resume import flat
from petl.training.runs.run_config import read_config

pytest_plugins = ["training_fixtures"]

NAMES = sorted(path.stem for path in (ROOT / "configs" / "sweep").glob("*.yaml"))


def sweep_of(name):
    return yaml.safe_load((ROOT / "configs" / "sweep" / f"{name}.yaml").read_text())


def command_for(sweep, values):
    """The words after `petl train`, as a W&B agent makes them for these values."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    lists = create_sweep_command_args({"args": {key: {"value": v} for key, v in values.items()}})
    single = {"program": sweep["program"], "interpreter": "python", "env": "/usr/bin/env"}
    words = []
    for part in create_sweep_command(sweep["command"]):
        name = part.removeprefix("${").removesuffix("}")
        words += lists[name] if name in lists else [single.get(name, part)]
    if words[1:3] == ["bash", "-c"]:  # what it would run, word by word
        shown = words[3].replace("exec", r"printf '%s\n'")
        ran = subprocess.run([*words[1:3], shown, *words[4:]], capture_output=True, text=True)
        words = [words[0], *ran.stdout.splitlines()]
    assert words[:5] == ["/usr/bin/env", "python", "-m", "petl", "train"]
    return words[5:]


def first_and_last(space):
    """Values at both ends of each parameter of a sweep."""
    ends = {k: p.get("values") or [p["min"], p["max"]] for k, p in space.items()}
    return [{key: both[end] for key, both in ends.items()} for end in (0, -1)]


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_an_agent_composes_into_the_values_it_proposes(name):
    sweep = sweep_of(name)
    assert sweep["program"] == "petl"
    for values in first_and_last(sweep["parameters"]):
        cfg = compose(command_for(sweep, values))
        read_config(cfg)
        settings = flat(cfg)
        assert settings["tracker.name"] == "wandb"
        for key, value in values.items():
            assert settings["method.name" if key == "method" else key] == value


@pytest.mark.parametrize("name", NAMES)
def test_the_search_without_wandb_spans_the_same_space(name):
    sweep = sweep_of(name)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra_compose("train", [f"+search={name}"], return_hydra_config=True)
    params = {key.removeprefix("+"): words for key, words in cfg.hydra.sweeper.params.items()}
    assert params.keys() == sweep["parameters"].keys()
    for key, space in sweep["parameters"].items():
        numbers = space.get("values") or [space["min"], space["max"]]
        said = params[key].replace("choice(", "").replace("tag(log, ", "").replace("interval(", "")
        assert [yaml.safe_load(word) for word in said.rstrip(")").split(",")] == numbers
        logarithmic = space.get("distribution") == "log_uniform_values"
        assert params[key].startswith("tag(log") == logarithmic
    fixed = [word for word in sweep["command"] if word.startswith("train.")]
    for key, _, value in (word.partition("=") for word in fixed):
        assert OmegaConf.select(cfg, key) == yaml.safe_load(value)


def swept(output, course):
    """Overrides of finished runs with these validation and test accuracies and losses."""
    jobs = []
    for i, (method, seed, validation, test, loss) in enumerate(course):
        words = [f"+method={method}", f"train.seed={seed}", "train.eval_steps=5"]
        scores = {"accuracy": validation, "loss": loss, "rows": 50.0}
        known = {"validation": validation, "validation_scores": scores}
        if validation is None:
            known = {"validation": None}
        write_run(output / str(i), test, *words, **known)
        jobs.append(words)
    return jobs


def said_of(output, course):
    """The lines at the end of a sweep, without the last."""
    jobs = swept(output, course)
    *lines, last = best_setting_lines(jobs, jobs, str(output))
    assert last == f"to compare all runs: petl compare {output}"
    return lines


@pytest.mark.thorough
def test_a_setting_is_chosen_by_its_mean_over_seeds_and_not_by_test_scores(tmp_path):
    lucky = [("mola", 0, 0.8, 0.99, 1.0), ("mola", 1, 0.4, 0.4, 1.0), ("mola", 2, 0.3, 0.3, 1.0)]
    steady = [("lora", 0, 0.6, 0.5, 1.0), ("lora", 1, 0.5, 0.52, 1.0), ("lora", 2, 0.55, 0.54, 1.0)]
    assert said_of(tmp_path, lucky + steady) == [
        "best setting (of 2): +method=lora: validation accuracy 55.0 ± 5.0 % "
        "(n = 50, mean ± standard deviation over 3 seeds (0, 1, 2))",
        "test accuracy of the same runs, which was not used to choose: 52.0 ± 2.0 %",
        f"its folder: {tmp_path}/3 {tmp_path}/4 {tmp_path}/5",
    ]


def test_of_equal_settings_the_one_with_the_lower_loss_is_named(tmp_path):
    (line, *_) = said_of(tmp_path, [("lora", 0, 0.5, 0.9, 1.0), ("mola", 0, 0.5, 0.1, 0.5)])
    assert line == (
        "best setting (of 2): +method=mola: validation accuracy 50.0 % "
        "(n = 50, 1 seed (0): no spread is known)"
    )


def test_a_failed_run_of_a_bad_seed_makes_no_setting_better(tmp_path):
    both = [("lora", 0, 0.6, 0.5, 1.0), ("lora", 1, 0.2, 0.5, 1.0)]
    line, remark, *_ = said_of(tmp_path, [*both, ("mola", 0, 0.5, 0.5, 1.0)])
    assert line.startswith(
        "best setting (of 2): +method=lora: validation accuracy 60.0 % (n = 50, 1"
    )
    assert remark == "seeds that only some of the settings have are left out; used: 1 seed (0)"


HELD_OUT = ["train.eval_steps=4", "train.test=false"]


def runs_in(folder):
    """The best score on held-out rows of each run, by the run's folder, the oldest first."""
    found = sorted(folder.glob("runs/*/scores.json"))
    return {
        str(p.parent.relative_to(folder)): json.loads(p.read_text())["validation"] for p in found
    }


@pytest.mark.thorough
def test_a_stopped_grid_resumes_and_reports_its_best_run(program, tiny, tmp_path):
    words = ["-m", *tiny.classify, *HELD_OUT, "train.resume=auto", "+method=lora,mola"]
    program(*words, "train.lr=0.001")
    assert len(runs_in(tmp_path)) == 2
    err = program(*words, "train.lr=0.001,0.1")
    runs = runs_in(tmp_path)
    assert len(runs) == 4
    assert err.count("is finished already") == 2
    named = re.search(
        r"best setting \(of \d\): \+method=(\w+) train.lr=\S+: .*\nits folder: (\S+)\n", err
    )
    assert runs[named[2]] == max(runs.values())
    assert named[2].startswith(f"runs/{named[1]}-")


# a worker that is at its first job waits until the other is at one: so they are at work together
MEETING = """
import time
from pathlib import Path
import petl
after_step = petl.Lifecycle.after_step
def met(self, step, optimizer):
    Path({!r}).touch()
    while not Path({!r}).exists():
        time.sleep(0.02)
    after_step(self, step, optimizer)
petl.Lifecycle.after_step = met
"""


@pytest.mark.slow
def test_two_workers_share_the_jobs_of_a_grid(tiny, tmp_path):
    words = ["-m", *tiny.classify, "train.eval_steps=4", "train.test=false", "train.resume=auto"]
    grid = ["+method=lora,mola,adapter", "train.lr=0.001,0.01"]
    command = [sys.executable, str(ROOT / "train.py"), *words, *grid]
    workers = []
    for mine, other in ("ab", "ba"):
        met = MEETING.format(str(tmp_path / mine), str(tmp_path / other))
        line = command_after(met, command, tmp_path / f"{mine}.py")
        pipes = {"stderr": subprocess.PIPE, "text": True}
        workers.append(subprocess.Popen(line, cwd=tmp_path, **pipes))
    told = "".join(worker.communicate(timeout=280)[1] for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert len(runs_in(tmp_path)) == 6
    assert told.count("skipped: ") + told.count("is finished already") == 6
    assert "skipped: " in told


@pytest.mark.thorough
def test_a_grid_with_a_failed_run_reports_the_best_of_the_others(program, tiny, tmp_path):
    words = ["-m", *tiny.classify, *HELD_OUT, "+method=lora", "method.r=-1,2"]
    err = program(*words, status=2)
    (run,) = runs_in(tmp_path)
    score = f"validation accuracy {100 * runs_in(tmp_path)[run]:.1f} %"
    assert (
        f"best setting (of 1): method.r=2: {score} (n = 5, 1 seed (0): no spread is known)" in err
    )
    assert f"its folder: {run}\n" in err


@pytest.mark.thorough
@pytest.mark.parametrize(
    "lrs",
    [("0.02", "0.00001"), pytest.param(("0.00001", "0.02"), marks=pytest.mark.thorough)],
)
def test_an_optuna_search_adds_to_its_storage_and_reports_the_best_of_all_trials(
    program, tiny, tmp_path, lrs
):
    optuna = pytest.importorskip("optuna")
    words = [*tiny.complete, "+search=lora", "train.eval_steps=4", "hydra.sweeper.n_trials=1"]
    words += ["hydra.sweeper.direction=minimize", "method.lora_dropout=interval(0.0,0.00009)"]
    said = [  # the search knows that it is one
        program(*mode, *words, f"train.lr=tag(log, interval({lr}, {float(lr) * 1.1}))")
        for mode, lr in zip([[], ["-m"]], lrs, strict=True)
    ]
    study, runs = optuna.load_study("lora", f"sqlite:///{tmp_path}/search.db"), runs_in(tmp_path)
    assert sorted(trial.value for trial in study.trials) == sorted(runs.values())
    assert len(set(itertools.chain(*(trial.params for trial in study.trials)))) == 3
    assert study.best_trial.number == lrs.index("0.02")
    assert f"its folder: {min(runs, key=runs.get)}\n" in said[1]
    assert all(f"{key}={value}" in said[1] for key, value in study.best_params.items())
    assert "\x1b" not in "".join(said)  # no colours: this is no terminal


@pytest.mark.thorough
def test_a_search_without_a_finished_run_ends_in_one_line(program, tiny):
    pytest.importorskip("optuna")
    words = [*tiny.classify, "+search=lora", "hydra.sweeper.n_trials=1", "method.r=choice(-1,-2)"]
    err = program(*words, status=1)
    assert "none of 1 trial finished" in err
    assert "Traceback" not in err


@pytest.mark.thorough
def test_a_trial_that_another_worker_has_does_not_end_the_search(
    program, tiny, tmp_path, monkeypatch
):
    optuna = pytest.importorskip("optuna")
    taken = []

    def take_job(output, now):
        taken.append(now)
        if len(taken) == 1:
            raise JobSkipped("skipped: process 1, works on this job")

    monkeypatch.setattr(resume, "take_job", take_job)
    words = [*tiny.classify, "+search=lora", "train.eval_steps=4", "hydra.sweeper.n_trials=2"]
    err = program(*words)
    assert "skipped: process 1, works on this job" in err
    assert "Traceback" not in err
    study, (score,) = (
        optuna.load_study("lora", f"sqlite:///{tmp_path}/search.db"),
        runs_in(tmp_path).values(),
    )
    assert [trial.value for trial in study.trials] == [None, score]


@pytest.mark.thorough
def test_a_search_in_the_wrong_direction_or_with_several_processes_is_refused(
    program, tiny, monkeypatch
):
    pytest.importorskip("optuna")
    err = program(*tiny.complete, "+search=lora", status=2)
    assert "hydra.sweeper.direction=maximize would search for the worst loss of causal_lm" in err
    err = program(*tiny.classify, "+search=lora", "train.eval_steps=null", status=2)
    assert "train.eval_steps=null: the search would choose by scores on the test examples" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    err = program(*tiny.classify, "+search=lora", status=2)
    assert "WORLD_SIZE=2: Optuna would propose different values" in err


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("search", "again"),
    [
        (["+method=lora,mola"], " train.resume=auto\n(finished runs are skipped)"),
        (["+search=lora"], "\n(it adds 30 trials"),
    ],
)
def test_a_terminated_sweep_prints_how_to_resume_it(
    program, tiny, tmp_path, monkeypatch, search, again
):
    if search == ["+search=lora"]:
        pytest.importorskip("optuna")

    def terminated(self, step, optimizer):
        os.kill(os.getpid(), signal.SIGTERM)

    words = ["-m", *tiny.classify, *search]
    with monkeypatch.context() as patch:
        patch.setattr(petl.Lifecycle, "after_step", terminated)
        err = program(*words, status=143)
    line = shlex.join(["python", str(ROOT / "train.py"), *words])
    assert f"stopped by SIGTERM after step 1 of 4; to resume the sweep: {line}{again}" in err
