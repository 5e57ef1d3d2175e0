"""The names and settings of several data sets, `data.sets`, read without torch."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from petl.data.base import SEVERAL, Source, data_source, look_up
from petl.data.tasks import SEPARATOR
from petl.errors import InputError, choose
from petl.system.settings.command_line import options_of, raw
from petl.system.settings.schema import plain
from petl.system.values import Rule

# sources that read rows of several kinds of task: a set of them has that of the mixture
GENERAL = ("files", "hub")
# mean_accuracy is that of all tasks
NAME = Rule(
    f"a printable text without {SEPARATOR!r}, other than mean",
    lambda name: name.strip() not in ("", "mean") and name.isprintable() and SEPARATOR not in name,
)
FILES = "data.sets={NAME:{data:files,train:FILE},...}"
EXAMPLE = "data.sets=[wordnet,...], or data.sets={verbs:{data:wordnet,train_rows:2000},...}"


def with_sets(
    data: Mapping[str, object], usual: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Return settings under `data` with the complete settings of each set, by the task's name.

    Args:
        usual: settings of files and of the Hub that a set has unless it names others.

    Raises:
        InputError: `data.sets` does not name at least two tasks with data configurations.
    """
    sets = data.get("sets")
    if isinstance(sets, list) and all(isinstance(name, str) for name in sets):
        if len({*sets}) < len(sets):
            raise InputError(f"data.sets={sets} names a data set twice; write {EXAMPLE}")
        sets = {name: name for name in sets}
    if not isinstance(sets, Mapping) or len(sets) < 2:
        raise InputError(f"data.sets={sets} does not name at least two data sets; write {EXAMPLE}")
    complete = {}
    for name, given in sets.items():
        NAME.check("name of a task in data.sets", name, str)
        with of_set(name):
            complete[name] = settings_of(given, usual or {})
    return {**data, "sets": complete}


def settings_of(given: object, usual: Mapping[str, object]) -> dict[str, object]:
    """Return all settings of a set, from the name of a configuration or settings of it.

    Raises:
        InputError: there is no such configuration, or none is named.
    """
    settings = {"data": given} if isinstance(given, str) else given
    if not isinstance(settings, Mapping):
        raise InputError(f"{given!r} is neither a data configuration nor settings of one")
    if "source" in settings:  # complete already
        complete = dict(settings)
    elif not isinstance(settings.get("data"), str):
        raise InputError(f"{dict(settings)} names no configuration: add data:NAME, as data:files")
    # a user who has files alone need not know that they are a configuration
    elif settings["data"] not in options_of("data") and Path(settings["data"]).is_file():
        raise InputError(f"{settings['data']} is a file: write {FILES}")
    else:
        options = {option: option for option in options_of("data")}
        file = plain(raw("data", choose(options, settings["data"], "data")))
        own = usual if file.get("source") in GENERAL else {}
        complete = {**file, **own, **{k: v for k, v in settings.items() if k != "data"}}
    if complete.get("source") in SEVERAL:
        raise InputError(
            f"a set is one data set, and cannot be several itself (data={complete['source']})"
        )
    return complete


@contextmanager
def of_set(name: str) -> Generator[None]:
    """Add the name of the set to errors about it."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"data.sets, {name}: {error}") from error


def usual_of(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of files and of the Hub that a set has unless it names others.

    Sets that are mixed have the task of the mixture, and its objective; tasks have their own.
    """
    if settings.get("source") != "mixture":
        return {}
    objective = settings.get("objective")
    more = {} if objective is None else {"objective": objective}
    return {"task": settings.get("task", Source.task), **more}


def look_up_sets(data: Mapping[str, object]) -> None:
    """Look up each set of the settings under `data` as far as it needs no torch.

    Raises:
        InputError: as `with_sets`, or as `look_up` of a set.
    """
    # the sources of several sets themselves import torch: what is left to them is what sets share
    complete = with_sets(data, usual_of(data))["sets"]
    assert isinstance(complete, dict)
    for name, settings in complete.items():
        with of_set(name):
            look_up(data_source(settings))
