"""A folder that a user names is found, or the message has what may be meant."""

import pytest

from petl.errors import InputError
from petl.training.runs.lookup import adapter_at, look_for_scores, model_at, run_at, similar


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a run, an adapter, a model, a drafter and a folder of settings."""
    for file in (
        *("runs/quick/config.yaml", "runs/quick/environment.json"),
        "runs/quick/adapter/adapter_config.json",
        *("runs/begun/config.yaml", "runs/begun/environment.json"),
        *("alone/adapter_config.json", "merged/config.json", "drafter/drafter_config.json"),
        *("configs/model/config.yaml", ".hidden/quick/adapter_config.json"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_kind_of_folder_is_found(here):
    assert [str(adapter_at(name)) for name in ("runs/quick", "alone")] == [
        "runs/quick/adapter",
        "alone",
    ]
    for name in ("runs/quick", "alone", "merged", "drafter"):
        assert model_at(name)
    assert run_at("runs/begun")


@pytest.mark.parametrize(
    ("find", "name", "words"),
    [
        (adapter_at, "quik", ("quik is not a directory", "did you mean runs/quick?")),
        (adapter_at, "outputs/quick", ("did you mean runs/quick?",)),
        (adapter_at, "runs/begun", ("has saved no adapter yet", "train.resume=runs/begun")),
        (adapter_at, "merged", ("contains neither adapter/ nor adapter_config.json",)),
        (model_at, "runs", ("contains neither",)),
        (run_at, "alone", ("has no config.yaml", "runs/")),
    ],
)
def test_another_one_is_refused_with_what_may_be_meant(here, find, name, words):
    with pytest.raises(InputError) as raised:
        find(name)
    for word in words:
        assert word in str(raised.value)


def test_folders_of_settings_and_hidden_ones_are_not_suggested(here):
    assert "configs" not in similar("model")
    assert ".hidden" not in similar("quick")


def test_without_any_run_nothing_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert similar("quick") == ""


def test_a_comparison_needs_scores_in_one_of_the_folders(here):
    with pytest.raises(InputError):
        look_for_scores(["runs", "nowhere"])
    (here / "runs/quick/scores.json").write_text("{}")
    look_for_scores(["nowhere", "runs"])
