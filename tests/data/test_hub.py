import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import constants
from image_text_fixtures import save_picture

from petl.data.base import read_data
from petl.errors import InputError
from petl.system.files import hub
from petl.system.files.disk import sha256


def settings(name, **more):
    return {"name": name, "source": "hub", "task": "classification", "max_length": 32, **more}


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A data set folder as on the Hub; `datasets` reads both with the same code."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  data_files:\n"
        "  - {split: train, path: train.csv}\n  - {split: validation, path: validation.csv}\n"
        "dataset_info:\n- config_name: plain\n  features:\n"
        "  - {name: sentence, dtype: string}\n"
        "  - {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}\n---\n"
    )
    lines = [f"sentence {i},{i % 2}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["sentence,label", *lines]))
    (tmp_path / "validation.csv").write_text("sentence,label\na,1\nb,0\n")
    monkeypatch.setattr(hub, "reachable", lambda *_: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return str(tmp_path)


def test_splits_are_read_with_the_names_of_their_classes(repo):
    raw = read_data(settings(repo, config="plain", text="sentence", test_split="validation"))
    assert raw.task.labels == ["bad", "good"]
    assert {row["text"]: row["label"] for row in raw.test} == {"a": 1, "b": 0}
    assert all(int(row["text"].split()[1]) % 2 == row["label"] for row in raw.train)
    assert len(raw.train) == 40


def test_without_a_test_split_a_fraction_is_held_out(repo):
    raw = read_data(settings(repo, text="sentence", test_split=None, train_rows=20))
    assert (len(raw.train), len(raw.test)) == (20, 4)
    assert not set(raw.train["text"]) & set(raw.test["text"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text": "sentence", "test_split": "test"}, '"test"'),
        ({"text": "sentence", "config": "fancy"}, "'fancy'"),
        ({}, "'text'.*sentence, label"),
    ],
)
def test_a_missing_split_or_column_is_named(repo, more, message):
    with pytest.raises(InputError, match=message):
        read_data(settings(repo, **more))


def test_train_rows_are_streamed(repo):
    raw = read_data(
        settings(
            repo,
            config="plain",
            task="regression",
            text="sentence",
            test_split="validation",
            streaming=True,
            train_rows=7,
        )
    )
    rows = list(raw.train.rows())
    assert rows == [{"text": f"sentence {i}", "label": i % 2} for i in range(7)]
    assert list(raw.train.rows()) == rows  # from the beginning, each time
    assert sorted(raw.test["label"]) == [0, 1]


def test_a_stream_has_the_names_of_its_classes(repo):
    given = {"config": "plain", "text": "sentence", "test_split": "validation", "streaming": True}
    raw = read_data(settings(repo, **given))
    assert raw.task.labels == ["bad", "good"]
    assert [row["label"] for row in raw.train.rows()] == [0, 1] * 20
    with pytest.raises(InputError):
        read_data(settings(repo, **given, labels=["good", "bad"]))


def test_the_names_of_tags_are_those_of_the_data_set(repo, tmp_path):
    names = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features({"words": [datasets.Value("string")], "ner": [names]})
    made = datasets.Dataset.from_dict(
        {"words": [["Ann", "is"], ["Bob"]], "ner": [[1, 0], [1]]}, features=features
    )
    for name in ("train", "validation"):
        made.to_parquet(tmp_path / "tagged" / f"{name}.parquet")
    raw = read_data(
        settings(
            str(tmp_path / "tagged"),
            task="token_classification",
            tokens="words",
            tags="ner",
            test_split="validation",
        )
    )
    assert raw.task.labels == ["O", "B-PER"]
    assert {tuple(row["tokens"]): row["tags"] for row in raw.train} == {
        ("Ann", "is"): [1, 0],
        ("Bob",): [1],
    }


def test_rows_without_a_label_are_refused(repo, tmp_path):
    (tmp_path / "validation.csv").write_text("sentence,label\na,-1\n")
    with pytest.raises(InputError, match="row 0: label is -1"):
        read_data(settings(repo, text="sentence", test_split="validation"))


def test_a_name_outside_the_cache_is_refused_when_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError):
        read_data(settings("someone/nothing"))


def test_a_hub_that_does_not_answer_counts_as_no_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()

    def refused(*_, **__):
        raise ConnectionError("connection refused")

    monkeypatch.setattr("petl.system.files.hub.HfApi.repo_info", refused)
    with pytest.raises(InputError):
        read_data(settings("someone/something"))
    assert not constants.HF_HUB_OFFLINE
    hub.reachable.cache_clear()


@pytest.fixture
def answer(monkeypatch):
    """A local server that answers every request with one status and error code of the Hub."""

    class Handler(BaseHTTPRequestHandler):
        status, code = 200, ""

        def do_GET(self):
            self.send_response(self.status)
            self.send_header("X-Error-Code", self.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    hub.reachable.cache_clear()
    yield Handler
    hub.reachable.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "'someone/nothing'"),
        (403, "GatedRepo", "http.*/datasets/someone/nothing"),
        (404, "RevisionNotFound", "'v9'"),
        (503, "", "someone/nothing"),
    ],
)
def test_errors_of_the_hub_become_one_sentence(answer, status, code, message):
    answer.status, answer.code = status, code
    with pytest.raises(InputError, match=message):
        read_data(settings("someone/nothing", revision="v9"))


@pytest.mark.parametrize("several", [False, True])
def test_images_of_the_hub_are_read_as_files(tmp_path, monkeypatch, several):
    file = save_picture(tmp_path / "a.png", "red")
    images = datasets.Image() if not several else datasets.List(datasets.Image())
    value = {"path": None, "bytes": file.read_bytes()}
    columns = {"image": images, "prompt": datasets.Value("string")}
    rows = {"image": [[value] if several else value] * 4, "prompt": ["What?"] * 4}
    features = datasets.Features({**columns, "completion": datasets.Value("string")})
    made = datasets.Dataset.from_dict({**rows, "completion": ["Red"] * 4}, features=features)
    (tmp_path / "rows").mkdir()
    made.to_parquet(tmp_path / "rows" / "train.parquet")
    monkeypatch.setattr(hub, "reachable", lambda *_: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    given = settings(str(tmp_path / "rows"), task="image_text", test_share=0.5)
    for streaming in (False, True):
        split = {"test_split": "train", "streaming": True} if streaming else {"test_split": None}
        raw = read_data({**given, **split})
        row = next(raw.train.rows()) if streaming else raw.train[0]
        assert row["sha256"] == [sha256(file)]


def test_an_invalid_name_is_refused(answer):
    with pytest.raises(InputError, match="'a/b/c'"):
        read_data(settings("a/b/c"))
