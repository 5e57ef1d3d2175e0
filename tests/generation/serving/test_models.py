"""What a server offers: names, one base model, adapters of several methods."""

import pytest

from petl.errors import InputError
from petl.generation.inference.language_model import BASE
from petl.generation.serving.models import check_same_base, load_served, named_runs

pytest_plugins = ["writer_fixtures"]


def test_runs_are_called_after_their_folder_or_as_named(tmp_path):
    (tmp_path / "a=b").mkdir()
    words = ["runs/french", "de=runs/german/adapter", "runs/old/adapter", str(tmp_path / "a=b")]
    assert named_runs(words) == {
        "french": "runs/french",
        "de": "runs/german/adapter",
        "old": "runs/old/adapter",
        "a=b": str(tmp_path / "a=b"),
    }


@pytest.mark.parametrize("word", ["=runs/a", "a=", "", "a\x1b=runs/a", "a" * 101 + "=runs/a"])
def test_names_that_no_request_can_have_are_refused(word):
    with pytest.raises(InputError):
        named_runs([word])


def test_methods_share_the_base_model_and_adapters_of_one_share_a_lane(writers, caplog):
    runs = {name: str(writers.folder / name) for name in ("lora", "mola", "other")}
    with caplog.at_level("INFO", "petl"):
        served = load_served(runs)
    shown = [line for line in caplog.messages if line.startswith("loading")]
    assert shown[0] == "loading model llama"  # once
    assert sorted(shown[1:]) == ["loading adapters: 1 adapter", "loading adapters: 2 adapters"]
    assert [*served] == ["llama", "lora", "mola", "other"]
    assert served["lora"].lane is served["other"].lane is served["llama"].lane
    assert served["mola"].lane is not served["lora"].lane
    assert (served["llama"].adapter, served["llama"].path) == (BASE, None)
    first, second = (served[name].language.base for name in ("lora", "mola"))
    assert first is not second
    assert first.get_input_embeddings().weight is second.get_input_embeddings().weight


def test_a_plain_model_is_served_by_its_name(writers):
    served = load_served({"it": str(writers.folder / "llama")})
    assert [*served] == ["it"]
    assert served["it"].language.is_chat


def test_drafts_of_a_model_with_small_weights_pack_none_of_them(writers):
    served = load_served({"it": str(writers.folder / "llama")}, weights="int8")
    drafts = served["it"].lane.passes.drafts
    assert drafts is not None
    assert not drafts.rounds.packing.is_possible


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora", "t5-lora"], "one base model"),
        (["t5-lora"], "encoder-decoder"),
        (["llama", "lora"], "adapters"),
        (["lora", "nothing"], "is not a directory"),
    ],
)
def test_models_that_do_not_fit_are_refused(writers, names, message):
    with pytest.raises(InputError, match=message):
        load_served({name: str(writers.folder / name) for name in names})


def test_a_run_cannot_have_the_name_of_the_base_model(writers):
    with pytest.raises(InputError):
        load_served({"llama": str(writers.folder / "lora")})


@pytest.mark.parametrize(("setting", "value"), [("name", "o/m2"), ("revision", "v2")])
def test_what_two_bases_differ_in_is_named(setting, value):
    settings = {"name": "o/m", "source": "hub", "revision": "v1"}
    with pytest.raises(InputError) as caught:
        check_same_base({"a": settings, "b": {**settings, setting: value}})
    shown = "model" if setting == "name" else setting
    expected = f"with {shown}={settings[setting]} and 'b' on one with {shown}={value}: a server"
    assert expected in str(caught.value)
