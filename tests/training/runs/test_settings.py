"""The settings of a run and the YAML that lists them."""

import dataclasses

import pytest
from omegaconf import OmegaConf
from training_fixtures import ROOT

import petl
from petl.cli.catalog.recipes import list_recipes
from petl.training.compose import compose
from petl.training.runs.config import names_of
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig

YAML = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "train.yaml"))


def test_yaml_lists_every_setting_with_its_default():
    assert YAML["train"] == {**dataclasses.asdict(TrainConfig()), "lr": None}


def test_batch_sizes_come_from_a_file_or_as_a_run_has_kept_them(tmp_path):
    file = tmp_path / "sizes.yaml"
    file.write_text("buckets:\n- {longest: 9, batch_size: 4}\n- {longest: 30, batch_size: 2}\n")
    for value in (str(file), "{9: 4, 30: 2}"):
        cfg = compose(["+method=lora", f"train.batch_sizes={value}"])
        assert read_config(cfg).train.batch_sizes == {9: 4, 30: 2}


def test_rows_are_held_out_only_when_evaluation_steers():
    assert TrainConfig().validation_fraction == 0
    assert TrainConfig(eval_steps=5).validation_fraction == 0.1
    assert TrainConfig(eval_steps=5, validation_share=0.3).validation_fraction == 0.3


def test_steps_are_counted_from_epochs_unless_given():
    assert TrainConfig(epochs=3).steps_of_run(125) == 375
    assert TrainConfig(epochs=0.25).steps_of_run(2) == 1
    assert TrainConfig(steps=7).steps_of_run(125) == 7


def test_warmup_is_a_share_below_one_and_steps_from_one():
    assert TrainConfig(warmup=0.06).warmup_steps(375) == 22
    assert TrainConfig(warmup=30).warmup_steps(375) == 30


@pytest.mark.parametrize("name", ["max_grad_norm", "head_lr", "save_steps"])
def test_null_switches_off_what_has_a_default(name):
    settings = read_config(compose(["+method=lora", f"train.{name}=null"])).train
    assert getattr(settings, name) is None


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["+method=lora"], 1e-3),
        (["+method=compacter"], petl.method("compacter").lr),
        (["+method=compacter", "train.lr=2e-4"], 2e-4),
    ],
)
def test_a_run_without_a_learning_rate_has_that_of_its_method(words, rate):
    assert read_config(compose(words)).train.lr == rate


@pytest.mark.parametrize("name", list_recipes())
def test_a_run_of_a_recipe_is_called_by_it(name):
    cfg = compose([f"+method={name}"])
    loss = ["density"] if name == "deft" else []
    assert names_of(cfg) == [name, *loss, "minilm", "wordnet"]


def test_the_configuration_of_a_run_has_every_value_that_it_depends_on():
    config = read_config(compose(["+method=binary", "method.inner=lora", "model.dtype=bfloat16"]))
    assert config.precision == "bf16"
    assert config.method["r"] == config.resolved["method"]["r"]
    assert config.resolved["train"]["lr"] == config.train.lr == petl.method("binary").lr


def test_a_run_is_called_by_its_parts():
    cfg = compose(["+method=mola", "+loss=density", "model=smollm2", "data=hamlet"])
    assert names_of(cfg) == ["mola", "density", "smollm2", "hamlet"]
    # of a folder, not "path"
    cfg = compose(["+method=lora", "model=path", "model.path=bases/Qwen3-0.6B/", "data=hamlet"])
    assert names_of(cfg) == ["lora", "Qwen3-0.6B", "hamlet"]
