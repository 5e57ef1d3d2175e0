"""Compose a run's configuration with Hydra, and explain what Hydra refuses in one sentence."""

import dataclasses
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import chain
from pkgutil import resolve_name

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from petl.errors import InputError, did_you_mean, first_line, typed
from petl.system.imports.extras import install_hint
from petl.system.imports.peft_hook import failure, import_modules, plugins
from petl.system.imports.tables import METHODS
from petl.system.settings.command_line import (
    CONFIG,
    config_dir,
    config_file,
    groups,
    options_of,
    plus,
    preset_of,
    raw,
    search_users_dirs,
    shown_path,
    users_dir,
)
from petl.system.settings.other_names import HERE
from petl.system.settings.run_file import hydra_words
from petl.system.values import named_here

# the extra with each launcher of Hydra, by the first word of its name (submitit_slurm)
LAUNCHERS = {"submitit": "cluster", "joblib": "cluster", "ray": "ray"}
OWN_GROUPS = {"draft": ("drafter",)}  # of configurations that are no runs
HYDRAS = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # the last: a broken file


def compose(overrides: Sequence[str], config: str = CONFIG) -> DictConfig:
    """Return the configuration that `petl train` has with these overrides.

    Args:
        config: the file that they change; "draft" is that of `petl draft`.

    Raises:
        InputError: Hydra cannot compose it.
    """
    # Hydra keeps one global configuration, which an earlier call or hydra.main has set
    GlobalHydra.instance().clear()
    search_users_dirs()
    words = hydra_words(overrides)
    for group, name in re.findall(r"^\+?(\w+)=(\S*/\S*)$", "\n".join(words), re.MULTILINE):
        # Hydra would follow a path to a configuration of another kind
        if group in groups() and name not in options_of(group):
            raise InputError(f"no {group} {name!r}{did_you_mean(name, options_of(group))}")
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra_compose(config, words)
    except Exception as error:  # for some values Hydra raises a ValueError or an OSError
        raise InputError(explain(error, overrides, config)) from error


def is_of_hydra(error: Exception) -> bool:
    """True if Hydra refused the command line, be it by an exception that is not its own."""
    if isinstance(error, HYDRAS):
        return True
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    packages = [name.partition(".")[0] for name in frames]
    # the job of a run is called by Hydra as well
    return next((p for p in reversed(packages) if p in ("hydra", "petl")), "") == "hydra"


def explain(error: Exception, overrides: Sequence[str] | None = None, config: str = CONFIG) -> str:
    """Describe in one sentence what was wrong on the command line and what is allowed."""
    overrides = sys.argv[1:] if overrides is None else overrides
    # Hydra wraps some errors in exceptions without message
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__  # ty: ignore[invalid-assignment]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return explain_missing_file(error.missing_cfg_file, error.options, overrides)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return explain_word(error.override)
        return misread(error.override)
    # Hydra has no error classes for these two
    several = r"(Multiple values for )?(?P<group>\w+)( appears more than once|\. To override)"
    twice = re.match(several, str(error))
    if twice:
        return (
            f"{twice['group']} is chosen twice; a recipe such as +method=deft chooses one itself, "
            f"and {twice['group']}.FIELD=VALUE sets its fields"
        )
    unknown = re.match(r"Could not override '(?P<key>[^']+)'", str(error))
    if unknown and isinstance(error, ConfigCompositionException):
        return explain_key(unknown["key"], overrides, config)
    if not isinstance(error, HYDRAS):
        return explain_override(error, overrides)
    return " ".join(str(error).split())


def explain_word(word: str) -> str:
    """Explain a word without a value: the name of a configuration, or a setting."""
    for group in sorted(groups()):
        if word in options_of(group):
            return f"{word!r} names a configuration: write {plus(group)}{group}={word}"
    return f"{word!r} has no value: write {word}=VALUE"


def misread(word: str) -> str:
    """Explain a word whose value cannot be parsed; of a text how it is typed."""
    setting, _, value = word.partition("=")
    # a list, or a text whose quotes are not closed
    is_text = value[:1] not in ("", *"[{('\"") and "\\" not in value
    way = f", within those of the shell: {typed(setting, value)}" if is_text else ""
    return f"{word!r} cannot be read; put values with special characters in quotes{way}"


def explain_override(error: Exception, overrides: Sequence[str]) -> str:
    """Explain an error that is not of Hydra's classes: a value that its code does not expect."""
    parse, known = OverridesParser.create().parse_override, groups()
    # without options such as -m, and their values
    for word in (word for word in overrides if "=" in word and not word.startswith("-")):
        try:
            override = parse(word)
            key, value = override.key_or_group, override.value()
        except Exception as unreadable:  # the error itself: a number of thousands of digits
            reason = first_line(unreadable).partition("; use sys.")[0]
            return f"{word!r} cannot be read: {reason}"
        if not key:
            return f"{word!r} names no setting: write SETTING=VALUE"
        if key in known and not isinstance(value, list) and value not in options_of(key):
            return f"no {key} {value!r}{did_you_mean(str(value), options_of(key))}"
    if isinstance(error, RecursionError):
        return "a setting is nested too deeply"
    # a name that is too long for a file
    return f"the settings cannot be read: {first_line(error)}"


def explain_missing_file(
    missing: str, options: Sequence[str] | None, overrides: Sequence[str]
) -> str:
    """Explain that there is no configuration `missing`, such as "method/mloa".

    Args:
        options: the configurations of its group, if Hydra named them.
    """
    group, _, name = missing.rpartition("/")
    kind = group or "configuration"
    if (group, name) == ("hydra/sweeper", "optuna"):
        return f"Optuna is not installed; run: {install_hint('sweep')}"
    if group == "hydra/launcher" and name.partition("_")[0] in LAUNCHERS:
        extra = LAUNCHERS[name.partition("_")[0]]
        return f"hydra/launcher={name} is not installed; run: {install_hint(extra)}"
    reason = explain_missing_yaml(name, overrides) if group == "method" else ""
    if reason:
        return reason
    for other in sorted(groups() - {group}):
        if name in options_of(other):
            return f"no {kind} {name!r}; did you mean {plus(other)}{other}={name}?"
    return f"no {kind} {name!r}{did_you_mean(name, options or options_of(group))}"


def explain_key(key: str, overrides: Sequence[str], config: str = CONFIG) -> str:
    """Explain why a setting cannot be overridden."""
    if key in (*groups(), *OWN_GROUPS.get(config, ())) and plus(key):
        return f"the {key} is added with a plus: write +{key}=NAME instead of {key}=NAME"
    group, _, name = key.rpartition(".")
    chosen = choices(overrides)
    try:
        # not the same once more
        composed = compose([] if chosen == [*overrides] else chosen, config)
        if group == "method" and "method" in composed:
            return explain_field(key, composed.method, overrides)
    except InputError as error:  # the choice of a group is wrong as well: report that first
        return str(error)
    if group == "method":
        return f"{key} needs a method: add +method=NAME"
    node = OmegaConf.select(composed, group) if group else composed
    if not isinstance(node, DictConfig):
        return f"no setting {key}{named_here(group, [*map(str, composed), *groups()])}"
    elsewhere = [f"{group}={other}" for other in options_of(group) if name in raw(group, other)]
    if elsewhere:
        return f"no setting {key} here; it belongs to {', '.join(elsewhere)}"
    return f"no setting {key}{named_here(name, [str(entry) for entry in node])}"


def explain_field(key: str, settings: DictConfig, overrides: Sequence[str]) -> str:
    """Explain why `key` of a method cannot be overridden; `settings` are those of its YAML."""
    import_modules(imports_in(overrides))
    chosen = {key.lstrip("+"): value for key, value in pairs(overrides)}
    fields = {str(k): chosen.get(f"method.{k}", value) for k, value in settings.items()}
    method, name = fields["name"], key.rpartition(".")[2]
    known, inner = known_fields(fields)
    if name in known:
        file = config_file("method", method)
        where = f"configs/method/{method}.yaml" if file is None else shown_path(file)
        return f"{key} is not in {where}: write +{key}=..."
    every = [*fields, *preset_of(inner)]
    meant = HERE.get(name, "").removeprefix("method.")
    return f"no setting {key}{did_you_mean(meant if meant in every else name, every)}"


def known_fields(settings: Mapping[str, object]) -> tuple[list[str], str]:
    """Return the fields of a method with these settings, and its inner method or ""."""
    indexed = METHODS.index.get(settings["name"])
    if indexed is not None and "inner" not in indexed.fields:  # known without torch
        return [*indexed.fields], ""
    entry = resolve_name("petl.core.registry:method")(settings["name"]).variant(settings)
    return [field.name for field in dataclasses.fields(entry.config_cls)], entry.inner


def explain_missing_yaml(name: str, overrides: Sequence[str]) -> str:
    """How the YAML of a registered method is written, which it lacks; "" for an unknown method."""
    try:
        import_modules(imports_in(overrides))
    except InputError as error:
        return str(error)
    if plugins():
        import_module("peft")  # and with it those methods
    if name not in METHODS:
        return f"no method {name!r}{failure(name)}" if failure(name) else ""
    config_cls = METHODS[name].config_cls
    known = {field.name: field.default for field in dataclasses.fields(config_cls)}
    targets = {"target_modules": "all-linear"} if "target_modules" in known else {}
    own = {  # where YAML can write the default
        field: default
        for field, default in known.items()
        if field in vars(config_cls) and isinstance(default, str | int | float | None)
    }
    fields = {"name": name, **targets, **own}
    return (
        f"method {name!r} has no YAML: write {users_dir()}/method/{name}.yaml with its name and "
        "each field that method.FIELD=VALUE is to set:\n\n"
        + yaml.safe_dump(fields, sort_keys=False)
    )


def imports_in(overrides: Sequence[str]) -> object:
    """The value of the setting `imports` on a command line; None if it is not given."""
    words = [word.lstrip("+") for word in overrides]
    given = OmegaConf.from_dotlist([word for word in words if word.startswith("imports=")])
    return OmegaConf.to_container(given).get("imports")  # ty: ignore


def choices(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that choose a configuration from a group; of a sweep, the first."""
    known = {*groups(), *chain(*OWN_GROUPS.values())}
    return [f"{key}={value}" for key, value in pairs(overrides) if key.lstrip("+") in known]


def pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Split overrides into key and value; of a sweep, the first value."""
    words = [word.partition("=") for word in overrides]
    return [(key, value.split(",")[0]) for key, _, value in words]
