"""Compose a run's configuration with Hydra, and explain what Hydra refuses in one sentence."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from petl.config.schema import RENAMED, unknown_setting
from petl.errors import InputError, did_you_mean

CONFIG = "train"  # the file in `config_dir`, without its suffix
WANDB_SWEEPS = "sweep"  # a folder of configurations that W&B reads, not Hydra
HYDRAS = (HydraException, OmegaConfBaseException)


def config_dir() -> Path:
    """Return the folder of configurations: next to the package in a checkout, else inside it."""
    package = Path(__file__).parents[1]
    return next(d for d in (package / "configs", package.parent / "configs") if d.is_dir())


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that `train.py` has with these overrides.

    Raises:
        InputError: Hydra cannot compose it.
    """
    # Hydra keeps one global configuration, which an earlier call or hydra.main has set
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra_compose(CONFIG, list(overrides))
    except HYDRAS as error:
        raise InputError(explain(error, overrides)) from error


def preset_of(name: str) -> dict[str, Any]:
    """Return the settings in the YAML file of a method or loss; {} if there is no such file."""
    files = (config_dir() / group / f"{name}.yaml" for group in ("method", "loss"))
    file = next((file for file in files if file.is_file()), None)
    settings: Any = {} if file is None else OmegaConf.to_container(OmegaConf.load(file))
    return settings


def explain(error: Exception, overrides: Sequence[str] | None = None) -> str:
    """Describe in one sentence what was wrong on the command line and what is allowed."""
    overrides = sys.argv[1:] if overrides is None else overrides
    # Hydra wraps some errors in exceptions without message
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__  # ty: ignore[invalid-assignment]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        kind = group or "configuration"
        if (group, name) == ("hydra/sweeper", "optuna"):
            return "Optuna is not installed; run: pip install -e '.[sweep]'"
        for other in sorted(groups() - {group}):
            if name in options_of(other):
                return f"no {kind} {name!r}; did you mean {plus(other)}{other}={name}?"
        return f"no {kind} {name!r}{did_you_mean(name, error.options or options_of(group))}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override!r} has no value: write {error.override}=VALUE"
        return f"{error.override!r} cannot be read; put values with special characters in quotes"
    # Hydra has no error classes for these two
    twice = re.match(r"(?P<group>\w+) appears more than once", str(error))
    if twice:
        return (
            f"{twice['group']} is chosen twice; a recipe such as +method=deft chooses one itself, "
            f"and {twice['group']}.FIELD=VALUE sets its fields"
        )
    unknown = re.match(r"Could not override '(?P<key>[^']+)'", str(error))
    if unknown and isinstance(error, ConfigCompositionException):
        return explain_key(unknown["key"], overrides)
    return " ".join(str(error).split())


def options_of(group: str) -> list[str]:
    """Return the names of the configurations in a group such as "method"."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def raw(group: str, name: str) -> DictConfig:
    """Load the YAML file of one configuration, with nothing composed."""
    loaded = OmegaConf.load(config_dir() / group / f"{name}.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def groups() -> set[str]:
    """Return the names of the groups of configurations: method, model, data, ..."""
    return {path.name for path in config_dir().iterdir() if path.is_dir()} - {WANDB_SWEEPS}


def plus(group: str) -> str:
    """Return "+" for a group that the default configuration lacks, else ""."""
    return "+" if group in ("method", "loss", "search", "launch") else ""


def explain_key(key: str, overrides: Sequence[str]) -> str:
    """Explain why a setting cannot be overridden."""
    if key in RENAMED:
        return str(unknown_setting(key, {}))
    if key == "method":
        return "the method is added with a plus: write +method=NAME instead of method=NAME"
    group, _, name = key.rpartition(".")
    try:
        composed = compose(choices(overrides))
        if group == "method" and "method" in composed:
            return explain_field(key, composed.method, overrides)
    except InputError as error:  # the choice of a group is wrong as well: report that first
        return str(error)
    if group == "method":
        return f"{key} needs a method: add +method=NAME"
    node = OmegaConf.select(composed, group) if group else composed
    if not isinstance(node, DictConfig):
        return f"no setting {key}{did_you_mean(group, [*map(str, composed), *groups()])}"
    elsewhere = [f"{group}={other}" for other in options_of(group) if name in raw(group, other)]
    if elsewhere:
        return f"no setting {key} here; it belongs to {', '.join(elsewhere)}"
    return f"no setting {key}{did_you_mean(name, [str(entry) for entry in node])}"


def explain_field(key: str, settings: DictConfig, overrides: Sequence[str]) -> str:
    """Explain why `key` of a method cannot be overridden; `settings` are those of its YAML."""
    from petl.core.registry import method  # imports torch and PEFT, which --help does not need

    chosen = {key.lstrip("+"): value for key, value in pairs(overrides)}
    fields = {str(k): chosen.get(f"method.{k}", value) for k, value in settings.items()}
    entry = method(fields["name"]).given(fields)
    name = key.rpartition(".")[2]
    if name in {field.name for field in dataclasses.fields(entry.config_cls)}:
        return f"{key} is not in configs/method/{entry.name}.yaml: write +{key}=..."
    return f"no setting {key}{did_you_mean(name, [*fields, *preset_of(entry.inner)])}"


def choices(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that choose a configuration from a group; of a sweep, the first."""
    known = groups()
    return [f"{key}={value}" for key, value in pairs(overrides) if key.lstrip("+") in known]


def pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Split overrides into key and value; of a sweep, the first value."""
    words = [word.partition("=") for word in overrides]
    return [(key, value.split(",")[0]) for key, _, value in words]
