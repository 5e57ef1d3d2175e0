"""The shipped sweeps, as W&B reads them and as Hydra does without it."""

import itertools
import json
import runpy
import subprocess
import sys

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from training_fixtures import ROOT

from petl import app
from petl.resume import flat
from petl.settings import read_settings

pytest_plugins = ["training_fixtures"]

NAMES = sorted(path.stem for path in (ROOT / "configs" / "sweep").glob("*.yaml"))


def sweep_of(name):
    return yaml.safe_load((ROOT / "configs" / "sweep" / f"{name}.yaml").read_text())


def command_for(sweep, values):
    """The words after train.py, as a W&B agent makes them for these values."""
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
    assert words[:3] == ["/usr/bin/env", "python", "train.py"]
    return words[3:]


def first_and_last(space):
    """Values at both ends of each parameter of a sweep."""
    ends = {k: p.get("values") or [p["min"], p["max"]] for k, p in space.items()}
    return [{key: both[end] for key, both in ends.items()} for end in (0, -1)]


@pytest.mark.parametrize("name", NAMES)
def test_wandb_accepts_a_sweep_and_proposes_values(name):
    sweeps = pytest.importorskip("sweeps", reason="pip install --no-deps sweeps==0.3.0")
    sweep = sweep_of(name)
    assert sweeps.schema_violations_from_proposed_config(sweep) == []
    proposal = sweeps.next_run(sweeps.config.SweepConfig(sweep), [])
    values = {key: value["value"] for key, value in proposal.config.items()}
    assert values.keys() == sweep["parameters"].keys()
    read_settings(app.compose(command_for(sweep, values)))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_an_agent_composes_into_the_values_it_proposes(name):
    sweep = sweep_of(name)
    assert (ROOT / sweep["program"]).is_file()
    for values in first_and_last(sweep["parameters"]):
        cfg = app.compose(command_for(sweep, values))
        read_settings(cfg)
        settings = flat(cfg)
        assert settings["tracker.name"] == "wandb"
        for key, value in values.items():
            assert settings["method.name" if key == "method" else key] == value


@pytest.mark.parametrize("name", NAMES)
def test_the_search_without_wandb_spans_the_same_space(name):
    sweep = sweep_of(name)
    with initialize_config_dir(str(app.config_dir()), version_base="1.3"):
        cfg = compose("train", [f"+search={name}"], return_hydra_config=True)
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


def test_optuna_without_its_plugin_is_refused_with_the_extra():
    error = MissingConfigException("", missing_cfg_file="hydra/sweeper/optuna", options=["basic"])
    assert app.explain(error, []) == "Optuna is not installed; run: pip install -e '.[sweep]'"


@pytest.fixture
def program(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *words])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert left.value.code == 0, capfd.readouterr().err
        return capfd.readouterr().err

    return run


def runs_in(folder):
    found = (json.loads(p.read_text()) for p in sorted(folder.glob("runs/*/scores.json")))
    return [scores["validation"] for scores in found]


def test_a_grid_that_was_stopped_goes_on_with_what_is_left(program, tiny, tmp_path):
    held_out = ["train.eval_steps=4", "train.test=false", "train.resume=auto"]
    words = ["-m", *tiny.classify, *held_out, "+method=lora,mola"]
    program(*words, "train.lr=0.001")
    assert len(runs_in(tmp_path)) == 2
    err = program(*words, "train.lr=0.001,0.01")
    assert len(runs_in(tmp_path)) == 4
    assert err.count("is finished already") == 2


@pytest.mark.slow
def test_two_workers_share_the_jobs_of_a_grid(tiny, tmp_path):
    words = ["-m", *tiny.classify, "train.eval_steps=4", "train.test=false", "train.resume=auto"]
    grid = ["+method=lora,mola,adapter", "train.lr=0.001,0.01"]
    command = [sys.executable, ROOT / "train.py", *words, *grid]
    workers = [
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = "".join(worker.communicate(timeout=300)[1] for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert len(runs_in(tmp_path)) == 6
    assert told.count("passed over: ") + told.count("is finished already") == 6
    assert "passed over: " in told


def test_a_search_by_optuna_adds_to_the_trials_that_its_storage_holds(program, tiny, tmp_path):
    optuna = pytest.importorskip("optuna")
    few = ["train.eval_steps=4", "hydra.sweeper.n_trials=1"]
    words = ["-m", *tiny.classify, "+search=lora", *few]
    for _ in range(2):
        program(*words)
    study = optuna.load_study("lora", f"sqlite:///{tmp_path}/search.db")
    assert [trial.value for trial in study.trials] == runs_in(tmp_path)
    assert len(set(itertools.chain(*(trial.params for trial in study.trials)))) == 3
