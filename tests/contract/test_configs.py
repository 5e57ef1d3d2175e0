"""Every method's YAML composes, agrees with the code, and builds on every type of model."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from contract_cases import ours_first
from omegaconf import OmegaConf

import petl
from petl import testing
from petl.core.losses import WRAP_ONLY
from petl.core.registry import needs_calibration
from petl.core.spec.config import MethodConfig
from petl.core.support import Capability
from petl.system.settings.schema import plain
from petl.training.compose import compose
from petl.training.runs.config import method_fields
from petl.training.runs.run_config import read_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = "# @package _global_"  # how a file begins that composes a method and more
FILES = {path.stem: path.read_text() for path in (CONFIGS / "method").glob("*.yaml")}
METHOD_FILES = sorted(name for name, text in FILES.items() if not text.startswith(RECIPE))
RECIPES = sorted(set(FILES) - set(METHOD_FILES))
OWN = [name for name in petl.list_methods() if petl.method(name).own]
# Fields of any method that a command line may want to set.
SHARED = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
}
# DKVB needs a classification head, PYRA merges tokens of images, VL-PET needs an encoder and a
# decoder, SCEdit a U-Net, and these tuners of PEFT's do not adapt Conv1D.
REFUSED = {
    ("icv", "t5"),
    *(("dkvb", model) for model in ("llama", "t5", "gpt2")),
    *(("pyra", model) for model in ("llama", "bert", "t5", "gpt2")),
    *(("vl_pet", model) for model in ("llama", "bert", "vit", "gpt2")),
    *(
        (name, "gpt2")
        for name in ("boft", "c3a", "delora", "hra", "loha", "lokr", "miss", "oft", "shira")
    ),
    *(("scedit", model) for model in testing.TINY_MODELS),
}
# Fields that a YAML's values do not suit on models of two or three layers, or must name.
SMALLER = {
    "icv": {"train": True, "pairs": None, "scale": "plain", "keep_norm": False},
    "mos": {"r": 4},
    "polyhistor": {"tasks": ["only"]},
    "pyra": {"schedule": [2, 0]},
}
# MoS's own defaults need 15 layers, and the quickstart's model has 6; a small adapter of few bits
# is mostly names unless it is stacked.
# IncreLoRA's 100 steps suit long trainings; VL-PET's published start halves sub-layers, which does
# not suit models of text. ICV's demonstrations are chosen by runs alone.
DIFFERING = {
    "icv": {"calibration_data"},
    "mos": {"equivalent_rank"},
    "binary": {"save_format"},
    "increlora": {"tinit", "deltaT"},
    "vl_pet": {"init_weights", "identity_gate"},
}


def in_yaml(name: str) -> dict[str, Any]:
    fields = OmegaConf.to_container(OmegaConf.load(CONFIGS / "method" / f"{name}.yaml"))
    assert isinstance(fields, dict)
    return {str(key): value for key, value in fields.items()}


@pytest.mark.parametrize("name", ours_first([*METHOD_FILES, *RECIPES]))
def test_a_method_composes_into_a_run(name):
    cfg = compose([f"+method={name}"])
    reason = petl.method(cfg.method.name).lacking(Capability.TRAIN)
    if reason:
        with pytest.raises(petl.InputError, match=re.escape(reason)):
            read_config(cfg)
    else:
        read_config(cfg)
    assert cfg.method.name in petl.list_methods()
    fields = method_fields(cfg.method, "SEQ_CLS", total_steps=1000)
    config = petl.build_config(**fields)
    assert str(config.task_type) == "SEQ_CLS"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, marks=[] if model in ("llama", "bert") else pytest.mark.thorough)
        for model in testing.TINY_MODELS
    ],
)
@pytest.mark.parametrize("name", ours_first(METHOD_FILES))
def test_a_method_builds_from_its_yaml(name, model):
    tiny = testing.TINY_MODELS[model]
    smaller = SMALLER.get(name, {})
    fields = method_fields({**in_yaml(name), **smaller}, tiny.task_type, total_steps=1000)
    if (name, model) in REFUSED:
        with pytest.raises(petl.InputError):
            petl.wrap(tiny.base(), **fields)
        return
    calibration = [tiny.batch()] if needs_calibration(petl.build_config(**fields)) else None
    wrapped = petl.wrap(tiny.base(), calibration=calibration, **fields)
    assert testing.trainable(wrapped)
    assert testing.logits(wrapped, tiny.batch()).isfinite().all()


@pytest.mark.parametrize("name", METHOD_FILES)
def test_a_yaml_sets_fields_that_the_method_has(name):
    assert FILES[name].startswith("# ")  # what `petl methods` shows
    fields = in_yaml(name)
    known = {field.name for field in dataclasses.fields(petl.get(fields.pop("name")))}
    assert set(fields) <= known


@pytest.mark.parametrize("name", OWN)
def test_the_yaml_of_an_own_method_lists_its_fields_with_their_defaults(name):
    """Hydra accepts method.FIELD=VALUE only for existing keys."""
    fields = in_yaml(name)
    assert fields.pop("name") == name
    config_cls = petl.get(name)
    own = issubclass(config_cls, MethodConfig)
    parent = MethodConfig if own else config_cls.__mro__[1]
    inherited = {field.name for field in dataclasses.fields(parent)}
    added = {f.name for f in dataclasses.fields(config_cls) if f.init} - inherited
    inner = petl.method(name).has_inner  # the shared ones are then an inner method's
    assert set(fields) == (added if inner else added | SHARED)
    default = petl.build_config(name)
    differing = {k: (v, getattr(default, k)) for k, v in fields.items() if v != getattr(default, k)}
    assert set(differing) == DIFFERING.get(name, set())


@pytest.mark.parametrize("name", petl.list_losses())
def test_the_yaml_of_a_loss_lists_its_fields_with_their_defaults(name):
    fields = plain(OmegaConf.load(CONFIGS / "loss" / f"{name}.yaml"))
    assert fields.pop("name") == name
    default = dataclasses.asdict(petl.get(name)())
    assert fields == {key: value for key, value in default.items() if key not in WRAP_ONLY}


@pytest.mark.parametrize("name", METHOD_FILES)
def test_fields_can_be_set_on_the_command_line(name):
    """At least targets; a list in brackets, as a shell passes it."""
    if "target_modules" not in in_yaml(name):
        pytest.skip("the method chooses its targets")
    cfg = compose([f"+method={name}", "method.target_modules=[q_proj,v_proj]"])
    config = petl.build_config(**method_fields(cfg.method, "CAUSAL_LM", total_steps=1000))
    assert set(config.target_modules) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("value", ["5", "'2468'", '"10,2,2,2"', "[2,4]", "diamond"])
def test_expert_patterns_can_be_given_on_the_command_line(value):
    cfg = compose(["+method=mola", f"method.num_experts={value}"])
    config = petl.build_config(**method_fields(cfg.method, "CAUSAL_LM", total_steps=1000))
    expected = {"5": 5, "'2468'": "2468", '"10,2,2,2"': "10,2,2,2", "[2,4]": [2, 4]}
    assert config.num_experts == expected.get(value, value)


def test_digits_without_quotes_are_a_pattern():
    """Hydra reads method.num_experts=2468 as an integer; it means the digits, not 2,468 experts."""
    cfg = compose(["+method=mola", "method.num_experts=2468"])
    fields = method_fields(cfg.method, "CAUSAL_LM", total_steps=1000)
    model = petl.wrap(testing.tiny_llama(layers=4), **fields)
    experts = [m.adapters["default"].num_experts for m in testing.tuner_layers(model).values()]
    assert sorted(set(experts)) == [2, 4, 6, 8]
