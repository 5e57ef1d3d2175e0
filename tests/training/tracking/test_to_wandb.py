"""Runs and sweeps with W&B's own client and agent, and a stand-in for its server.

What a real server makes of it is not tested: permissions, how pages look, the search of a sweep.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from training_fixtures import OFFLINE, ROOT, Finished, train, train_until_killed
from wandb_server import ENTITY, PROJECT, SWEEP, serving

import petl

pytest_plugins = ["training_fixtures"]
pytest.importorskip("wandb", reason="pip install 'petl-peft[tracking]'")

WANDB = ["tracker=wandb", f"tracker.project={PROJECT}", "tracker.tags=[one]", "tracker.group=few"]
BIN = Path(sys.executable).parent


@pytest.fixture
def server(monkeypatch):
    import wandb

    with serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        wandb.teardown()  # its settings are of an environment without this server
        yield server
        wandb.teardown()


@pytest.mark.thorough
def test_an_online_run_resumes_under_its_id_and_the_server_gets_each_value_once(
    tiny, tmp_path, server, capsys
):
    words = [*tiny.classify, "+method=lora", *WANDB, "train.log_steps=1", "train.save_steps=2"]
    train_until_killed(words, tmp_path / "run", step=4)
    assert list(server.exit_codes.values()) == [1]
    run = train([*words, "train.resume=auto"], tmp_path / "run")
    ((name, told),) = server.runs.items()
    assert json.loads((run.path / "wandb.json").read_text())["id"] == name
    assert (told["project"], told["groupName"], told["tags"]) == (PROJECT, "few", ["one"])
    assert json.loads(told["config"])["method"]["value"]["name"] == "lora"
    history = server.history(name)
    losses = [(row["_step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [(line["step"], line["loss"]) for line in run.metrics]
    assert history[-1]["objective"] == run.scores["after"]["accuracy"]
    assert server.exit_codes == {name: 0}
    closing = capsys.readouterr().out.splitlines()[-1]
    assert closing == f"on W&B: {server.address}/{ENTITY}/{PROJECT}/runs/{name}"


@pytest.mark.thorough
def test_a_run_ends_without_its_server_and_prints_the_upload_command(
    tiny, tmp_path, server, monkeypatch, capsys, petl_log
):
    after_step = petl.Lifecycle.after_step

    def lonely(self, step, optimizer):
        after_step(self, step, optimizer)
        if step == 2:
            server.shutdown()
            server.server_close()

    monkeypatch.setattr(petl.Lifecycle, "after_step", lonely)
    words = [*tiny.classify, "+method=lora", *WANDB, "tracker.finish_timeout=1"]
    run = train(words, tmp_path / "run")
    assert "after" in run.scores
    assert "W&B did not receive the complete run within 1 s" in petl_log.text
    (kept,) = run.path.glob("wandb/run-*")
    closing = capsys.readouterr().out.splitlines()[-1]
    assert closing == f"to upload the run to W&B: wandb sync {kept}"


# Sweeps: the commands `wandb sweep` and `wandb agent`


def wandb_in(folder, *words):
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    ran = subprocess.run(
        [str(BIN / "wandb"), *words],
        cwd=folder,
        env={**os.environ, **OFFLINE, "PATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def sweep_for(folder, name, words):
    """A folder with sweep.yaml, the sweep of that name with more arguments for its runs."""
    sweep = yaml.safe_load((ROOT / "configs" / "sweep" / f"{name}.yaml").read_text())
    sweep["command"] += words
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "proposals"),
    [
        (
            "methods",
            [{"method": "mola", "train.lr": 0.001}, {"method": "sparse", "train.lr": 0.01}],
        ),
        ("lora", [{"method.r": 4, "method.lora_dropout": 0.05, "train.lr": 0.0012345678901234}]),
    ],
)
def test_the_wandb_agent_runs_the_proposals_of_the_server(tiny, tmp_path, server, name, proposals):
    sweep_for(tmp_path, name, tiny.classify)
    said = wandb_in(tmp_path, "sweep", "--project", PROJECT, "sweep.yaml")
    assert f"wandb agent {ENTITY}/{PROJECT}/{SWEEP}" in said
    server.proposals = list(proposals)
    wandb_in(tmp_path, "agent", f"{ENTITY}/{PROJECT}/{SWEEP}")
    runs = {path.parent: Finished(path.parent) for path in tmp_path.glob("runs/*/scores.json")}
    assert len(runs) == len(proposals)
    noted = {json.loads((path / "wandb.json").read_text())["id"]: runs[path] for path in runs}
    for i, values in enumerate(proposals, start=1):
        run, told = noted[f"run{i}"], server.runs[f"run{i}"]  # the id that the server gave
        config = yaml.safe_load((run.path / "config.yaml").read_text())
        for key, value in values.items():
            group, _, field = key.partition(".")
            assert config[group][field or "name"] == value
        assert (told["sweep"], told["groupName"]) == (SWEEP, name)
        metric = yaml.safe_load((tmp_path / "sweep.yaml").read_text())["metric"]["name"]
        assert server.history(f"run{i}")[-1][metric] == run.scores["validation"]
    assert server.exit_codes == {f"run{i}": 0 for i in range(1, len(proposals) + 1)}
