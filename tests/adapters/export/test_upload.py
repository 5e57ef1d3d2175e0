"""Adapters and models go to a local stand-in of the Hub, and nothing else does."""

import json
import shutil

import pytest
import yaml
from hub_server import OWNER
from task_runs import executed
from transformers import pipeline

import petl
from petl import testing
from petl.adapters.export.lora import export_lora
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.adapters.export.upload import prepare, push
from petl.cli import main
from petl.core.adapter_folder import CONFIG
from petl.errors import InputError, RunStopped
from petl.system.files.paths import OnHub

pytest_plugins = ["export_fixtures", "hub_server", "training_fixtures"]

NAME = f"{OWNER}/verbs"
GOES_UP = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"),
    *("base_fingerprint.json", "task.json", "tokenizer.json", "tokenizer_config.json"),
}


def pushed(path, name=NAME, base=None, **options):
    return push(prepare(path, name, base=base), name, **options)


def test_the_adapter_of_a_run_goes_up_and_nothing_else(mola_run, hub_server, capsys):
    assert main.main(["push", str(mola_run.path), NAME, "--private"]) == 0
    repository = hub_server.repositories[NAME]
    assert repository.private
    assert repository.files().keys() == {*GOES_UP, ".gitattributes"}
    assert {*hub_server.large.values()} == {repository.files()["adapter_model.safetensors"]}
    config = json.loads(repository.files()[CONFIG])
    assert config["base_model_name_or_path"] is None  # a folder of this machine
    everything = b"".join(content for content in repository.files().values())
    assert str(mola_run.path.parent).encode() not in everything
    assert config["peft_type"].startswith("PETL_MOLA of the package petl-peft")
    out = capsys.readouterr().out
    assert f"uploaded to {hub_server.address}/{NAME}, commit {repository.branches['main']}" in out
    assert "adapter_model.safetensors" in out


def test_a_dry_run_lists_the_files_and_asks_nobody(mola_run, hub_server, tmp_path, capsys):
    folder = shutil.copytree(mola_run.path / "adapter", tmp_path / "adapter")
    for name in ("optimizer.pt", "optimizer.safetensors", "training_args.bin", "x.py", ".env"):
        (folder / name).write_text("secret")
    (folder / "checkpoints").mkdir()
    shutil.copy(folder / "adapter_model.safetensors", folder / "checkpoints")
    assert main.main(["push", str(folder), NAME, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "nothing was uploaded" in out
    assert "stay here: .env, checkpoints/adapter_model.safetensors, optimizer.pt," in out
    assert hub_server.asked == []
    assert prepare(folder, NAME).files.keys() == GOES_UP
    assert main.main(["push", str(folder), "a/b/c", "--dry-run"]) == 2
    assert "'a/b/c' is no name of a repository" in capsys.readouterr().err


def test_an_adapter_without_effect_is_told_before_it_goes_up(tmp_path, capsys):
    model = petl.wrap(testing.tiny_llama(2), "lora", r=4, task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = "ada/llama"
    for stirred, told in ((False, True), (True, False)):
        if stirred:
            testing.stir(model)
        model.save_pretrained(tmp_path / f"{stirred}")
        assert main.main(["push", str(tmp_path / f"{stirred}"), NAME, "--dry-run"]) == 0
        assert ("dead.all: no effect" in capsys.readouterr().err) == told


def test_links_and_damaged_files_never_go_up(mola_run, hub_server, tmp_path):
    folder = shutil.copytree(mola_run.path / "adapter", tmp_path / "adapter")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for target in (secret, folder / "labels.json"):
        (folder / "vocab.json").symlink_to(target)
        with pytest.raises(InputError):
            prepare(folder, NAME)
        (folder / "vocab.json").unlink()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="adapter_model"):
        prepare(folder, NAME)


@pytest.mark.thorough
def test_the_code_of_an_uploaded_card_loads_from_the_hub(tiny, mola_run, hub_server, tmp_path):
    """The base model is on the Hub as well; the lines are executed as they are there."""
    hub_server.add("ada/base", tiny.folder / "steady")
    commit = hub_server.repositories["ada/base"].branches["main"]
    result = pushed(mola_run.path, base=OnHub("ada/base", commit))
    card = hub_server.repositories[NAME].files()["README.md"].decode()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["base_model"] == "ada/base"
    assert fields["base_model_relation"] == "adapter"
    assert {"accuracy", "f1"} <= {*fields["metrics"]}
    (tmp_path / "README.md").write_text(card)
    made = executed(tmp_path)
    assert made["adapter"] == result.name == NAME
    assert made["base_model"] == "ada/base"
    config = json.loads(hub_server.repositories[NAME].files()[CONFIG])
    assert (config["base_model_name_or_path"], config["revision"]) == ("ada/base", commit)


@pytest.mark.thorough
def test_an_exported_and_a_merged_folder_go_up(lora_run, hub_server, tmp_path):
    export_lora(find(lora_run.path), tmp_path / "lora", None)
    merge(find(lora_run.path), tmp_path / "merged", None)
    pushed(tmp_path / "lora", f"{OWNER}/lora")
    pushed(tmp_path / "merged", f"{OWNER}/merged", message="first", revision="v1")
    assert hub_server.repositories[f"{OWNER}/lora"].files().keys() >= GOES_UP
    merged = hub_server.repositories[f"{OWNER}/merged"]
    assert merged.messages[-1] == "first"
    assert "model.safetensors" in merged.files("v1")
    assert "model.safetensors" not in merged.files("main")
    ask = pipeline("text-classification", model=f"{OWNER}/merged", revision="v1", device="cpu")
    assert ask("the red dog")[0]["label"] in ("beast", "color", "tool")


@pytest.mark.thorough
def test_each_error_of_the_hub_is_one_line(mola_run, hub_server, monkeypatch):
    upload = prepare(mola_run.path, NAME)

    def refused(words, name, error=InputError, **settings):
        with pytest.raises(error, match=words):
            push(upload, name, **settings)

    refused("bob/verbs", "bob/verbs")
    refused("valid name", "a/b/c")
    assert push(upload, "verbs").name == NAME  # in the account of the token
    refused(f"{NAME}.* --update", NAME)
    refused("public", NAME, update=True, private=True)
    push(upload, NAME, update=True)
    hub_server.fails = {"PUT /lfs/": 500}
    refused("nothing was committed", f"{OWNER}/other", RunStopped)
    hub_server.fails = {"/commit/": 503}
    refused("503", f"{OWNER}/other", RunStopped)
    hub_server.fails = {}
    push(upload, f"{OWNER}/other")  # left empty by the failure
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("token is not valid", "verbs")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    refused("set HF_TOKEN", NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE", NAME)


@pytest.mark.thorough
def test_petl_load_takes_the_name_of_the_repository(mola_run, hub_server):
    pushed(mola_run.path)
    expected = find(mola_run.path)
    loaded = petl.load(expected.base(), NAME)
    batch = expected.batches()[0]
    assert loaded.eval()(**batch).logits.equal(expected.model()(**batch).logits)
