"""Checks of a method's registration, its config, and the names of its tensors."""

import copy
import json
import pickle
import re
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType
from torch import nn

from petl.core.experts.linears import split_experts, stack_of
from petl.core.method import Method
from petl.core.register import register
from petl.core.registry import build_config, wrap
from petl.core.tuners.asking import method_asked
from petl.errors import ModuleKindError
from petl.testing.case import Case, tuner_layers
from petl.testing.catalog import check, on_llama, own

# fields that PEFT and other libraries read from any config, without checking that it has them
READ_UNGUARDED = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "trainable_token_indices",
    "inference_mode",
    "task_type",
    "peft_type",
)

# attributes that PEFT reads from every layer of a tuner
OF_A_LAYER = (
    "base_layer",
    "active_adapters",
    "disable_adapters",
    "merged_adapters",
    "adapter_layer_names",
    "other_param_names",
    "in_features",
    "out_features",
    "quantization_backend",
)


@check(own)
def peft_type_is_a_member(case: Case) -> None:
    """The PEFT type is an enum member like PEFT's own, and survives pickle, deepcopy and json."""
    value = f"PETL_{case.method.upper()}"
    member = case.config().peft_type
    assert PeftType(value) is PeftType[value] is getattr(PeftType, value) is member
    assert member in list(PeftType), f"iterating PeftType does not give {value}"
    assert (member.name, member.value) == (value, value)
    assert isinstance(member, PeftType)
    assert member == value
    assert hash(member) == hash(value)
    assert pickle.loads(pickle.dumps(member)) is member, "pickle creates another member"
    assert copy.deepcopy(member) is member, "deepcopy creates another member"
    assert json.loads(json.dumps(member)) == value


@check(own)
def peft_tables_know_the_method(case: Case) -> None:
    """PEFT's tables have the type's config, tuner and prefix; a name can be registered once."""
    member = PeftType[f"PETL_{case.method.upper()}"]
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[member]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is case.entry.config_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == tuner.prefix == f"petl_{case.method}_"
    twin = type("Twin", (Method,), {"name": case.method, "config_cls": case.entry.config_cls})
    try:
        register(twin)
    except ValueError:
        return
    raise AssertionError(f"{case.method!r} could be registered twice")


@check(own)
def config_has_the_fields_others_read(case: Case) -> None:
    """PEFT and other libraries read some fields from any config, without a guard."""
    config = case.config()
    missing = [name for name in READ_UNGUARDED if not hasattr(config, name)]
    assert not missing, f"{type(config).__name__} lacks {missing}"


@check()
def config_survives_its_file(case: Case) -> None:
    """Saved as JSON and read again, pickled or copied, a config is the same."""
    config = case.config()
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        text = (Path(folder) / "adapter_config.json").read_text()
        read = PeftConfig.from_pretrained(folder)
    # reading fills in the version of PEFT that wrote the file, and nothing else
    expected = {**config.to_dict(), "peft_version": read.to_dict().get("peft_version")}
    assert type(read) is type(config)
    assert _plain(read.to_dict()) == _plain(expected), "the config read back differs"
    assert list(json.loads(text)) == sorted(json.loads(text)), "keys are not sorted"
    for way, twin in (
        ("pickle", pickle.loads(pickle.dumps(config))),
        ("deepcopy", copy.deepcopy(config)),
    ):
        assert _plain(twin.to_dict()) == _plain(config.to_dict()), f"{way} changes the config"


@check(on_llama)
def config_of_a_later_version_loads(case: Case) -> None:
    """A field that this version does not know is ignored, with a warning, as PEFT does."""
    config = case.config()
    with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        config.save_pretrained(folder)
        file = Path(folder) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "of_a_later_version": 1}))
        warnings.simplefilter("always")
        read = PeftConfig.from_pretrained(folder)
    warned = [str(entry.message) for entry in caught if "of_a_later_version" in str(entry.message)]
    assert warned, "an unknown field is ignored without a warning"
    expected = {**config.to_dict(), "peft_version": read.to_dict().get("peft_version")}
    assert _plain(read.to_dict()) == _plain(expected), "an unknown field changes the others"


@check(own)
def layers_have_what_peft_reads(case: Case) -> None:
    """Each layer has the attributes of PEFT's own, none of them shared with another layer."""
    layers = tuner_layers(case.wrap())
    assert layers, "no layer has an adapter"
    for name, layer in layers.items():
        missing = [attribute for attribute in OF_A_LAYER if not hasattr(layer, attribute)]
        assert not missing, f"layer {name} lacks {missing}"
        containers = (*layer.adapter_layer_names, *layer.other_param_names)
        foreign = [attribute for attribute in containers if not hasattr(layer, attribute)]
        assert not foreign, f"layer {name} names {foreign}, which it lacks"
    lists = {id(layer.merged_adapters) for layer in layers.values()}
    assert len(lists) == len(layers), "layers share one list `merged_adapters`"


@check(own)
def fixed_tensors_are_buffers(case: Case) -> None:
    """All parameters of the active adapter train: FSDP2's checkpoints leave out frozen ones."""
    model = case.without_head().wrap()
    names = [name for name, p in model.named_parameters() if f".{case.prefix}" in name]
    frozen = [name for name in names if not model.get_parameter(name).requires_grad]
    assert not frozen, f"{frozen} are parameters that do not train; register them as buffers"


@check(on_llama)
def layers_that_are_never_called_are_refused(case: Case) -> None:
    """A target whose weight its parent reads without calling it is an error, not without effect."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1)
    about_targets = ("exclude_modules", "layers_to_transform", "modules_to_save", "task_type")
    fields = {k: v for k, v in case.all_fields().items() if k not in about_targets}
    for target in ("linear1", "out_proj"):
        message = ""
        try:
            wrap(encoder, build_config(case.method, **{**fields, "target_modules": [target]}))
        except ModuleKindError as error:
            message = str(error)
        assert target in message, f"{target} of an nn.TransformerEncoder is not refused: {message}"


@check(own)
def tensor_names_follow_the_rule(case: Case) -> None:
    """Keys of the model have the adapter's name after the container; saved keys have none."""
    model: Any = case.wrap(adapter_name="some_name")
    modules = dict(case.base().named_modules())
    prefix = re.escape(case.prefix)
    # <module path>.petl_<method>_adapters.<adapter>.<tensor>
    in_layer = re.compile(rf"base_model\.model\.(.+)\.{prefix}adapters\.some_name\.\w+")
    # petl_<method>_pools.<adapter>.<tensor>
    in_pool = re.compile(rf"base_model\.{prefix}pools\.some_name\.\w+")
    live = [key for key in model.state_dict() if f".{case.prefix}" in key]
    assert live, f"no key of the state dict contains {case.prefix!r}"
    for key in live:
        layer = in_layer.fullmatch(key)
        assert layer or in_pool.fullmatch(key), (
            f"key {key} matches neither {in_layer.pattern} nor {in_pool.pattern}"
        )
        # experts are slices of a parameter
        owner = layer and (
            layer[1] if layer[1] in modules else stack_of(layer[1]).rpartition(".")[0]
        )
        assert not layer or owner in modules, f"{key}: {layer[1]} is no module of the base"
    saved = set(split_experts(get_peft_model_state_dict(model, adapter_name="some_name")))
    # saved keys lack the adapter's name
    expected = {key.replace(".some_name.", ".", 1) for key in live}
    may_lack = method_asked(type(model.base_model)).optional_tensors
    left_out = {key for key in expected - saved if key.rpartition(".")[2] in may_lack}
    assert {k for k in saved if f".{case.prefix}" in k} == expected - left_out
    heads = {k for k in saved if f".{case.prefix}" not in k}
    to_save = model.peft_config["some_name"].modules_to_save or []
    # names of modules, or complete paths
    others = [k for k in heads if not any(f".{name}." in k for name in to_save)]
    assert not others, f"the adapter file also has {others}"


def _plain(value: object) -> object:
    """Return JSON types: sets as sorted lists, enum members as their values."""
    return json.loads(json.dumps(value, sort_keys=True, default=sorted))
