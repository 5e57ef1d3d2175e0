"""The trackers of Accelerate: MLflow and Trackio with real stores, and what all of them share."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from training_fixtures import train, train_until_killed

import petl
from petl.errors import InputError
from petl.training.tracking import read_tracker
from petl.training.tracking.base import TrackerTable

pytest_plugins = ["training_fixtures"]

LOGGING = ["train.log_steps=1", "train.save_steps=2", "train.eval_steps=2"]
STEPS = [1, 2, 3, 4]


@pytest.fixture(autouse=True)
def _local(monkeypatch, tmp_path):
    """No account, no telemetry, stores in a folder of the test."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "DO_NOT_TRACK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # where MLflow keeps files by default


def interrupted_run(tiny, folder, *words):
    """A run that was killed at step 4 and resumed from step 2."""
    overrides = [*tiny.classify, "+method=lora", *LOGGING, *words]
    train_until_killed(overrides, folder, step=4)
    return train([*overrides, "train.resume=auto"], folder)


# MLflow


def runs_of(client, project):
    return client.search_runs([client.get_experiment_by_name(project).experiment_id])


@pytest.mark.thorough
def test_mlflow_has_one_run_with_metrics_settings_and_tables(tiny, tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'petl-peft[mlflow]'")
    words = ["tracker=mlflow", "tracker.project=verbs", "tracker.save_adapter=true"]
    words += [*tiny.classify, "+method=lora", *LOGGING, "+tracker.arguments.description=first"]
    client = mlflow.MlflowClient()
    train_until_killed(words, tmp_path / "run", step=4)
    (told,) = runs_of(client, "verbs")
    assert told.info.status == "FAILED"
    run = train([*words, "train.resume=auto"], tmp_path / "run")
    (told,) = runs_of(client, "verbs")
    assert told.info.run_id == json.loads((run.path / "tracker.json").read_text())["id"]
    assert (told.info.status, told.info.run_name) == ("FINISHED", "run")
    assert told.data.tags["mlflow.note.content"] == "first"
    assert told.data.params["method.name"] == "lora"
    history = client.get_metric_history(told.info.run_id, "train/loss")
    losses = [(line["step"], line["loss"]) for line in run.metrics if "loss" in line]
    assert [(m.step, m.value) for m in history] == losses  # each step once
    assert [step for step, _ in losses] == STEPS
    scores = told.data.metrics
    assert scores["after/accuracy"] == run.scores["after"]["accuracy"]
    assert scores["objective"] == run.scores["validation"]
    experiment = told.info.experiment_id
    table = client.load_table(experiment, "predictions.json", [told.info.run_id])
    assert len(table) == run.scores["after"]["rows"]
    confusion = client.load_table(experiment, "confusion matrix.json", [told.info.run_id])
    right = sum(confusion[name][i] for i, name in enumerate(confusion["label"]))
    assert right == round(run.scores["after"]["accuracy"] * len(table))
    sent = {file.path for file in client.list_artifacts(told.info.run_id, "adapter")}
    assert "adapter/adapter_model.safetensors" in sent
    closing = capsys.readouterr().out.splitlines()[-1]
    assert closing.startswith("to view the run: mlflow ui --backend-store-uri sqlite:///")


@pytest.fixture
def mlflow_server(tmp_path):
    """A running server of MLflow: its process and address."""
    sqlalchemy = pytest.importorskip("sqlalchemy", reason="pip install 'petl-peft[mlflow]'")
    if not hasattr(sqlalchemy, "Engine"):  # the extra `sweep` holds it below 2
        pytest.skip("the server of MLflow needs SQLAlchemy 2, its client and local store do not")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["server", "--port", str(port), "--workers", "1", "--host", "127.0.0.1"]
    stores = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    files = ["--artifacts-destination", str(tmp_path / "artifacts")]
    line = [sys.executable, "-m", "mlflow", *words, *stores, *files]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        yield server, address
    finally:
        stop(server)


def stop(server):
    """End a server and its workers."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_a_server_of_mlflow_gets_a_run_and_the_run_survives_its_end(
    tiny, tmp_path, mlflow_server, monkeypatch, capsys, petl_log
):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'petl-peft[mlflow]'")
    server, address = mlflow_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    mlflow.set_tracking_uri(address)
    run = interrupted_run(tiny, tmp_path / "run", "tracker=mlflow")
    client = mlflow.MlflowClient(address)
    (told,) = runs_of(client, "petl")
    history = client.get_metric_history(told.info.run_id, "train/loss")
    assert [m.step for m in history] == STEPS
    assert told.data.metrics["after/accuracy"] == run.scores["after"]["accuracy"]
    table = client.load_table(told.info.experiment_id, "predictions.json", [told.info.run_id])
    assert len(table) == run.scores["after"]["rows"]
    assert capsys.readouterr().out.splitlines()[-1] == f"on MLflow: {address}, experiment petl"

    after_step = petl.Lifecycle.after_step

    def lonely(self, step, optimizer):
        after_step(self, step, optimizer)
        if step == 2:
            stop(server)

    monkeypatch.setattr(petl.Lifecycle, "after_step", lonely)
    words = [*tiny.classify, "+method=lora", *LOGGING, "tracker=mlflow"]
    other = train(words, tmp_path / "other")
    assert "after" in other.scores
    assert [line["step"] for line in other.metrics if "loss" in line] == STEPS
    assert petl_log.text.count("tracker=mlflow failed (") == 1


def test_a_server_that_is_not_there_refuses_the_run_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'petl-peft[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the port that discards
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError):
        read_tracker({"name": "mlflow"}).tracker().begin(tmp_path, {})


# Trackio


@pytest.mark.thorough
def test_trackio_has_one_run_with_metrics_and_tables(tiny, tmp_path, capsys):
    pytest.importorskip("trackio", reason="pip install 'petl-peft[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    run = interrupted_run(tiny, tmp_path / "run", "tracker=trackio", "tracker.run_name=first")
    assert SQLiteStorage.get_runs("petl") == ["first"]
    logs = SQLiteStorage.get_logs("petl", "first")
    losses = [(line["step"], line["train/loss"]) for line in logs if "train/loss" in line]
    assert losses == [(line["step"], line["loss"]) for line in run.metrics if "loss" in line]
    (table,) = [line["predictions"] for line in logs if "predictions" in line]
    assert table["_type"] == "trackio.table"
    assert len(table["_value"]) == run.scores["after"]["rows"]
    assert "to view the run: trackio show --project petl" in capsys.readouterr().out


# All of them


OWN = """
from pathlib import Path
from accelerate.tracking import GeneralTracker, register_tracker_class

class Mine(GeneralTracker):
    name, requires_logging_directory = "mine", True

    def __init__(self, project, logging_dir, **options):
        super().__init__()
        self.file = Path(logging_dir) / "mine.txt"
        self.note(f"{project} {options}")

    @property
    def tracker(self):
        return self.file

    def note(self, line):
        with self.file.open("a") as opened:
            opened.write(f"{line}\\n")

    def store_init_configuration(self, values):
        self.note(values["method.name"])

    def log(self, values, step=None, **_):
        if step == 3:
            raise OSError("the line\\nis cut")
        self.note(f"{step} {sorted(values)[-1]}")

    def finish(self):
        self.note("finished")

register_tracker_class(Mine)
"""


def with_own_tracker(tiny, folder, monkeypatch):
    """The words of a run that is recorded by a tracker of the user's own, in `folder`."""
    (folder / "my_tracker.py").write_text(OWN)
    (folder / "configs" / "tracker").mkdir(parents=True)
    own = "name: mine\nproject: verbs\narguments: {colour: red}\n"
    (folder / "configs" / "tracker" / "mine.yaml").write_text(own)
    monkeypatch.syspath_prepend(str(folder))
    return [*tiny.classify, "+method=lora", "imports=[my_tracker]", "tracker=mine"]


def test_a_registered_tracker_is_used_and_its_failure_does_not_end_the_run(
    tiny, tmp_path, monkeypatch, petl_log
):
    words = with_own_tracker(tiny, tmp_path, monkeypatch)
    run = train([*words, "train.log_steps=1"], tmp_path / "run")
    monkeypatch.delitem(sys.modules, "my_tracker")
    lines = (run.path / "mine.txt").read_text().splitlines()
    assert lines == [
        "verbs {'colour': 'red'}",
        "lora",
        "1 train/tokens",
        "2 train/tokens",
    ]
    assert "after" in run.scores
    assert "tracker=mine failed (the line) and gets nothing more" in petl_log.text


def test_an_error_before_the_first_step_closes_the_run(tiny, tmp_path, monkeypatch):
    words = with_own_tracker(tiny, tmp_path, monkeypatch)
    with pytest.raises(InputError):
        train([*words, "train.cache_frozen=true"], tmp_path / "run")
    monkeypatch.delitem(sys.modules, "my_tracker")
    assert (tmp_path / "run" / "mine.txt").read_text().splitlines()[-1] == "finished"


def test_tables_are_escaped_in_markdown():
    table = TrackerTable(["text", "n"], [["a | b\n<script>", 1]])
    assert table.markdown() == "| text | n |\n| --- | --- |\n| a \\| b &lt;script> | 1 |"
    assert table.by_column() == {"text": ["a | b\n<script>"], "n": [1]}
