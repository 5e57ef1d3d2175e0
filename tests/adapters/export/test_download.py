"""What comes from a local stand-in of the Hub is one commit, checked before the folder appears."""

import json
from functools import partial

import pytest
import torch
from hub_server import OWNER
from safetensors.torch import save_file

from petl.adapters import deltas
from petl.adapters.export.download import pull
from petl.adapters.export.saved_adapter import find
from petl.adapters.export.upload import prepare, push
from petl.cli import main
from petl.data.tasks.retrieval.base_folder import folder_files
from petl.errors import InputError, RunStopped
from petl.ops.ternary import FILE
from petl.system.files.paths import OnHub

pytest_plugins = ["export_fixtures", "hub_server", "training_fixtures"]

NAME = f"{OWNER}/verbs"


@pytest.fixture
def repository(mola_run, hub_server):
    push(prepare(mola_run.path, NAME, base=OnHub("ada/base")), NAME)
    return hub_server.repositories[NAME]


def test_a_pushed_adapter_comes_back(repository, mola_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["pull", NAME]) == 0
    out = capsys.readouterr().out
    assert "adapter in verbs, " in out
    assert f"commit {repository.branches['main']} of {NAME}" in out
    weights = "adapter_model.safetensors"
    assert (tmp_path / "verbs" / weights).read_bytes() == (
        mola_run.path / "adapter" / weights
    ).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} <= {"verbs", "hub"}
    assert not (tmp_path / "verbs" / ".cache").exists()
    assert find(tmp_path / "verbs").config.peft_type == "PETL_MOLA"


def test_a_compressed_adapter_comes_back(mola_run, hub_server, tmp_path):
    found = deltas.compress_adapter(mola_run.path / "adapter", tmp_path / "small")
    push(prepare(tmp_path / "small", NAME, base=OnHub("ada/base")), NAME)
    assert pull(NAME, tmp_path / "back").kind == "adapter"
    assert deltas.Ternary.load(tmp_path / "back" / FILE).kept == found.kept


@pytest.fixture
def embedder(tmp_path):
    """A folder as `petl merge` and `petl shrink` write one, of a model with a layer behind it."""
    folder = tmp_path / "embedder"
    prompts = {"query": "Q: ", "document": "D: "}
    files = folder_files(
        "cls", 4, dense=["projection"], normalize=True, prompts=prompts, similarity="cosine"
    )
    files |= {
        "config.json": {"model_type": "bert"},
        "projection/config.json": {"in_features": 4, "out_features": 2},
        "sentence_bert_config.json": {"max_seq_length": 64},
        "task.json": {"task": "retrieval"},
        "widths.json": {"layers": {"encoder": [4, 8]}},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    save_file({"linear.weight": torch.ones(2, 4)}, folder / "projection/model.safetensors")
    return folder


def test_an_embedder_comes_back_with_all_that_makes_its_vectors(embedder, hub_server, tmp_path):
    def contents(folder):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    before = contents(embedder)
    (embedder / "projection/pytorch_model.bin").write_bytes(b"x")
    (embedder / "other").mkdir()
    (embedder / "other/config.json").write_text("{}")
    push(prepare(embedder, NAME), NAME)
    assert pull(NAME, tmp_path / "back").kind == "model"
    assert contents(tmp_path / "back") == before


def test_a_module_that_is_a_link_stays(embedder, hub_server, tmp_path):
    (embedder / "1_Pooling").rename(tmp_path / "elsewhere")
    (embedder / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError):
        prepare(embedder, NAME)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", [{"type": "x.Dense", "path": "../up"}], r"\.\./up"),
        ("modules.json", [{"type": "x.Dense", "path": "/up"}], "/up"),
        ("modules.json", {"type": "x.Dense"}, r"modules\.json"),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Pooling", "path": "lost"}],
            r"lost/config\.json",
        ),
        ("modules.json", [{"type": "x.Pooling", "path": "lost"}], "x.Pooling"),
        ("1_Pooling/config.json", [], r"1_Pooling/config\.json"),
        ("projection/model.safetensors", {}, r"projection/model\.safetensors"),
        ("widths.json", {"layers": {"a": [0, 1]}}, r"widths\.json"),
        ("task.json", {}, r"task\.json"),
        ("sentence_bert_config.json", [], "sentence_bert_config"),
    ],
)
def test_a_damaged_embedder_neither_goes_nor_comes(
    embedder, hub_server, tmp_path, name, content, message
):
    push(prepare(embedder, NAME), NAME)
    hub_server.repositories[NAME].commit({name: json.dumps(content).encode()})
    (embedder / name).write_text(json.dumps(content))
    for act in (partial(pull, NAME, tmp_path / "back"), partial(prepare, embedder, NAME)):
        with pytest.raises(InputError, match=message):
            act()
    assert not (tmp_path / "back").exists()


def test_a_revision_is_one_commit(repository, tmp_path):
    first = repository.branches["main"]
    repository.commit({"README.md": b"other", "setup.py": b"import os", "x/y.json": b"{}"})
    pulled = pull(NAME, tmp_path / "old", first)
    assert pulled.commit == first
    assert (tmp_path / "old" / "README.md").read_bytes() != b"other"
    pulled = pull(NAME, tmp_path / "new")
    assert (tmp_path / "new" / "README.md").read_bytes() == b"other"
    assert not (tmp_path / "new" / "setup.py").exists()  # only files that petl names
    assert not (tmp_path / "new" / "x").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_model.safetensors": b"x" * 40}, r"adapter_model\.safetensors"),
        ({"adapter_config.json": b'{"peft_type": "NEW"}'}, "NEW"),
        ({"labels.json": b"[]"}, r"labels\.json"),
        ({"base_fingerprint.json": b"{"}, "base_fingerprint.*JSON"),
    ],
)
def test_a_damaged_repository_leaves_no_folder(repository, files, message, tmp_path):
    repository.commit(files)
    with pytest.raises(InputError, match=message):
        pull(NAME, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [*tmp_path.glob(".petl-*")]


def test_a_pickle_is_not_downloaded(repository, hub_server, tmp_path):
    (files,) = [*repository.commits.values()][-1:]
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    with pytest.raises(InputError):
        pull(NAME, tmp_path / "out")
    assert not [each for each in hub_server.asked if each.endswith(".bin")]


def test_each_error_of_the_hub_is_one_line(repository, hub_server, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(words, *place, error=InputError):
        name, *revision = place or (NAME,)
        with pytest.raises(error, match=words):
            pull(name, out, *revision)

    refused("'ada/none'", "ada/none")
    refused("'v9'", NAME, "v9")
    hub_server.repositories["ada/empty"] = type(repository)()
    hub_server.repositories["ada/empty"].commit({"README.md": b"x"})
    refused("no adapter", "ada/empty")
    repository.gated = True
    refused(f"{NAME} is gated")
    repository.gated = False
    hub_server.fails = {"adapter_model": 500}
    refused("500 Internal", error=RunStopped)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    refused("127.0.0.1:1", error=RunStopped)
    assert not out.exists()
    out.mkdir()
    (out / "kept").touch()
    refused(str(out))
