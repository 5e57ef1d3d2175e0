"""All settings of a run, read and checked once, before anything is loaded.

`read_config` turns the configuration that Hydra composed into a `RunConfig`, whose parts the rest
of a run takes.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

from omegaconf import DictConfig

from petl.core.losses import loss_part
from petl.core.losses import read as read_loss
from petl.core.method import Method
from petl.core.registry import build_config, is_computed, method, method_part
from petl.core.support import BASES, Capability, Conflict, Part, conflicts, require_compatible
from petl.core.types import Fields, Record, Settings
from petl.data.base import data_source, source_class
from petl.data.models.sources import PACKAGES, read_source
from petl.errors import InputError, UnknownNameError, UnsupportedError, did_you_mean
from petl.system.imports.peft_hook import import_modules
from petl.system.imports.tables import METHODS
from petl.system.settings.schema import plain
from petl.system.values import LARGEST
from petl.training.distributed.launch import read_launch
from petl.training.features import FEATURES, SCORES, Groups, features_of
from petl.training.runs.config import GROUPS, RunConfig, method_fields, with_inner
from petl.training.runs.settings import TrainConfig, read_train, require_method

# added with a plus, by a recipe of configs/method, or absent from old runs
OPTIONAL = ("loss", "launch", "recipe", "imports")
WORKERS_PER_CORE = 8  # more only wait for each other; assumption


def read_config(cfg: DictConfig | Settings, *, reads_data: bool = True) -> RunConfig:
    """Check all settings of a run; no data or model is read.

    Args:
        reads_data: the files of the data have to be there; a run that is used needs none.

    Raises:
        InputError: an unknown name, a value of another type or out of range, no method or one that
            `petl train` cannot train, a module of `imports` that cannot be imported.
    """
    settings = plain(cfg)
    import_modules(settings.get("imports"))  # which may add features
    check_groups(settings)
    read_train(settings)  # before features read these settings
    for feature in features_of(settings):
        settings = feature.settle(settings)
    config = completed(settings)
    config.model.check()
    if reads_data:
        config.data.check()
    for feature in features_of(config.resolved):
        feature.check(config)
    return config


def completed(settings: Groups) -> RunConfig:
    """Return the checked settings with all fields, so that config.yaml depends on no default.

    Raises:
        InputError: as `read_config`.
    """
    loss = read_loss(settings["loss"]) if settings.get("loss") is not None else None
    tracker = None
    if settings["tracker"] != {"name": "none"}:  # the default needs no check and no tracker
        from petl.training.tracking import read_tracker  # most runs have none

        tracker = read_tracker(settings["tracker"])
    train, launch = read_train(settings), read_launch(settings.get("launch"))
    entry = chosen_method(settings)
    fields = with_inner(settings["method"])
    if settings["train"].get("lr") is None:
        train = replace(train, lr=entry.default_lr(fields))
    check_machine(train)
    data = source_class(settings["data"]).completed(settings["data"])
    fill_tasks(fields, data)
    # all fields are checked again once task type and number of steps are known
    chosen = method_fields(fields, None, train.steps or LARGEST)
    train = with_steps(train, chosen)
    data = with_row_tasks(data, fields)
    # values in place of null and of the name of a file, which may change
    known = {"lr": train.lr, "batch_sizes": train.batch_sizes, "steps": train.steps}
    config = RunConfig(
        train=train,
        model=read_source(settings["model"]),
        data=data_source(data),
        method=fields,
        loss=loss,
        launch=launch,
        tracker=tracker,
        resolved=settings | {"method": fields, "train": settings["train"] | known, "data": data},
    )
    parts = [feature.part for feature in features_of(config.resolved)]
    choice = choice_of(chosen, config, parts)
    require_compatible(choice)
    # not refused: whoever asks for bf16 gets it
    found = conflicts([*choice, Part("train.precision=auto", (Capability.BF16,))])
    return replace(config, float32="; ".join(f"{part}: {reason}" for _, part, reason in found))


def chosen_method(settings: Settings) -> Method:
    """Return the registry's entry of the method of a run.

    Raises:
        InputError: there is none, or an unknown one.
        UnsupportedError: `petl train` cannot train it.
    """
    require_method({**settings, "train": {}})  # a feature has put that of init_from there
    try:
        entry = method(settings["method"]["name"])
    except UnknownNameError as error:  # there is a YAML of that name, so it may be a plugin's
        raise UnknownNameError(
            f"{error} (a method of your own: install its package, or add imports=[MODULE])"
        ) from error
    reason = entry.lacking(Capability.TRAIN)
    if reason:
        raise UnsupportedError(str(Conflict("petl train", f"method {entry.name}", reason)))
    return entry


def with_steps(train: TrainConfig, fields: Fields) -> TrainConfig:
    """Return the settings, with `steps=0` for a method that trains nothing.

    Raises:
        InputError: a run of such a method has steps, or one of another method has none.
    """
    name = fields["name"]
    if not is_computed(build_config(**fields)):
        if train.steps == 0:
            raise InputError(
                f"train.steps=0 leaves method {name!r} untrained: set an integer from 1, or null"
            )
        return train
    if train.steps:
        raise InputError(
            f"method {name!r} computes its adapter from data and has nothing to train in "
            f"train.steps={train.steps}: set train.steps=0, or method.train=true"
        )
    return replace(train, steps=0)


def fill_tasks(fields: Fields, data: Settings) -> None:
    """Give a method that serves several tasks those of the data, unless it names its own.

    Raises:
        InputError: the data names tasks, and the method serves none, or others.
    """
    has_sets = data.get("source") == "tasks"
    names = [*data["sets"]] if has_sets else data.get("tasks")
    if not names or (has_sets and "tasks" not in fields):  # a head for each suits any method
        return
    if "tasks" not in fields:
        serving = (name for name, entry in METHODS.index.items() if "tasks" in entry.fields)
        choices = " or ".join(f"+method={name}" for name in serving)
        raise InputError(
            f"data.tasks={names} is for a method that serves several tasks, and {fields['name']} "
            f"does not: choose {choices}, or leave data.tasks out"
        )
    fields["tasks"] = fields["tasks"] or names
    if list(fields["tasks"]) != list(names):
        raise InputError(
            f"method.tasks={fields['tasks']} and data.{'sets' if has_sets else 'tasks'}={names} "
            "differ: set one of them"
        )


def with_row_tasks(data: Settings, fields: Fields) -> Record:
    """Return the settings of the data; its rows need a task each if the method serves several.

    Raises:
        InputError: the source has no column for it.
    """
    names = fields.get("tasks") or []
    if len(names) < 2 or data.get("source") == "tasks":
        return dict(data)
    if "task_column" not in data:
        raise InputError(
            f"method.tasks={names} needs rows that name their task, and data {data.get('name')} "
            "has no column for it: use data=files or data=hub with data.task_column=COLUMN"
        )
    return {**data, "tasks": list(names)}


def check_groups(settings: Settings) -> None:
    """Raise InputError for an unknown group, or one that is missing or a value in its place."""
    own = sorted({name.partition(".")[0] for name in FEATURES} - {*GROUPS, SCORES})
    known = (*GROUPS, *OPTIONAL, *own)
    for name in settings:
        # Hydra refuses unknown keys, except those added with a plus
        if name not in known:
            raise UnknownNameError(f"no setting {name}{did_you_mean(name, known)}")
    for name in (*GROUPS, "loss", "launch", *own):
        value = settings.get(name)
        if value is None and name not in ("model", "data", "train", "tracker"):
            continue
        if not isinstance(value, Mapping):
            given = f"{name}={value!r}" if name in settings else f"the group {name}"
            raise InputError(
                f"{given} is not a group of settings: choose a file of configs/{name} by "
                f"{name}=NAME, and set {name}.SETTING=VALUE"
            )
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{name} has a setting {key!r}, which is not a name")


def check_machine(train: TrainConfig) -> None:
    """Raise InputError for settings that this machine cannot carry out."""
    most = WORKERS_PER_CORE * (os.cpu_count() or 1)
    if train.num_workers > most:
        raise InputError(
            f"train.num_workers={train.num_workers} is too many for this machine, which has "
            f"{os.cpu_count()} cores: at most {most} processes load data"
        )


# What is chosen, as parts of which none may lack what another uses


SCHEMES = dict(zip(PACKAGES, BASES, strict=True))
FLATTENED = "it flattens the parameters and their state; use +launch=fsdp, or ddp"


def choice_of(fields: Fields, run: RunConfig, features: Iterable[Part]) -> list[Part]:
    """Return what is chosen for a run: method, loss, launch, quantization, features, settings.

    Args:
        fields: of the method, its name included, with the steps of the run.
    """
    launch, scheme = run.launch, run.model.quantization
    parts = [
        method_part(build_config(**fields)),
        Part(f"launch={launch.name}", (Capability(launch.name),), launch.lacks, launch),
        *features,
        *_settings(run.train, run.resolved["data"]),
    ]
    if run.loss is not None:
        parts.append(loss_part(run.loss))
    if scheme is not None:
        parts.append(Part(f"model.quantization={scheme}", (SCHEMES[scheme],)))
    return parts


def _settings(train: TrainConfig, data: Settings) -> list[Part]:
    """Return the settings that exclude others."""
    parts, kind, tokens = [], train.gradient_checkpointing, train.loss_segment
    if train.optimizer == "adamr":
        lacks = {Capability.ZERO: FLATTENED}
        parts.append(Part(f"train.optimizer={train.optimizer}", (Capability.ADAMR,), lacks))
    if kind:
        used = Capability.REENTRANT if kind == "reentrant" else Capability.CHECKPOINTING
        parts.append(Part(f"train.gradient_checkpointing={str(kind).lower()}", (used,)))
    if tokens not in (None, "auto"):
        parts.append(Part(f"train.loss_segment={tokens}", (Capability.SEGMENTS,)))
    if train.bucket_settings:
        parts.append(Part(train.bucket_settings, (Capability.BUCKETS,)))
    if train.eval_steps is not None:
        parts.append(Part(f"train.eval_steps={train.eval_steps}", (Capability.EVALUATION,)))
    several = data.get("tasks") or (data.get("source") == "tasks" and data.get("sets"))
    if several:
        parts.append(Part(f"data with {[*several]}", (Capability.TASKS,)))
    return parts
