"""A run in a file: the words that it stands for compose the same settings."""

import pytest
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from training_fixtures import train

from petl.errors import InputError
from petl.system.settings.command_line import options_of
from petl.system.settings.run_file import hydra_words
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]
RUNS = [
    [
        "+method=mola",
        "method.r=1",
        "train.lr=1.0",
        "train.steps=0",
        "method.target_modules=[q_proj,v_proj]",
    ],
    ["+method=lora", "data=files", "data.train=[a.csv,b.csv]", "data.text='{title}: {text}'"],
    ["+method=deft", "model=hub", "model.name=owner/name", "data=hub", "data.name=o/d"],
    ["+method=sparse", "+loss=distill", "train.betas=[0.8,0.99]", "train.precision=bf16"],
    ["+method=lora", "+method.rank_pattern={q_proj: 2}", "+launch=fsdp", "retain.data=bundled"],
    ["+method=binary", "method.inner=mola", "data=tasks", "data.sets=[wordnet,rotten]"],
    ["+method=lora", "data=files", "data.train='a {odd} é.csv'"],
]


def composed(words):
    return OmegaConf.to_container(compose(words))


def without(settings, *names):
    return {key: value for key, value in settings.items() if key not in names}


@pytest.mark.cells(2)
@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_the_settings_of_a_run_come_back(tmp_path, words):
    settings = composed(words)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert without(composed([str(file)]), "recipe") == without(settings, "recipe")
    assert len(hydra_words([str(file)])) <= len(words) + 4, "only what differs is a word"


@pytest.mark.cells(4)
@pytest.mark.parametrize("method", options_of("method"))
def test_every_method_comes_back(tmp_path, method):
    settings = composed([f"+method={method}"])
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(settings))
    assert without(composed([str(file)]), "recipe") == without(settings, "recipe")


def test_a_short_file_is_completed_and_words_change_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: {name: mola, r: 2}\ndata: wordnet\ntrain: {lr: 0.01, steps: 5}\n")
    expected = composed(["+method=mola", "method.r=2", "train.lr=0.01", "train.steps=5"])
    assert composed([str(file)]) == expected
    changed = composed([str(file), "method=lora", "train.steps=7"])
    assert changed == composed(["+method=lora", "train.lr=0.01", "train.steps=7"])
    assert composed([str(file), "method.r=3"])["method"]["r"] == 3


def test_a_configuration_is_named_within_its_group(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: {method: lora, r: 2}\ndata: {data: files, train: a.csv}\n")
    expected = composed(["+method=lora", "method.r=2", "data=files", "data.train=a.csv"])
    assert composed([str(file)]) == expected


def test_groups_without_a_default_need_no_plus():
    assert composed(["method=lora", "loss=density"]) == composed(["+method=lora", "+loss=density"])
    assert hydra_words(["method=lora,mola", "-m"]) == ["+method=lora,mola", "-m"]
    assert hydra_words(["model=smollm2", "method.r=3"]) == ["model=smollm2", "method.r=3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methd: lora\n", "'methd'.*'method'"),
        ("method: 3\n", "name of one"),
        ("data: {source: nowhere}\n", "data.source=nowhere"),
        ("data: {train: a.csv}\n", "data: NAME.*files"),
        ("- a\n- b\n", r"run\.yaml"),
        ("method: lora\ntrain: {learning_rate: 1}\n", "learning_rate"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        compose([str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("imports: [antigravity]\n", "imports=['antigravity']"),
        ("model: {source: hub, name: a/b, trust_remote_code: true}\n", "trust_remote_code=true"),
    ],
)
def test_code_is_run_only_if_the_command_line_says_so(tmp_path, content, word):
    file = tmp_path / "run.yaml"
    file.write_text(f"method: lora\n{content}")
    with pytest.raises(InputError) as refused:
        hydra_words([str(file)])
    assert word in str(refused.value)
    said = "imports=[json]" if "imports" in word else "model.trust_remote_code=true"
    assert said in hydra_words([str(file), said])


def test_no_value_of_a_file_reads_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    file = tmp_path / "run.yaml"
    given = "${oc.env:SECRET}"
    file.write_text(yaml.safe_dump({"method": "lora", "train": {"run": given}, "data": {
        "source": "files", "train": [given], "text": given}}))  # fmt: skip
    data = OmegaConf.to_container(compose([str(file)]).data, resolve=True)
    assert data["train"] == [given]
    assert data["text"] == given


def test_a_run_is_trained_again_from_its_folder(tiny, tmp_path):
    words = [*tiny.steady, "+method=lora", "train.steps=3", "method.r=2"]
    first = train(words, tmp_path / "first")
    again = train([str(first.path / "config.yaml")], tmp_path / "again")
    other = train([str(first.path / "config.yaml"), "method.r=4"], tmp_path / "other")
    one, two, three = (
        load_file(run.path / "adapter/adapter_model.safetensors") for run in (first, again, other)
    )
    assert all(one[name].equal(two[name]) for name in one)
    assert {tensor.shape for tensor in one.values()} != {tensor.shape for tensor in three.values()}
