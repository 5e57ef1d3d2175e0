"""Runs with W&B's own client, and a stand-in for its server.

What a real server makes of it is not tested: permissions, how pages look.
"""

import json

import pytest
from training_fixtures import train, train_until_killed
from wandb_server import ENTITY, PROJECT, serving

import petl

pytest_plugins = ["training_fixtures"]
pytest.importorskip("wandb", reason="pip install 'petl-peft[tracking]'")

WANDB = ["tracker=wandb", f"tracker.project={PROJECT}", "tracker.tags=[one]", "tracker.group=few"]


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
