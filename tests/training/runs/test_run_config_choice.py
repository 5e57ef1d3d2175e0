"""What excludes what in a run: each declared pair is refused with its reason, others are not."""

from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest

import petl
from petl.core.losses import build_loss
from petl.core.support import Capability, conflicts
from petl.errors import InputError
from petl.system.imports.tables import LOSSES
from petl.training.compose import compose
from petl.training.distributed.launch import FSDP, DeepSpeed, Launch
from petl.training.features import FEATURES, features_of
from petl.training.runs.run_config import choice_of, read_config
from petl.training.runs.settings import TrainConfig

C = Capability
KINDS = {"ddp": Launch(), "fsdp": FSDP("fsdp"), "deepspeed": DeepSpeed("deepspeed")}
BASE = {"method": {"name": "lora"}, "train": {}, "loss": None, "launch": "ddp", "scheme": None}
BINARY = {"name": "binary", "inner": "lora"}
PV = {**BINARY, "steps": "pv"}
# by what declares it and the capability: a run that has both
PAIRS: dict[tuple[str, Capability], dict[str, Any]] = {
    ("launch=ddp", C.BASE_TORCHAO): {"scheme": "torchao_int8"},
    ("launch=deepspeed", C.BASE_TORCHAO): {"scheme": "torchao_int8", "launch": "deepspeed"},
    ("launch=fsdp", C.BASE_TORCHAO): {"scheme": "torchao_int8", "launch": "fsdp"},
    ("launch=fsdp", C.BASE_4BIT): {"scheme": "bnb_4bit", "launch": "fsdp"},
    ("launch=fsdp", C.BASE_8BIT): {"scheme": "bnb_8bit", "launch": "fsdp"},
    ("loss=density", C.REENTRANT): {
        "loss": "density",
        "train": {"gradient_checkpointing": "reentrant"},
    },
    ("loss=density", C.NEW_HEAD): {"loss": "density", "method": {"name": "dkvb"}},
    ("loss=distill", C.REENTRANT): {
        "loss": "distill",
        "train": {"gradient_checkpointing": "reentrant"},
    },
    ("loss=distill", C.NEW_HEAD): {"loss": "distill", "method": {"name": "dkvb"}},
    ("loss=distill", C.SEGMENTS): {"loss": "logits", "train": {"loss_segment": 64}},
    ("loss=distill", C.CHANGED_BASE): {
        "loss": "distill",
        "method": {"name": "lora", "init_lora_weights": "pissa"},
    },
    ("loss=distill", C.BIASES): {"loss": "distill", "method": {"name": "lora", "bias": "all"}},
    ("loss=nested", C.FSDP): {"loss": "nested", "launch": "fsdp"},
    ("loss=nested", C.ZERO): {"loss": "nested", "launch": "deepspeed"},
    ("loss=nested", C.REENTRANT): {
        "loss": "nested",
        "train": {"gradient_checkpointing": "reentrant"},
    },
    ("loss=nested", C.SEGMENTS): {"loss": "nested", "train": {"loss_segment": 64}},
    ("train.optimizer=adamr", C.ZERO): {"train": {"optimizer": "adamr"}, "launch": "deepspeed"},
    ("data.sampling=temperature", C.BUCKETS): {
        "train": {"buckets": 3},
        "data": {"sampling": "temperature"},
    },
    ("data.new_tokens=['a']", C.ZERO): {"data": {"new_tokens": ["a"]}, "launch": "deepspeed"},
    ("data.order=by_class", C.BUCKETS): {
        "train": {"max_tokens": 99},
        "data": {"order": "by_class"},
    },
    ("data.order=by_class", C.EVALUATION): {
        "train": {"eval_steps": 5},
        "data": {"order": "by_class"},
    },
    ("data.order=by_class", C.TASKS): {"data": {"order": "by_class", "tasks": ["one", "two"]}},
    ("retain", C.BUCKETS): {"train": {"buckets": 3}, "retain": {"mix": 0.5}},
    ("retain", C.TASKS): {"retain": {"mix": 0.5}, "data": {"tasks": ["one", "two"]}},
    ("task=dpo", C.TASKS): {"task": {"name": "dpo"}, "data": {"tasks": ["one", "two"]}},
    ("task=dpo", C.EXTRA_LOSS): {"task": {"name": "dpo"}, "loss": "density"},
    ("task=dpo", C.CHANGED_BASE): {
        "task": {"name": "dpo"},
        "method": {"name": "lora", "init_lora_weights": "pissa"},
    },
    ("train.init_from=runs/saved", C.SIZE): {"train": {"init_from": "runs/saved", "budget": 9}},
    ("method adalora", C.EXTRA_LOSS): {
        "method": {"name": "adalora", "total_step": 2000},
        "loss": "density",
    },
    ("method icv", C.EXTRA_LOSS): {"method": {"name": "icv"}, "loss": "density"},
    ("method icv", C.FIND_LR): {"method": {"name": "icv"}, "train": {"find_lr": True}},
    ("method sparse", C.ADAMR): {
        "method": {"name": "sparse", "total_step": 200},
        "train": {"optimizer": "adamr"},
    },
    ("method sparse", C.ZERO): {
        "method": {"name": "sparse", "total_step": 200},
        "launch": "deepspeed",
    },
    ("method binary", C.FSDP): {"method": PV, "launch": "fsdp"},
    ("method binary", C.ZERO): {"method": PV, "launch": "deepspeed"},
    ("method binary", C.ADAMR): {"method": PV, "train": {"optimizer": "adamr"}},
    ("method lora", C.FSDP): {
        "method": {"name": "lora", "init_lora_weights": "pissa"},
        "launch": "fsdp",
    },
}
WORKING: list[dict[str, Any]] = [
    {},
    {"launch": "deepspeed", "scheme": "bnb_4bit"},
    {"launch": "fsdp", "train": {"optimizer": "adamr"}},
    {"loss": "distill", "train": {"gradient_checkpointing": True, "loss_segment": 64}},
    {"loss": "logits", "train": {"loss_segment": "auto"}},
    {"task": {"name": "orpo"}, "method": {"name": "lora", "init_lora_weights": "pissa"}},
    {"method": {"name": "adalora", "total_step": 2000}, "train": {"optimizer": "adamr"}},
    {"method": {"name": "lora", "init_lora_weights": "pissa"}, "launch": "deepspeed"},
    {"method": BINARY, "launch": "fsdp", "train": {"optimizer": "adamr"}},
    {"method": BINARY, "launch": "deepspeed"},
    {"method": PV},
]


def chosen(changes: dict[str, Any]) -> list:
    run: dict[str, Any] = BASE | changes
    losses = {
        "density": build_loss("density"),
        "distill": build_loss("distill", feature_weight=1.0, logit_weight=0.0),
        "logits": build_loss("distill", feature_weight=0.0, logit_weight=1.0),
        "nested": build_loss("nested"),
        None: None,
    }
    settings = {
        "method": run["method"],
        "train": {"cache_frozen": False, "linear_probe": False} | run["train"],
        "data": run.get("data", {}),
    }
    settings |= {group: run[group] for group in ("retain", "task") if group in run}
    config: Any = SimpleNamespace(
        train=TrainConfig(**run["train"]),
        model=SimpleNamespace(quantization=run["scheme"]),
        loss=losses[run["loss"]],
        launch=KINDS[run["launch"]],
        resolved=settings,
    )
    return choice_of(run["method"], config, [feature.part for feature in features_of(settings)])


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize(("pair", "changes"), PAIRS.items(), ids=lambda value: str(value)[:60])
def test_a_declared_pair_is_refused_with_its_reason(pair, changes):
    name, capability = pair
    parts = chosen(changes)
    declaring = next(part for part in parts if part.name == name)
    assert [part for part in parts if capability in part.uses], "nothing uses it"
    found = [(each.without, each.reason) for each in conflicts(parts)]
    reasons = [reason for without, reason in found if without == name]
    assert reasons, found
    assert capability in declaring.lacks


@pytest.mark.parametrize("changes", WORKING, ids=str)
def test_what_no_row_excludes_is_possible(changes):
    assert not conflicts(chosen(changes))


def test_every_row_of_a_loss_a_launch_and_a_feature_is_tried():
    tables = {f"loss={name}": loss.controller_cls.lacks for name, loss in LOSSES.items()}
    tables |= {f"launch={name}": kind.lacks for name, kind in KINDS.items()}
    values = {
        "data.order": "by_class",
        "data.new_tokens": ["a"],
        "train.init_from": "runs/saved",
        "task": "dpo",
    }
    tables |= {
        setting if kind.Settings else f"{setting}={values[setting]}": kind.lacks
        for setting, place in FEATURES.items()
        if (kind := resolve_name(place)).lacks
    }
    declared = {(name, each) for name, lacks in tables.items() for each in lacks}
    # no method of a run adds prompts, none is compiled, and none is in FSDP1; rewrites and groups
    # refuse by themselves: tests/methods/losses
    rewrites = (C.PROMPTS, C.COMPILE, C.SKIP, C.STORE, C.TOGETHER, C.FSDP1)
    elsewhere = {("loss=distill", C.PROMPTS), *(("loss=nested", each) for each in rewrites)}
    # is chosen by train.precision=auto, not refused: tests/training/distributed/test_precision.py
    elsewhere.add(("loss=density", C.BF16))
    assert declared - elsewhere <= set(PAIRS)


def test_torchao_is_possible_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not conflicts(chosen({"scheme": "torchao_int8"}))


def test_a_conflict_names_both_and_the_reason():
    config = petl.build_config("lora", init_lora_weights="pissa")
    part = petl.method("lora").part(config)
    assert C.CHANGED_BASE in part.uses
    words = str(conflicts(chosen(PAIRS["loss=distill", C.BIASES]))[0])
    assert words.startswith("method lora is not possible with loss=distill: its teacher is")


def test_a_run_that_is_used_needs_no_files_of_data():
    cfg = compose(["+method=lora", "data=files", "data.train=gone.csv"])
    with pytest.raises(InputError):
        read_config(cfg)
    assert read_config(cfg, reads_data=False).data.train == "gone.csv"


@pytest.mark.parametrize(("method", "served"), [("lora", None), ("polyhistor", ["one", "two"])])
def test_several_sets_suit_methods_of_one_task_and_name_those_of_others(method, served):
    sets = "data.sets={one:{data:wordnet},two:{data:wordnet,seed:3}}"
    config = read_config(compose([f"+method={method}", "data=tasks", sets]))
    assert config.resolved["method"].get("tasks") == served
