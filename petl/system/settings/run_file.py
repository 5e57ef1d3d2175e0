"""A run in a file: `petl train run.yaml` stands for the words of a command line.

The file has what config.yaml in a run's folder has, or parts of it: groups by name (`method: lora`)
or with their settings, and the settings under `train` and `retain`. What differs from the
configurations of petl becomes words, so that the command line of the run is what one would write.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from petl.errors import InputError
from petl.system.files.paths import config_dir, file_of
from petl.system.files.read import read_yaml
from petl.system.settings.command_line import (
    CONFIG,
    groups,
    options_of,
    plus,
    quoted,
    raw,
    with_quoted_texts,
    word_of,
)
from petl.system.values import named_here

SUFFIXES = (".yaml", ".yml")
# of a finished run: where it is, and what it was resumed from; a recipe's settings are all there
OF_ONE_RUN = {"train": ("run", "resume"), "recipe": ()}
# a file may be a stranger's; these are taken from the command line alone
RUNS_CODE = ("imports", "model.trust_remote_code")
REWARD = "task.reward"  # likewise if it is a function of a file
logger = logging.getLogger(__name__)


def hydra_words(words: Sequence[str]) -> list[str]:
    """The words of a command line as Hydra reads them.

    A file stands for its words, which others replace; groups without a default get their plus, and
    templates quotes.

    Raises:
        InputError: the file is no run.
    """
    found: list[str] = []
    known = groups()
    for word in words:
        found += words_of(Path(word), words) if is_file(word) else [with_plus(word, known)]
    return with_quoted_texts(found)


def is_file(word: str) -> bool:
    """True if a word of a command line is the name of a YAML file."""
    return word.endswith(SUFFIXES) and "=" not in word and not word.startswith("-")


def with_plus(word: str, known: Set[str]) -> str:
    """A word as Hydra takes it: +method=lora for method=lora, a known group without a default."""
    group, is_value, _ = word.partition("=")
    return f"{plus(group)}{word}" if is_value and group in known else word


def key_of(word: str) -> str:
    """The setting of a word, without what tells Hydra to add it."""
    return word.partition("=")[0].lstrip("+~")


def runs_code(word: str) -> bool:
    """True if a setting runs code that is not petl's."""
    key = key_of(word)
    return key in RUNS_CODE or (key == REWARD and ".py:" in word)


def words_of(file: Path, others: Sequence[str]) -> list[str]:
    """The words that a file stands for, without those that other words replace.

    Raises:
        InputError: it cannot be read, or has a name that no run has.
    """
    content = read_yaml(file_of("the file of a run", str(file)), dict[str, Any])
    given = {key_of(word) for word in others}
    words: list[str] = []
    for name, value in content.items():
        if name in ("hydra", "recipe") or value is None:
            continue
        if name in given and name in groups():
            continue  # another of its configurations is chosen
        words += [word for word in _words(file, name, value, given) if key_of(word) not in given]
    code = next((word for word in words if runs_code(word)), None)
    if code is not None:
        raise InputError(
            f"{file} sets {code}, which runs code that is not petl's: if you trust it, write "
            f"{code} behind the file"
        )
    logger.info("%s: %s", file, " ".join(words))
    return words


def _words(file: Path, name: str, value: object, given: Set[str]) -> Iterator[str]:
    """Yield the words of a group, or of a section of train.yaml."""
    if name in groups():
        yield from group_words(file, name, value)
        return
    usual = usual_settings()
    known = {*usual, *groups()} - {"defaults", "hydra"}
    if name not in known:
        raise InputError(f"{file} has {name!r}, which no run has{named_here(name, known)}")
    if not isinstance(value, Mapping):
        if value != usual[name]:
            yield f"{name}={literal(value)}"
        return
    for key, own in value.items():
        is_new = key not in usual[name] or usual[name][key] != own
        word = setting(f"{name}.{key}", own)
        if is_new and key in OF_ONE_RUN.get(name, ()) and key_of(word) not in given:
            logger.info("%s: %s is of one run: to have it, write it behind the file", file, word)
        elif is_new:
            yield word


def usual_settings() -> dict[str, Any]:
    """The content of train.yaml."""
    return read_yaml(config_dir() / f"{CONFIG}.yaml", dict[str, Any])


def group_words(file: Path, group: str, value: object) -> Iterator[str]:
    """Yield the choice of a configuration, and what differs from it.

    Raises:
        InputError: no configuration has such settings.
    """
    if isinstance(value, str):
        yield with_plus(f"{group}={value}", groups())
        return
    if not isinstance(value, Mapping):
        raise InputError(f"{file} has {group}: {value!r}; write the name of one, or its settings")
    # by hand, a configuration is named within the group, as the sets of data.sets are
    key = next((key for key in (group, "source") if key in value), "name")
    usual = {name: {**raw(group, name), group: name} for name in options_of(group)}
    alike = [name for name, own in usual.items() if own.get(key) == value.get(key) is not None]
    if not alike:
        raise InputError(
            f"{file} has {group}.{key}={value.get(key)}, which no configuration of {group} has: "
            f"{group}: {{{group}: NAME, ...}} names one of {', '.join(usual)}"
        )

    def agreeing(name: str) -> int:
        return sum(own == usual[name].get(key, ...) for key, own in value.items())

    chosen = max(alike, key=agreeing)
    if {group: chosen} not in usual_settings()["defaults"]:
        yield with_plus(f"{group}={chosen}", groups())
    for name, own in value.items():
        if name not in usual[chosen] or plain(usual[chosen][name]) != own:
            yield setting(f"{'' if name in usual[chosen] else '++'}{group}.{name}", own)


def plain(value: object) -> object:
    """A value of a configuration as YAML has it."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def setting(key: str, value: object) -> str:
    """The word that sets a value."""
    return word_of(key, value) if isinstance(value, str) else f"{key}={literal(value)}"


def literal(value: object) -> str:
    """A value as Hydra's command line has it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
