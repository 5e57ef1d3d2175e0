"""Trackers: what Weights & Biases and TensorBoard record of a run."""

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.machinery import ModuleSpec

import pytest
import warm_python
import yaml
from training_fixtures import ROOT, Finished, launch, train, train_until_killed
from wandb_file import history, offline_files, records, summary

from petl.errors import InputError
from petl.system.imports import extras
from petl.training import tracking
from petl.training.compose import compose
from petl.training.runs.run_config import read_config
from petl.training.tracking import read_tracker, to_wandb
from petl.training.tracking.services import SERVICES
from petl.training.tracking.to_tensorboard import TensorboardTracker
from petl.training.tracking.to_wandb import WandbConfig, choose_mode

pytest_plugins = ["training_fixtures"]

WANDB = ["tracker=wandb", "tracker.project=mine", "tracker.tags=[one,two]", "tracker.group=few"]
LOGGING = ["train.log_steps=2", "train.eval_steps=2", "train.save_steps=2"]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    """An environment without API key of W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(scope="module")
def tracked(tiny, tmp_path_factory):
    """A run with plots and validation rows, whose adapter is uploaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.delenv("WANDB_MODE", raising=False)
        patch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))
        method = ["+method=increlora", "method.target_r=2"]
        overrides = [*tiny.classify, *method, *WANDB, *LOGGING, "tracker.save_adapter=true"]
        return train(overrides, tmp_path_factory.mktemp("tracked") / "run")


def kinds(file, kind):
    return [getattr(r, kind) for r in records(file) if r.WhichOneof("record_type") == kind]


# Weights & Biases


def test_wandb_gets_configuration_and_metadata(tracked):
    (file,) = offline_files(tracked.path)
    (run,) = kinds(file, "run")[:1]
    assert (run.project, run.run_group, run.display_name) == ("mine", "few", "run")
    assert run.job_type == "train"
    assert list(run.tags) == ["one", "two"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["method"]["name"] == "increlora"
    assert config["train"]["steps"] == 4
    assert json.loads((tracked.path / "wandb.json").read_text())["id"] == run.run_id


def test_every_line_of_metrics_is_a_step_on_wandb(tracked):
    (file,) = offline_files(tracked.path)
    steps = history(file)
    assert sorted(steps) == [2, 4]
    for line in tracked.metrics:
        there = steps[line["step"]]
        if "validation" in line:
            assert there["validation/accuracy"] == line["validation"]["accuracy"]
        else:
            assert there["train/loss"] == line["loss"]
            assert there["train/grad_norm"] == line["grad_norm"]
            assert there["train/total_rank"] == line["total_rank"]  # the method's own


def test_scores_plots_and_adapter_are_sent_to_wandb(tracked):
    (file,) = offline_files(tracked.path)
    told, scores = summary(file), tracked.scores
    assert told["after/accuracy"] == told["test/accuracy"] == scores["after"]["accuracy"]
    assert told["objective"] == scores["validation"]
    assert told["adapter_bytes"] == scores["adapter_bytes"]
    assert history(file)[4]["pictures/ranks/_type"] == "image-file"
    for name, rows in (("predictions", 20), ("confusion matrix", 3)):
        assert history(file)[4][f"{name}/_type"] == "table-file"
        assert history(file)[4][f"{name}/nrows"] == rows
    (artifact,) = (each for each in kinds(file, "artifact") if each.type == "model")
    sent = {entry.path for entry in artifact.manifest.contents}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= sent


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=str)
def test_the_metric_of_a_sweep_is_logged_by_runs(tracked, path):
    (file,) = offline_files(tracked.path)
    metric = yaml.safe_load(path.read_text())["metric"]["name"]
    assert metric in history(file)[4]
    assert metric in summary(file)


@pytest.mark.thorough
def test_a_resumed_run_keeps_its_id_and_its_last_file_has_the_complete_history(
    tiny, tmp_path, petl_log, capsys
):
    overrides = [*tiny.classify, "+method=lora", *WANDB, "train.log_steps=1", "train.save_steps=2"]
    train_until_killed(overrides, tmp_path / "run", step=4)
    train([*overrides, "train.resume=auto"], tmp_path / "run")
    first, second = offline_files(tmp_path / "run")
    (one,), (other,) = (kinds(file, "run")[:1] for file in (first, second))
    assert one.run_id == other.run_id
    assert sorted(history(first)) == [1, 2, 3]
    losses = {line["step"]: line["loss"] for line in Finished(tmp_path / "run").metrics}
    assert {s: row["train/loss"] for s, row in history(second).items()} == losses
    assert kinds(first, "exit")[0].exit_code == 1
    assert kinds(second, "exit")[0].exit_code == 0
    assert f"wandb sync {first.parent}" in petl_log.text  # killed
    closing = capsys.readouterr().out.splitlines()[-1]
    assert closing == f"to upload the run to W&B: wandb sync {second.parent}"
    assert "no key" in petl_log.text


@pytest.mark.slow
def test_one_of_two_processes_uses_the_tracker(tiny, tmp_path):
    overrides = [*tiny.steady, "+method=mola", *WANDB, f"train.run={tmp_path}/run"]
    ran = launch([*overrides, "tracker.mode=offline"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    (file,) = offline_files(tmp_path / "run")
    assert history(file)[4]["objective"] == Finished(tmp_path / "run").scores["after"]["accuracy"]


class Answering(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Answering) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_wandb_is_online_only_with_key_and_network_unless_the_mode_is_set(server, monkeypatch):
    import wandb

    def settled(**settings):
        return choose_mode(WandbConfig("wandb", **settings))[0]

    assert settled() == "offline"  # no key
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    settings = type("Settings", (), {"base_url": server})
    monkeypatch.setattr(wandb, "setup", lambda: type("Setup", (), {"settings": settings}))
    assert settled() == "online"
    settings.base_url = "http://127.0.0.1:9"  # the port that discards
    assert settled() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert settled() == "disabled"
    assert settled(mode="online") == "online"
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(InputError, match="WANDB_MODE='offlin'"):
        settled()


def test_an_error_of_wandb_ends_the_run_with_one_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.AuthenticationError("the key\nis not valid")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match="the key is not valid"):
        WandbConfig("wandb", mode="online").tracker().begin(tmp_path, {})


# TensorBoard


@pytest.mark.thorough
def test_tensorboard_has_metrics_plots_and_configuration(tiny, tmp_path):
    method = ["+method=increlora", "method.target_r=2", "tracker=tensorboard"]
    run = train([*tiny.classify, *method, *LOGGING], tmp_path / "run")
    events = accumulated(run.path)
    scalars = {e.step: e.value for e in events.Scalars("train/loss")}
    logged = {line["step"]: line["loss"] for line in run.metrics if "loss" in line}
    assert scalars == pytest.approx(logged)
    assert [e.step for e in events.Scalars("validation/accuracy")] == [2, 4]
    (after,) = events.Scalars("after/accuracy")
    assert after.value == pytest.approx(run.scores["after"]["accuracy"])
    assert events.Images("ranks")[0].width > 100
    (confusion,) = events.Tensors("confusion matrix/text_summary")
    assert b"| label | beast |" in confusion.tensor_proto.string_val[0]
    assert "increlora" in str(events.Tensors("config/text_summary")[0].tensor_proto.string_val)


def test_tensorboard_hides_what_an_interrupted_run_logged_after_its_checkpoint(tmp_path):
    lines = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    killed = TensorboardTracker()
    killed.begin(tmp_path, {})
    for line in lines:
        killed.log(line)
    killed.fail()
    resumed = TensorboardTracker()
    resumed.begin(tmp_path, {})
    resumed.rewind(lines[:2])
    resumed.log({"step": 3, "loss": 30.0})
    resumed.fail()
    assert [e.value for e in accumulated(tmp_path).Scalars("train/loss")] == [1.0, 2.0, 30.0]


def accumulated(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


# Without one


def test_a_run_without_tracker_imports_none():
    packages = ["wandb", "tensorboard", *(service.package for service in SERVICES.values())]
    code = f"import sys, train; print([m for m in {packages} if m in sys.modules])"
    ran = subprocess.run(
        [warm_python.python(), "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.stdout == "[]\n", ran.stderr


@pytest.mark.parametrize(
    ("name", "spec"),
    [("wandb", None), ("tensorboard", ModuleSpec("tensorboard", None))]
    + [(name, None) for name in SERVICES],
)
def test_a_tracker_that_is_not_installed_names_its_extra(name, spec, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda _: spec)  # a spec without origin: some folder
    extra = name if name in SERVICES else "tracking"
    with pytest.raises(InputError, match=rf"\[{extra}\]"):
        read_config(compose(["+method=lora", f"tracker={name}"]))
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_the_yaml_of_each_tracker_lists_its_settings_with_their_defaults(monkeypatch):
    monkeypatch.setattr(tracking, "need_extra", lambda *_: None)
    for path in (ROOT / "configs" / "tracker").glob("*.yaml"):
        name = path.stem
        listed = yaml.safe_load(path.read_text())
        config = read_tracker({"name": name})
        assert listed == vars(config)


def test_an_address_without_server_is_not_reachable():
    assert not to_wandb.is_reachable("http://127.0.0.1:9")


@pytest.fixture
def fresh_wandb():
    """W&B reads a key once a process: one that a test sets stays for no other test."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


def test_a_key_of_wandb_that_cannot_be_one_is_refused(tmp_path, monkeypatch, fresh_wandb):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    tracker = WandbConfig("wandb").tracker()
    with pytest.raises(InputError):
        tracker.begin(tmp_path, {})


class Dead:
    """A W&B run whose process was killed."""

    step, url, dir = 0, "https://wandb.example/run", "kept/wandb/run-1/files"

    def log(self, *_, **__):
        raise ConnectionResetError("Connection lost")

    def finish(self, exit_code):
        self.log()


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_goes_on_if_the_process_of_wandb_dies(tmp_path, petl_log, ends):
    tracker = WandbConfig("wandb").tracker()
    tracker.run, tracker.folder, tracker.is_sent = Dead(), tmp_path, True
    tracker.log({"step": 1, "loss": 0.5})
    tracker.log({"step": 2, "loss": 0.5})
    tracker.end({"objective": 1.0}, [], tmp_path, {}) if ends else tracker.fail()
    assert petl_log.text.count("tracker=wandb failed (Connection lost) and gets nothing more") == 1
    assert tracker.closing() == "to upload the run to W&B: wandb sync kept/wandb/run-1"
